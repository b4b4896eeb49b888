"""The dataset opens in other tools as it is: same rows, same types, without cert-ray."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pytest

from cert_ray import storage
from cert_ray.schemas import ANNOTATED
from tests.dataset.builders import FILE, annotated_rows

FILES = 7


def tool(name: str) -> ModuleType:
    """The library, of the extra `test`; only outside of CI may it be missing."""
    if os.environ.get("CI") == "true":
        return importlib.import_module(name)
    return pytest.importorskip(name)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards and one without rows, with the other files of a dataset's folder beside them."""
    folder = tmp_path_factory.mktemp("dataset")
    rows = annotated_rows([FILE.format(index=index, library="polars") for index in range(FILES)])
    for number, shard in enumerate((rows.slice(0, 4), rows.slice(4, 0), rows.slice(4))):
        storage.write_parquet(shard, str(folder / f"shard-{number:05d}.parquet"))
    storage.write_parquet(pa.table({"reason": ["empty"]}), str(folder / "drops" / "shard-00000.parquet"))
    (folder / "manifest.json").write_text("{}")
    return folder


def expected(dataset: Path) -> list[dict[str, Any]]:
    return [
        row for path in sorted(dataset.glob("shard-*.parquet")) for row in storage.read_parquet(str(path)).to_pylist()
    ]


def test_hugging_face_datasets(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = tool("datasets")
    loaded = datasets.load_dataset(
        "parquet", data_files=str(dataset / "shard-*.parquet"), split="train", cache_dir=str(tmp_path)
    )
    assert loaded.num_rows == FILES
    assert loaded.features.arrow_schema.names == ANNOTATED.names
    for field in ANNOTATED:
        assert loaded.features.arrow_schema.field(field.name).type.equals(field.type), field.name
    assert loaded.to_list() == expected(dataset)


def test_pandas(dataset: Path) -> None:
    pandas = tool("pandas")
    frame = pandas.concat([pandas.read_parquet(path) for path in sorted(dataset.glob("shard-*.parquet"))])
    assert frame.shape == (FILES, len(ANNOTATED))
    assert list(frame["content"]) == [row["content"] for row in expected(dataset)]
    kinds = {name: frame[name].dtype.kind for name in ("size_bytes", "weight", "cluster_size")}
    assert kinds == {"size_bytes": "i", "weight": "f", "cluster_size": "i"}
    assert pandas.api.types.is_string_dtype(frame["sketch"])
    assert dict(frame["placeholders"].iloc[0][0]) == expected(dataset)[0]["placeholders"][0]


def test_polars(dataset: Path) -> None:
    polars = tool("polars")
    frame = polars.read_parquet(str(dataset / "shard-*.parquet"))
    assert frame.shape == (FILES, len(ANNOTATED))
    assert frame.schema["size_bytes"] == polars.Int32
    assert frame.schema["content"] == polars.String
    assert frame.schema["libraries"] == polars.List(polars.String)
    span = polars.Struct({"start": polars.Int32, "end": polars.Int32, "kind": polars.String})
    assert frame.schema["placeholders"] == polars.List(span)
    assert frame.to_dicts() == expected(dataset)


def test_duckdb(dataset: Path) -> None:
    duckdb = tool("duckdb")
    with duckdb.connect() as connection:
        files = str(dataset / "shard-*.parquet")
        found = connection.execute("select * from read_parquet(?) order by doc_id", [files])
        types = {column[0]: str(column[1]) for column in found.description}
        rows = [dict(zip(types, row, strict=True)) for row in found.fetchall()]
        (numbers,) = connection.execute(
            "select count(*) from (select unnest(placeholders) as p from read_parquet(?)) where p.kind = 'number'",
            [files],
        ).fetchone()
    assert rows == expected(dataset)
    assert {name: types[name] for name in ("size_bytes", "weight", "libraries", "content")} == {
        "size_bytes": "INTEGER",
        "weight": "DOUBLE",
        "libraries": "VARCHAR[]",
        "content": "VARCHAR",
    }
    assert numbers == sum(p["kind"] == "number" for row in expected(dataset) for p in row["placeholders"])
