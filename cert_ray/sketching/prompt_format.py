r"""The only place that turns placeholder spans into special tokens, and back.

In: a `tokenizers.Tokenizer` to which `add_special_tokens` was applied, and text with spans. Out: token ids; from ids,
text with spans. Used for the training text of every view with sketches (sketcher, generator, context first), for the
prompt at serving, and to read the answer, so the three cannot drift apart. A pair is

    SKETCH \n <|segmentation|> \n CODE

At serving, CODE is the context, from which the generator continues. If the context comes first, for one model that does
both stages, an example is

    CONTEXT <|segmentation|> SKETCH <|segmentation|> CODE

and at serving the prompt of each stage ends with its separator. No other token is needed: the first separator in an
example begins the sketch, the second ends it.

Only spans become special tokens: the word `string` in code is ordinary text, and so is `<|string|>`. To ensure this,
encoding uses a private copy of the tokenizer with `encode_special_tokens` set and without truncation or padding. The
caller's settings are neither used nor changed, not even in other threads.

The format of the authors' released code (placeholders as plain words, a comment as separator) is kept at the end for
comparison.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

from tokenizers import AddedToken, Tokenizer

from cert_ray.sketching.anonymize import PLACEHOLDER_KINDS, Placeholder, Sketched

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
SEPARATOR = "<|segmentation|>"


def special_token(kind: str) -> str:
    """The special token of a placeholder kind."""
    return f"<|{kind}|>"


SPECIAL_TOKENS: tuple[str, ...] = (END_OF_TEXT, PAD, SEPARATOR, *map(special_token, PLACEHOLDER_KINDS))


def add_special_tokens(tokenizer: Tokenizer) -> int:
    """Add those of SPECIAL_TOKENS that `tokenizer` lacks, in order; return how many the model's embeddings grow by."""
    before = tokenizer.get_vocab_size(with_added_tokens=True)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return int(tokenizer.get_vocab_size(with_added_tokens=True)) - before


def encode_code(tokenizer: Tokenizer, code: str) -> list[int]:
    """Ids of text in which nothing becomes a special token, whatever it looks like."""
    return next(encode_code_batch(tokenizer, [code]))


def encode_code_batch(tokenizer: Tokenizer, codes: Sequence[str]) -> Iterator[list[int]]:
    """`encode_code` of each, in parallel if the tokenizers library may use threads.

    Here and in the other batch functions, all texts are encoded at the first `next`, but ids become Python integers one
    text at a time. Those take ten times the memory of packed tokens; holding a batch of them would cost a fiftieth of
    the time of encoding it (measured).
    """
    for encoding in _ordinary(tokenizer).encode_batch_fast(list(codes), add_special_tokens=False):
        yield encoding.ids


def encode_code_spans(tokenizer: Tokenizer, code: str) -> list[tuple[int, int, int]]:
    """`encode_code` of `code`: each id with the [start, end) of its code points."""
    encoding = _ordinary(tokenizer).encode(code, add_special_tokens=False)
    return [(token, start, end) for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)]


def encode_sketch(tokenizer: Tokenizer, sketch: str, placeholders: Sequence[Placeholder]) -> list[int]:
    """Ids of a sketch, with one special token per placeholder."""
    return next(encode_sketch_batch(tokenizer, [(sketch, placeholders)]))


def encode_sketch_batch(
    tokenizer: Tokenizer, sketches: Iterable[tuple[str, Sequence[Placeholder]]]
) -> Iterator[list[int]]:
    """`encode_sketch` of each (sketch, placeholders)."""
    return _encode(tokenizer, [_pieces(sketch, placeholders) for sketch, placeholders in sketches])


def encode_pair(tokenizer: Tokenizer, sketch: str, placeholders: Sequence[Placeholder], code: str) -> list[int]:
    """Ids of sketch, newline, separator, newline, code: the generator's training text, and its prompt."""
    return next(encode_pair_batch(tokenizer, [(sketch, placeholders, code)]))


def encode_pair_batch(
    tokenizer: Tokenizer, pairs: Iterable[tuple[str, Sequence[Placeholder], str]]
) -> Iterator[list[int]]:
    """`encode_pair` of each (sketch, placeholders, code)."""
    return _encode(
        tokenizer,
        [
            [*_pieces(sketch + "\n", placeholders), (SEPARATOR, True), ("\n" + code, False)]
            for sketch, placeholders, code in pairs
        ],
    )


def encode_context_first_batch(
    tokenizer: Tokenizer, examples: Iterable[tuple[str, str, Sequence[Placeholder], str]]
) -> Iterator[list[int]]:
    """Ids of context, separator, sketch, separator, code, for each (context, sketch, placeholders, code)."""
    mark = (SEPARATOR, True)
    return _encode(
        tokenizer,
        [
            [(context, False), mark, *_pieces(sketch, placeholders), mark, (code, False)]
            for context, sketch, placeholders, code in examples
        ],
    )


def sketch_prompt(tokenizer: Tokenizer, context: Sequence[int]) -> list[int]:
    """The prompt of a context-first model for the sketch of what follows; `context` is the ids of the code so far."""
    return [*context, separator_id(tokenizer)]


