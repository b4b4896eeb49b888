"""A unit becomes documents and drops, and every record that was read is one of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
import xxhash

from cert_ray.corpus.documents import DocumentsConfig, UnitDocuments, documents_of_unit
from cert_ray.corpus.sources import SourceConfig, plan_units
from cert_ray.errors import MissingColumnsError
from cert_ray.schemas import DOCUMENTS, DROPS
from tests.corpus.hostile import (
    GOOD,
    GOOD_FILES,
    build_hostile_corpus,
    build_table_without_columns,
    good_source,
    hostile_inputs,
)


def units(sources: SourceConfig, **options: object) -> list[UnitDocuments]:
    config = DocumentsConfig.model_validate({"sources": sources, **options})
    return [documents_of_unit(unit, config) for unit in plan_units(sources)]


def documents(sources: SourceConfig, **options: object) -> tuple[pa.Table, pa.Table, int]:
    results = units(sources, **options)
    kept, dropped = [unit.documents for unit in results], [unit.drops for unit in results]
    return pa.concat_tables(kept), pa.concat_tables(dropped), sum(unit.rows_read for unit in results)


@pytest.fixture
def hostile(tmp_path: Path) -> tuple[tuple[str, ...], dict[str, int]]:
    expected = build_hostile_corpus(tmp_path)
    return hostile_inputs(tmp_path), expected


def test_hostile_corpus_ends_in_exactly_these_drops(hostile: tuple[tuple[str, ...], dict[str, int]]) -> None:
    inputs, expected = hostile
    kept, dropped, read = documents(SourceConfig(inputs=inputs))
    reasons = Counter(dropped.column("reason").to_pylist())
    assert dict(reasons) == expected, dropped.select(["path", "reason", "detail"]).to_pylist()
    assert len(kept) == GOOD_FILES
    assert read == len(kept) + len(dropped)
    assert kept.schema == DOCUMENTS
    assert dropped.schema == DROPS


def test_hostile_corpus_reads_the_same_twice_and_in_small_units(
    hostile: tuple[tuple[str, ...], dict[str, int]],
) -> None:
    inputs, _ = hostile
    once = documents(SourceConfig(inputs=inputs))
    again = documents(SourceConfig(inputs=inputs, unit_bytes=1_000))
    assert once[0].drop_columns("doc_id").equals(again[0].drop_columns("doc_id"))
    assert once[1].equals(again[1])
    assert once[2] == again[2]


def test_table_without_columns_is_an_error_that_names_them(tmp_path: Path) -> None:
    path = build_table_without_columns(tmp_path)
    columns = r"preprocess\.sources\.columns\.content, preprocess\.sources\.columns\.path"
    with pytest.raises(MissingColumnsError, match=f"body, label.*{columns}"):
        plan_units(SourceConfig(inputs=(str(path),)))


def test_document_carries_facts_scores_and_byte_offsets(tmp_path: Path) -> None:
    main = 'if __name__ == "__main__":\n    print(mean_of_squares([1]))\n'
    source = f"# Prüfung, ein Kommentar mit Umlauten\nimport os\n\n{GOOD}\n\n{main}"
    (tmp_path / "a.py").write_text(source, encoding="utf-8")
    kept, _, _ = documents(SourceConfig(inputs=(str(tmp_path),)))
    (row,) = kept.to_pylist()
    encoded = row["content"].encode()
    assert row["content"] == source
    assert row["doc_id"] == "shard-00000-0000000"
    assert (row["path"], row["source"]) == ("a.py", str(tmp_path))
    assert (row["repository"], row["stars"], row["licence"]) == (None, None, None)
    assert row["size_bytes"] == len(encoded)
    assert row["content_hash"] == xxhash.xxh3_128_digest(encoded)
    assert row["libraries"] == ["numpy", "os"]
    assert (row["ut_score"], row["func_score"]) == (0.0, 1.2)
    blocks = [(encoded[block["start"] : block["end"]].decode(), block["kind"]) for block in row["statements"]]
    assert [kind for _, kind in blocks] == ["import", "import", "code", "main"]
    assert blocks[2][0].lstrip().startswith("def mean_of_squares")
    assert blocks[3][0].strip() == main.strip()


def test_doc_id_does_not_depend_on_what_else_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "b.py").write_text(good_source(1))
    kept, _, _ = documents(SourceConfig(inputs=(str(tmp_path),)))
    assert kept.column("doc_id").to_pylist() == ["shard-00000-0000001"]


def test_batches_of_a_unit_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        (tmp_path / f"{number}.py").write_text(good_source(number) + "# ann@corp.com\n" * number)
    (tmp_path / "3_bad.py").write_text("x = 1\n")
    config = SourceConfig(inputs=(str(tmp_path),))
    (whole,) = units(config)
    monkeypatch.setattr("cert_ray.corpus.documents._BATCH_CHARS", 1)
    (single,) = units(config)
    assert single.documents.equals(whole.documents)
    assert single.drops.equals(whole.drops)
    assert single.redacted == whole.redacted == {"email": 10}


def test_secrets_are_redacted_before_facts_are_taken(tmp_path: Path) -> None:
    source = f'{GOOD}\n\nMAIL = "an-address-that-is-long@corp.com"\n\nif MAIL:\n    pass\n'
    (tmp_path / "a.py").write_text(source)
    config = SourceConfig(inputs=(str(tmp_path),))
    kept, _, _ = documents(config)
    (row,) = kept.to_pylist()
    expected = source.replace("an-address-that-is-long@corp.com", "redacted@example.com")
    assert row["content"] == expected
    assert row["content_hash"] == xxhash.xxh3_128_digest(expected.encode())
    assert row["statements"][-1]["end"] == len(expected.encode().rstrip())
    (kept_as_it_is,) = documents(config, secrets=None)[0].to_pylist()
    assert kept_as_it_is["content"] == source


def test_licences_are_judged_and_the_header_fills_the_column(tmp_path: Path) -> None:
    headers = {"a.py": "MIT", "b.py": "GPL-3.0-only", "c.py": None, "d.py": "Apache-2.0 OR GPL-3.0-only"}
    for number, (name, header) in enumerate(headers.items()):
        top = f"# SPDX-License-Identifier: {header}\n\n" if header else ""
        (tmp_path / name).write_text(top + good_source(number))
    config = SourceConfig(inputs=(str(tmp_path),))
    kept, dropped, _ = documents(config, licences=["mit", "Apache-2.0"])
    assert kept.column("licence").to_pylist() == ["MIT", "Apache-2.0 OR GPL-3.0-only"]
    assert "SPDX" not in kept.column("content")[0].as_py()  # the column keeps what cleaning takes away
    reasons = dict(zip(dropped.column("path").to_pylist(), dropped.column("reason").to_pylist(), strict=True))
    assert reasons == {"b.py": "licence_not_allowed", "c.py": "licence_unknown"}
    assert documents(config)[0].column("licence").to_pylist() == list(headers.values())
