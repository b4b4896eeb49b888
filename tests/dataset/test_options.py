"""Every option of preprocessing has been decided on: it changes a digest, or it is known to change no bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from cert_ray.config import Config
from cert_ray.corpus.documents import DocumentsConfig
from cert_ray.corpus.on_ray import units_digest
from cert_ray.dataset.options import AnnotateConfig, PreprocessConfig
from cert_ray.operations.recipe import override

# `tests/dedup/test_survivors.py` and `test_buckets.py` hold that these decide nothing.
CHANGES_NO_BYTES = {"minhash.keys_in_memory", "minhash.signatures_in_memory"}
# Units tell these themselves, so that an input more makes no other shard again.
SAID_BY_UNITS = {"sources.inputs", "sources.limit", "sources.max_input_bytes", "appended"}
# Another value for each option. A new one is missing here: add it, and if it decides no bytes, above.
OTHERS: dict[str, Any] = {
    "sources.inputs": ["elsewhere"],
    "sources.include": ["*.pyi"],
    "sources.exclude": ["tests/*"],
    "sources.open_containers": True,
    "sources.columns.content": "code",
    "sources.columns.path": "name",
    "sources.columns.repository": "repo",
    "sources.columns.stars": None,
    "sources.columns.licence": None,
    "sources.max_file_bytes": 2,
    "sources.unit_bytes": 3,
    "sources.limit": 4,
    "sources.max_input_bytes": 5,
    "appended": [["later"]],
    "cleaning.path_excluded": [],
    "cleaning.min_lines": None,
    "cleaning.max_mean_line_chars": 7,
    "cleaning.max_line_chars": 8,
    "cleaning.min_keywords": None,
    "cleaning.min_ascii_share": 0.5,
    "cleaning.min_alphabetic_share": 0.5,
    "cleaning.max_encoded_run_chars": 9,
    "cleaning.generated_markers": ["made by"],
    "cleaning.generated_lines": 1,
    "cleaning.remove_licence_headers": False,
    "cleaning.min_comment_alphanumeric_share": None,
    "secrets": None,
    "secrets.kinds": ["email"],
    "licences": ["MIT"],
    "decontaminate.problems": ["HumanEval.jsonl"],
    "decontaminate.ngram_words": 13,
    "decontaminate.min_ngram_letters": 5,
    "decontaminate.min_tree_nodes": 20,
    "minhash.shingle_tokens": 7,
    "minhash.bands": 14,
    "minhash.rows_per_band": 8,
    "minhash.threshold": 0.8,
    "minhash.seed": 2,
    "minhash.keys_in_memory": 100,
    "minhash.signatures_in_memory": 100,
    "dedup_quality": None,
    "dedup_quality.documents": 10,
    "dedup_quality.cluster_documents": 3,
    "dedup_quality.sample_bytes": 1_000,
    "dedup_quality.shards": 2,
    "dedup_quality.seed": 2,
    "weights.rs0": 0.5,
    "weights.rs1": 0.25,
    "weights.rs2": 0.5,
    "sketch_kind": "names",
}
OPTIONS = PreprocessConfig.model_validate({"sources": {"inputs": ["corpus"]}})


def paths(config: Config, prefix: str = "") -> Iterator[str]:
    """Every option by its dotted name; a group that may be switched off counts as one as well."""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Config):
            yield from paths(value, f"{prefix}{name}.")
        if not isinstance(value, Config) or type(None) in getattr(field.annotation, "__args__", ()):
            yield prefix + name


def changed(path: str) -> PreprocessConfig:
    options = OPTIONS.model_dump(mode="json")
    override(options, path, OTHERS[path])
    return PreprocessConfig.model_validate(options)


def digests(config: PreprocessConfig) -> dict[str, str]:
    """What decides whether each stage's units are made again."""
    documents = DocumentsConfig(**{name: getattr(config, name) for name in DocumentsConfig.model_fields})
    annotate = AnnotateConfig(weights=config.weights, sketch_kind=config.sketch_kind)
    return {"documents": units_digest(documents), "dedup": config.minhash.digest(), "dataset": annotate.digest()}


def test_every_option_is_decided_on() -> None:
    assert set(OTHERS) == set(paths(OPTIONS))
    assert set(OTHERS) >= CHANGES_NO_BYTES | SAID_BY_UNITS


@pytest.mark.parametrize("path", OTHERS)
def test_an_option_changes_the_digest_or_no_bytes(path: str) -> None:
    other = changed(path)
    assert other != OPTIONS
    decides = path not in CHANGES_NO_BYTES
    assert (other.digest() != OPTIONS.digest()) is decides
    assert OPTIONS.decides_as(other.model_dump(mode="json")) is not decides


@pytest.mark.parametrize("path", OTHERS)
def test_an_option_makes_again_what_depends_on_it_and_nothing_before(path: str) -> None:
    before, after = digests(OPTIONS), digests(changed(path))
    stage = {"minhash": "dedup", "weights": "dataset", "sketch_kind": "dataset"}.get(path.split(".")[0], "documents")
    expected = {stage} - ({"dedup"} if path in CHANGES_NO_BYTES else set())
    if path in SAID_BY_UNITS or path.startswith("dedup_quality"):  # it measures what was decided
        expected = set()
    assert {name for name in before if before[name] != after[name]} == expected