def code_prompt(
    tokenizer: Tokenizer, context: Sequence[int], sketch: str, placeholders: Sequence[Placeholder]
) -> list[int]:
    """The prompt of a context-first model for the code: `sketch_prompt`, the sketch, and the separator."""
    ids = encode_sketch(tokenizer, sketch, placeholders)
    return [*sketch_prompt(tokenizer, context), *ids, separator_id(tokenizer)]


def separator_id(tokenizer: Tokenizer) -> int:
    """The separator's id."""
    return _token_id(tokenizer, SEPARATOR)


def decode_sketch(tokenizer: Tokenizer, ids: Sequence[int]) -> Sketched:
    """Text and spans of a sketch's ids. Other special tokens are left out; `replaced` is empty, as there is no source.

    Ids that do not form a whole UTF-8 character become U+FFFD, as in any decoding.
    """
    kinds, others = _special_ids(tokenizer)
    out: list[str] = []
    placeholders: list[Placeholder] = []
    size, ordinary = 0, []
    for token in [*ids, None]:
        kind = None if token is None else kinds.get(token)
        if token is not None and kind is None:
            if token not in others:
                ordinary.append(token)
            continue
        if ordinary:
            out.append(tokenizer.decode(ordinary, skip_special_tokens=False))
            size += len(out[-1])
            ordinary = []
        if kind is not None:
            out.append(kind)
            placeholders.append(Placeholder(size, size + len(kind), kind))
            size += len(kind)
    return Sketched("".join(out), tuple(placeholders), ())


def has_placeholder(tokenizer: Tokenizer, ids: Iterable[int]) -> bool:
    """Whether a sketch's ids hold a placeholder. If not, the sketch itself is the answer, as in the paper."""
    kinds, _ = _special_ids(tokenizer)
    return any(token in kinds for token in ids)


def marker_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids of the placeholders and the separator, as far as the tokenizer has them: these never occur in code."""
    found = (tokenizer.token_to_id(token) for token in SPECIAL_TOKENS if token not in (END_OF_TEXT, PAD))
    return tuple(number for number in found if number is not None)


def decode_code(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of ids without special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def _pieces(sketch: str, placeholders: Sequence[Placeholder]) -> list[tuple[str, bool]]:
    """The sketch as pieces of (text, whether it is a special token)."""
    pieces, last = [], 0
    for start, end, kind in placeholders:
        pieces += [(sketch[last:start], False), (special_token(kind), True)]
        last = end
    return [*pieces, (sketch[last:], False)]


def _encode(tokenizer: Tokenizer, texts: Sequence[Sequence[tuple[str, bool]]]) -> Iterator[list[int]]:
    """Encode the ordinary pieces of all texts in one batch, then join them with the special ids, text by text."""
    specials = {token: _token_id(tokenizer, token) for token in SPECIAL_TOKENS}
    ordinary = [piece for pieces in texts for piece, special in pieces if piece and not special]
    encoded = iter(_ordinary(tokenizer).encode_batch_fast(ordinary, add_special_tokens=False))
    for pieces in texts:
        ids: list[int] = []
        for piece, special in pieces:
            if special:
                ids.append(specials[piece])
            elif piece:
                ids += next(encoded).ids
        yield ids


def _token_id(tokenizer: Tokenizer, token: str) -> int:
    number = tokenizer.token_to_id(token)
    assert number is not None, f"the tokenizer has no {token}: add_special_tokens was not applied to it"
    return int(number)


def _special_ids(tokenizer: Tokenizer) -> tuple[dict[int, str], frozenset[int]]:
    return _special_ids_of(tokenizer, tokenizer.get_vocab_size(with_added_tokens=True))


def _ordinary(tokenizer: Tokenizer) -> Tokenizer:
    return _ordinary_of(tokenizer, tokenizer.get_vocab_size(with_added_tokens=True))


# The vocabulary's size is part of the cache key, since tokens may be added to a tokenizer after its first use.
# Tokenizers are hashed by identity; the cache keeps the few that a process uses alive.
@lru_cache(maxsize=8)
def _special_ids_of(tokenizer: Tokenizer, vocab_size: int) -> tuple[dict[int, str], frozenset[int]]:  # noqa: ARG001
    kinds = {_token_id(tokenizer, special_token(kind)): kind for kind in PLACEHOLDER_KINDS}
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return kinds, frozenset(special - kinds.keys())


@lru_cache(maxsize=8)
def _ordinary_of(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:  # noqa: ARG001
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    return copy


# The released format, for comparison only: it cannot tell a placeholder from the same word in code.

RELEASED_SEPARATOR = "# [segmentation]"


def released_pair(sketch: str, code: str) -> str:
    """Sketch and code in plain text, as the authors' code joins them."""
    return f"{sketch}\n{RELEASED_SEPARATOR}\n{code}"


def released_has_placeholder(sketch: str) -> bool:
    """Whether the text holds a literal's placeholder word anywhere, which is how the authors' code decides.

    `df.astype(float)` and `df.to_string()` also count: a fault of that code, reproduced here to be measured.
    """
    return any(kind in sketch for kind in PLACEHOLDER_KINDS if kind not in ("func", "AnClass", "variable", "argument"))
