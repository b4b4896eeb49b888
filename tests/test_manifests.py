"""Manifests check themselves."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from cert_ray import errors, manifests
from cert_ray.config import Config
from cert_ray.errors import ConservationError, NotFinishedError, SchemaVersionError
from cert_ray.manifests import ShardReport


class Options(Config):
    threshold: float = 0.5


def report(name: str, read: int, kept: int, **dropped: int) -> ShardReport:
    return ShardReport(shard=name, unit_digest="", files=(), rows_read=read, rows_kept=kept, dropped=dropped)


def test_sums_do_not_depend_on_the_order_of_shards() -> None:
    shards = [report("shard-00001", 3, 2, empty=1), report("shard-00000", 5, 3, empty=1, binary=1)]
    manifest = manifests.summarize("documents", Options(), "digest", shards)
    assert manifest == manifests.summarize("documents", Options(), "digest", shards[::-1])
    assert (manifest.rows_read, manifest.rows_kept, manifest.dropped) == (8, 5, {"binary": 1, "empty": 2})
    assert manifest.config == {"threshold": 0.5}


def test_a_lost_row_fails_the_stage() -> None:
    with pytest.raises(ConservationError, match=r"read 3 != kept 1 \+ dropped 1"):
        manifests.summarize("documents", Options(), "digest", [report("shard-00000", 3, 1, empty=1)])


def test_unfinished_foreign_and_garbled_folders_are_refused_by_name(tmp_path: Path) -> None:
    folder = str(tmp_path)
    with pytest.raises(NotFinishedError, match="cert-ray preprocess"):
        manifests.read_manifest(folder, "dataset", "preprocess")
    manifests.write_manifest(folder, manifests.summarize("tokens", Options(), "digest", []))
    assert manifests.read_manifest(folder, "tokens", "pack").stage == "tokens"
    with pytest.raises(SchemaVersionError, match="expected stage dataset, found stage tokens"):
        manifests.read_manifest(folder, "dataset", "preprocess")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(SchemaVersionError, match="a JSON manifest"):
        manifests.read_manifest(folder, "dataset", "preprocess")


@pytest.mark.parametrize(
    "error",
    [
        errors.InputError("s3://x", "gone", "Look."),
        errors.SchemaVersionError("x", "1", "2", "Make it again."),
        errors.NotFinishedError("x", "pack"),
        errors.ShardCorruptError("x", "1", "2", "pack"),
        errors.ConservationError("dedup", 3, 1, 1),
        errors.ClusterError("10.0.0.1:6379", "nobody answers", "Look."),
        errors.RequestError(400, "no", "n", "bad"),
    ],
)
def test_errors_survive_pickling(error: errors.CertRayError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
