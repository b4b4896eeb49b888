"""The tokenizer: a byte-level BPE for Python, trained on a weighted sample of the dataset, and its files.

In: texts, or the URL of an annotated dataset. Out: a `tokenizers.Tokenizer`, and a folder that
`AutoTokenizer.from_pretrained` loads without a network. Every byte is in the vocabulary, so any text survives encoding
and decoding. The special tokens of `sketching.prompt_format` have the first ids. Only `prompt_format` places them;
text that is spelled like one stays text.

The split pattern follows GPT-4's (cl100k_base of tiktoken, without the English contractions). Measured on 2.5 MB of
held-out standard library, NumPy and Ray code, characters per token with 8,000 / 32,000 entries trained on 21 MB: this
pattern 3.31 / 3.75, GPT-2's 3.20 / 3.48, this one with single digits 3.24 / 3.61. So numbers are split into groups of
up to three digits: constants in code are short, and generation does no arithmetic on them. A line break is split from
the indentation after it, so that a prompt which ends in a line break is split as in training.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import pydantic
import xxhash
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from cert_ray import manifests, storage
from cert_ray.config import Config
from cert_ray.errors import ConfigError, InputError
from cert_ray.manifests import Manifest, ShardReport, WrittenFile
from cert_ray.sketching.prompt_format import END_OF_TEXT, PAD, SPECIAL_TOKENS, add_special_tokens
from cert_ray.tokens import dataset as datasets

logger = logging.getLogger(__name__)

STAGE = "tokenizer"
VERB = "tokenizer"
TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
_MEASURED_TEXTS = 256  # of the sample, to measure characters per token on

PYTHON_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+"  # a word with the character before it: a space, a dot, an underscore
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # operators, with the line end after them
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"  # indentation, except the space that belongs to the next word
    r"|\s+"
)


class TokenizerConfig(Config):
    """How to train a tokenizer."""

    vocab_size: int = 32_000  # the paper's
    min_frequency: int = pydantic.Field(2, ge=1)  # how often a pair must occur in the sample to be merged
    max_token_length: int = pydantic.Field(32, ge=1)  # in bytes
    sample_bytes: int = pydantic.Field(200_000_000, ge=1)  # measured: 60 MB cost 0.4% more tokens
    context_tokens: int = pydantic.Field(1_024, ge=1)  # written as `model_max_length`
    pattern: str = PYTHON_PATTERN


class _Run(TokenizerConfig):
    seed: int


class _Adoption(Config):
    context_tokens: int


def train_vocabulary(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Train a tokenizer on `texts`; the same texts in the same order give the same tokenizer.

    Raises:
        ConfigError: when `vocab_size` has no room for all bytes and special tokens, or `pattern` is no valid regex.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(alphabet) + len(SPECIAL_TOKENS)
    if config.vocab_size < smallest:
        raise ConfigError(
            f"vocab_size: {config.vocab_size} is too small; {smallest} are needed for the 256 bytes and the "
            f"{len(SPECIAL_TOKENS)} special tokens alone. Give a few thousand."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_regex(config.pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        max_token_length=config.max_token_length,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _regex(pattern: str) -> Regex:
    try:
        return Regex(pattern)
    except Exception as error:  # the native library raises plain `Exception`
        raise ConfigError(f"pattern: {pattern!r} is not an Oniguruma regular expression: {error}") from error


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """The largest id plus one: the size that an embedding needs, even if a foreign tokenizer skips ids."""
    return _vocabulary_size_of(tokenizer, tokenizer.get_vocab_size(with_added_tokens=True))


# As in `prompt_format`, the number of tokens is part of the cache key. Uncached it takes 15 ms: 1% of a small shard.
@lru_cache(maxsize=8)
def _vocabulary_size_of(tokenizer: Tokenizer, tokens: int) -> int:  # noqa: ARG001
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """xxh3-128 of the tokenizer's JSON: tokenizers with equal digests encode equally."""
    return str(xxhash.xxh3_128_hexdigest(tokenizer.to_str(pretty=False).encode()))


def splits_otherwise(one: Tokenizer, other: Tokenizer) -> list[str]:
    """What makes two tokenizers with equal token ids split text differently, as names in their JSON."""
    parts = [_splitting(tokenizer) for tokenizer in (one, other)]
    return [name for name in sorted(parts[0] | parts[1]) if parts[0].get(name) != parts[1].get(name)]


def _splitting(tokenizer: Tokenizer) -> dict[str, Any]:
    """Normalizer, pre-tokenizer, and the model without its vocabulary: the merges and how they are applied."""
    found = json.loads(tokenizer.to_str())
    model = {f"model.{name}": value for name, value in found["model"].items() if name != "vocab"}
    return {name: found[name] for name in ("normalizer", "pre_tokenizer")} | model


def save_tokenizer(tokenizer: Tokenizer, folder: str, context_tokens: int) -> tuple[WrittenFile, ...]:
    """Write `tokenizer` into `folder` so that `AutoTokenizer.from_pretrained(folder)` loads it without a network."""
    options: dict[str, Any] = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        "model_max_length": context_tokens,
        "pad_token": PAD,
        "split_special_tokens": True,  # text that looks like a special token stays text, as in `prompt_format`
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": END_OF_TEXT,
    }
    files = []
    texts = {TOKENIZER_FILE: tokenizer.to_str(pretty=True), _CONFIG_FILE: json.dumps(options, indent=1)}
    for name, text in texts.items():
        written = storage.write_text(storage.join(folder, name), text + "\n")
        files.append(WrittenFile.of(name, written))
    return tuple(files)


