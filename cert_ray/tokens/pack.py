"""A pack, independent of what runs its units: plan units from the dataset's shards, do one, sum up their reports.

In: URLs of an annotated dataset and of a tokenizer's folder, and a `PackConfig`. Out: a folder of token shards with a
manifest of stage "tokens". How units are run (Ray, or one process) is the caller's choice: `RunUnits`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Protocol

import pyarrow as pa
import xxhash
from tokenizers import Tokenizer

from cert_ray import manifests, storage
from cert_ray.errors import InputError, TokenizerMismatchError
from cert_ray.manifests import Manifest, ShardReport, WrittenFile
from cert_ray.retrieval.retriever import load_retriever
from cert_ray.shards.units import Attempt, Work, WorkUnit, attempt, run_in_process
from cert_ray.sketching.prompt_format import END_OF_TEXT, PAD, SPECIAL_TOKENS
from cert_ray.tokens import dataset as datasets
from cert_ray.tokens.dataset import Dataset
from cert_ray.tokens.encoding import SKETCH_VIEWS, PackConfig, View, encode_shard, kept_rows, unigram_entropy_nats
from cert_ray.tokens.shards import STAGE, VERB, held_out_unigrams, write_shard
from cert_ray.tokens.vocabulary import (
    TOKENIZER_FILE,
    load_tokenizer,
    parse_tokenizer,
    tokenizer_digest,
    vocabulary_size,
)

_LIBRARIES_NAMED = 12  # in the message when no document matches
_COLUMNS = ["content", "content_hash", "libraries", "weight"]
_SKETCH_COLUMNS = ["sketch", "placeholders", "segments"]
# Encoding one byte of a shard's Parquet takes as long as cleaning this many bytes of text. It holds 1.6 bytes of text
# (in the claim's dataset), and encoding is about half as fast as cleaning.
_WEIGHT_PER_BYTE = 3


class RunUnits(Protocol):
    """What runs units: `shards.units.run_in_process`, or `shards.on_ray.run_units` with its placement bound."""

    def __call__(self, units: list[WorkUnit], work: Work, run: Attempt) -> list[ShardReport]:
        """The reports of `units`, in their order."""
        ...


def pack_in_process(dataset: str, tokenizer: str, output: str, config: PackConfig) -> Manifest:
    """`on_ray.pack_dataset` without Ray: the same bytes, one shard after the other."""
    return pack_with(run_in_process, dataset, tokenizer, output, config)


def pack_with(run_units: RunUnits, dataset: str, tokenizer: str, output: str, config: PackConfig) -> Manifest:
    """`on_ray.pack_dataset`, with `run_units` to run the units."""
    dataset, output = storage.absolute(dataset), storage.absolute(output)
    if config.retrieve is not None:
        config = config.model_copy(update={"retrieve": config.retrieve.pinned()})
    opened = datasets.open_dataset(dataset)
    vocabulary = load_tokenizer(tokenizer)
    _check_special_tokens(vocabulary, tokenizer, config.view)
    digest = tokenizer_digest(vocabulary)
    inputs_digest = str(xxhash.xxh3_128_hexdigest(f"{opened.digest}\n{digest}".encode()))
    if (finished := manifests.finished_manifest(output, STAGE, VERB, config, inputs_digest)) is not None:
        return finished
    units = list(_units(opened.shards, config.limit))
    _check_view(opened, units, config)
    options_digest = f"{config.digest()} {digest}"
    _tell_of_replacing(output, units, config, options_digest)
    storage.remove(storage.join(output, manifests.MANIFEST_NAME))  # its shards are about to change
    work = functools.partial(
        pack_unit, dataset=dataset, output=output, tokenizer_json=vocabulary.to_str(), config=config
    )
    with attempt(output, STAGE, VERB, options_digest) as run:
        reports = run_units(units, work, run)
        notes = _notes(vocabulary, digest, opened, output, reports)
        manifest = manifests.summarize(STAGE, config, inputs_digest, reports, notes)
        manifests.write_manifest(output, manifest)
    return manifest


def _units(shards: tuple[WrittenFile, ...], limit: int | None) -> Iterator[WorkUnit]:
    """A unit per shard that holds any of the first `limit` documents; its `rows` say how many it may read."""
    left = limit if limit is not None else sum(shard.rows for shard in shards)
    for shard in shards:
        if left > 0:
            rows = min(shard.rows, left)
            yield WorkUnit(
                name=storage.name_of(shard.name).removesuffix(".parquet"),
                payload={"file": shard.model_dump(mode="json"), "rows": rows},
                rows=rows,
                weight=1 + _WEIGHT_PER_BYTE * shard.size_bytes * rows // max(shard.rows, 1),
            )
        left -= shard.rows


def _check_view(dataset: Dataset, units: list[WorkUnit], config: PackConfig) -> None:
    """Check that the view takes some document of `units`. Reads until it finds one, mostly in the first unit.

    Raises:
        InputError: when it takes none.
        ShardCorruptError: when a shard that cannot be read disagrees with the dataset's manifest.
    """
    columns = ["libraries"] * (config.libraries is not None) + ["sketch"] * (config.view in SKETCH_VIEWS)
    if not columns:  # the view takes every document, and an opened dataset has at least one
        return
    for unit in units:
        shard = _shard_of(unit)
        try:
            table = storage.read_parquet(storage.join(dataset.url, shard.name), columns)
        except (pa.ArrowException, OSError):
            manifests.check_file(dataset.url, shard, datasets.VERB)
            raise
        if len(kept_rows(table.slice(0, unit.rows), config)[0]):
            return
    raise _no_document(dataset, config)


def _tell_of_replacing(output: str, units: list[WorkUnit], config: PackConfig, options_digest: str) -> None:
    """Warn if the finished pack in `output` will be replaced; adding shards to it is not worth a warning."""
    if manifests.is_finished(output):
        before = manifests.read_manifest(output, STAGE, VERB)
        others = config.differing(before.config)
        wanted = {unit.name: unit.unit_digest(options_digest) for unit in units}
        if not others and any(wanted.get(shard.shard) != shard.unit_digest for shard in before.shards):
            others = ["contents of the dataset or tokenizer"]
        manifests.tell_of_replacing(output, STAGE, others)


def _shard_of(unit: WorkUnit) -> WrittenFile:
    return WrittenFile.model_validate(unit.payload["file"])


def pack_unit(unit: WorkUnit, *, dataset: str, output: str, tokenizer_json: str, config: PackConfig) -> ShardReport:
    """Encode one shard of `dataset` and write its tokens into `output`.

    Raises:
        ShardCorruptError: when the dataset's shard disagrees with the dataset's manifest.
    """
    shard = _shard_of(unit)
    manifests.check_file(dataset, shard, datasets.VERB)
    columns = [*_COLUMNS, *(_SKETCH_COLUMNS if config.view in SKETCH_VIEWS else ())]
    table = storage.read_parquet(storage.join(dataset, shard.name), columns)
    retriever = None if config.retrieve is None else load_retriever(config.retrieve)
    encoded = encode_shard(table.slice(0, unit.payload["rows"]), _parsed(tokenizer_json), config, retriever)
    return ShardReport(
        shard=unit.name,
        unit_digest="",  # set by whatever runs the unit
        files=write_shard(output, unit.name, encoded.tokens, encoded.pieces, encoded.unigrams),
        rows_read=encoded.rows_read,
        rows_kept=encoded.documents,
        dropped=encoded.dropped,
        counts=encoded.counts,
    )


@functools.lru_cache(maxsize=1)
def _parsed(tokenizer_json: str) -> Tokenizer:
    return parse_tokenizer(tokenizer_json, TOKENIZER_FILE)


def _notes(
    vocabulary: Tokenizer, digest: str, dataset: Dataset, output: str, reports: list[ShardReport]
) -> dict[str, Any]:
    vocab_size = vocabulary_size(vocabulary)
    files = [file for report in reports for file in report.files]
    return {
        "vocab_size": vocab_size,
        "tokenizer_digest": digest,
        "dataset_digest": dataset.digest,
        "dataset": dataset.files,  # for the dataset and model cards
        "pad_id": vocabulary.token_to_id(PAD),
        "end_id": vocabulary.token_to_id(END_OF_TEXT),
        "held_out_unigram_entropy_nats": unigram_entropy_nats(held_out_unigrams(output, files, vocab_size)),
    }


def _check_special_tokens(vocabulary: Tokenizer, url: str, view: View) -> None:
    needed = SPECIAL_TOKENS if view in SKETCH_VIEWS else (END_OF_TEXT, PAD)
    missing = [token for token in needed if vocabulary.token_to_id(token) is None]
    if missing:
        raise TokenizerMismatchError(
            f"{url}: the view {view.value} needs {', '.join(missing)}, which this tokenizer lacks. Give it the "
            "special tokens with cert_ray.tokens.vocabulary.adopt_tokenizer, and pack with the result."
        )


def _no_document(dataset: Dataset, config: PackConfig) -> InputError:
    if config.libraries is None:
        return InputError(dataset.url, "no document has a sketch", "Preprocess it again.")
    found = ", ".join(f"{name} ({count})" for name, count in datasets.common_libraries(dataset, _LIBRARIES_NAMED))
    return InputError(
        dataset.url,
        f"no document imports any of {', '.join(config.libraries)}",
        f"Imported most are {found or 'none at all'}: name one of them, or preprocess files that use yours.",
    )
