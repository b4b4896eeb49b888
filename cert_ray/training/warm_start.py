"""Embeddings for special tokens that a base has never seen. In: a model, its tokenizer, the new ids. Out: the model.

A placeholder comes where a literal or a name would come, so it starts as the mean of what such literals and names are
made of, in input and output embeddings alike: `<|number|>` as the mean of digits, `<|string|>` as that of quotes. With
tied tables that is one row. A token that stands for nothing, or for what the tokenizer cannot spell, starts as the mean
of every embedding (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models").

Measured with SmolLM2-135M (dequantised) on the sketcher's view, before any training: docs/training.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer

from cert_ray.sketching.prompt_format import SEPARATOR, special_token

# Tables of a multiple of 64 rows keep matrix kernels on their fast path (cuBLAS wants multiples of 8 in bf16).
ROWS_MULTIPLE = 64

_STANDS_FOR: dict[str, tuple[str, ...]] = {
    special_token("number"): ("0", "1", "2", "10", "100"),
    special_token("float"): ("0.5", "1.0", "0.1"),
    special_token("floatexponant"): ("1e-3", "1e6"),
    special_token("complex"): ("1j", "0.5j"),
    special_token("string"): ("''", '""', "'a'", '"a"'),
    special_token("rawstring"): ("r''", 'r""'),
    special_token("interstring"): ("f''", 'f""', "f'{x}'"),
    special_token("interrawstring"): ("rf''", 'fr""'),
    special_token("binarystring"): ("b''", 'b""'),
    special_token("unicodestring"): ("u''", 'u""'),
    special_token("func"): ("main", "get", "test", "run", "_"),
    special_token("AnClass"): ("Test", "Model", "Base", "Data"),
    special_token("variable"): ("x", "data", "value", "result"),
    special_token("argument"): ("x", "data", "name", "value"),
    SEPARATOR: ("#",),
}


def add_tokens(model: Any, ids: range, tokenizer: Tokenizer) -> None:
    """Give the tokens `ids` of `tokenizer`, which lie behind the base's vocabulary, embeddings to start from.

    Rows that the model has already, behind its vocabulary, are used; where they do not suffice, both tables grow to a
    multiple of ROWS_MULTIPLE, and the rows that no token has start as the mean.
    """
    if len(ids) == 0:
        return
    if ids.stop > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(ids.stop, pad_to_multiple_of=ROWS_MULTIPLE, mean_resizing=False)
    sources = {token_id: _sources(tokenizer, token_id, ids.start) for token_id in ids}
    with torch.no_grad():
        tables = {id(layer.weight): layer.weight for layer in _embedding_layers(model)}
        for weight in tables.values():  # one, where input and output are tied
            weight[ids.start :] = weight[: ids.start].mean(dim=0)
            for token_id, found in sources.items():
                if found:
                    weight[token_id] = weight[found].mean(dim=0)


def _sources(tokenizer: Tokenizer, token_id: int, known: int) -> list[int]:
    """Ids below `known`, none of a special token, of the text that a token stands for."""
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    spelled = _ids(tokenizer, _STANDS_FOR.get(tokenizer.id_to_token(token_id) or "", ()))
    return [number for number in spelled if number < known and number not in special]


def _ids(tokenizer: Tokenizer, texts: Iterable[str]) -> list[int]:
    return [number for text in texts for number in tokenizer.encode(text, add_special_tokens=False).ids]


def _embedding_layers(model: Any) -> list[Any]:
    return [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