def load_tokenizer(folder: str) -> Tokenizer:
    """The tokenizer of the `tokenizer.json` in `folder`: one of ours, or that of any Hugging Face model.

    Raises:
        InputError: when there is no such file, or it cannot be read.
    """
    url = storage.join(folder, TOKENIZER_FILE)
    if not storage.exists(url):
        raise InputError(folder, f"no {TOKENIZER_FILE} in it", f"Give a tokenizer's folder, or run `cert-ray {VERB}`.")
    return parse_tokenizer(storage.read_text(url), url)


def parse_tokenizer(text: str, where: str) -> Tokenizer:
    """The tokenizer in `text`, a `tokenizer.json` read from `where`.

    Raises:
        InputError: when `text` is not a tokenizer.
    """
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the native library raises plain `Exception`
        raise InputError(where, f"not a tokenizer: {error}", f"Make it again with `cert-ray {VERB}`.") from error


def adopt_tokenizer(folder: str, output: str, context_tokens: int) -> Manifest:
    """Write the tokenizer of a model made elsewhere into `output`, adding the special tokens that it lacks.

    Existing ids do not change, so the model's embeddings need only be extended to the manifest's `vocab_size`.
    A finished folder made from the same tokenizer and options is kept.

    Raises:
        InputError: when `folder` holds no `tokenizer.json`.
        SchemaVersionError: when another stage, or another version of the schema, wrote `output`.
    """
    tokenizer = load_tokenizer(folder)
    source_digest = tokenizer_digest(tokenizer)
    run = _Adoption(context_tokens=context_tokens)
    if (finished := manifests.finished_manifest(output, STAGE, VERB, run, source_digest)) is not None:
        return finished
    added = add_special_tokens(tokenizer)
    _withdraw(output, run, source_digest, "base")
    files = save_tokenizer(tokenizer, output, context_tokens)
    report = ShardReport(shard="tokenizer", unit_digest=run.digest(), files=files, rows_read=0, rows_kept=0)
    notes = {
        "vocab_size": vocabulary_size(tokenizer),
        "tokenizer_digest": tokenizer_digest(tokenizer),
        "special_tokens_added": added,
    }
    manifest = manifests.summarize(STAGE, run, source_digest, [report], notes)
    manifests.write_manifest(output, manifest)
    return manifest


def train_on_dataset(dataset: str, output: str, config: TokenizerConfig, seed: int) -> Manifest:
    """Train on a sample of the annotated dataset and write the tokenizer's folder, its manifest last.

    A finished folder made from the same dataset, options and seed is kept.

    Raises:
        ConfigError: see `train_vocabulary`.
        InputError: when the dataset holds nothing to train on.
        NotFinishedError, SchemaVersionError: when `dataset` is no finished dataset of this version.
    """
    opened = datasets.open_dataset(dataset)
    run = _Run(**config.model_dump(), seed=seed)
    if (finished := manifests.finished_manifest(output, STAGE, VERB, run, opened.digest)) is not None:
        return finished
    sample = datasets.draw_sample(opened, config.sample_bytes, seed)
    told = (config.vocab_size, sample.documents, sample.size_bytes / 1e6)
    logger.info("tokenizer: training up to %d entries on %d documents, %.1f MB", *told)
    tokenizer = train_vocabulary(datasets.sampled_texts(opened, sample), config)
    _withdraw(output, run, opened.digest, "dataset")
    report = ShardReport(
        shard="tokenizer",
        unit_digest=run.digest(),
        files=save_tokenizer(tokenizer, output, config.context_tokens),
        rows_read=sample.documents,
        rows_kept=sample.documents,
        counts={"sample_bytes": sample.size_bytes},
    )
    notes = {
        "vocab_size": vocabulary_size(tokenizer),
        "tokenizer_digest": tokenizer_digest(tokenizer),
        "characters_per_token": _characters_per_token(tokenizer, datasets.sampled_texts(opened, sample)),
    }
    manifest = manifests.summarize(STAGE, run, opened.digest, [report], notes)
    manifests.write_manifest(output, manifest)
    return manifest


def _withdraw(output: str, run: Config, inputs_digest: str, inputs: str) -> None:
    """Remove the manifest of a finished tokenizer in `output`; warn if `run` makes a different tokenizer."""
    if manifests.is_finished(output):
        before = manifests.read_manifest(output, STAGE, VERB)
        others = run.differing(before.config)
        if not others and before.inputs_digest != inputs_digest:
            others = [f"contents of the {inputs}"]
        manifests.tell_of_replacing(output, STAGE, others)
        storage.remove(storage.join(output, manifests.MANIFEST_NAME))


def _characters_per_token(tokenizer: Tokenizer, texts: Iterator[str]) -> float | None:
    """Measured on the first texts of the training sample, so a little higher than on unseen code."""
    measured = [text for _, text in zip(range(_MEASURED_TEXTS), texts, strict=False)]
    tokens = sum(map(len, tokenizer.encode_batch_fast(measured)))
    return round(sum(map(len, measured)) / tokens, 3) if tokens else None
