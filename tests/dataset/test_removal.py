"""A takedown: the text is gone everywhere, the counts add up, and a kill at any write changes nothing of the end."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cert_ray import manifests, storage
from cert_ray.corpus.removals import Removal, blank, read_removals, selected, write_removals
from cert_ray.dataset import removal
from cert_ray.dataset.on_ray import preprocess
from cert_ray.dataset.options import PreprocessConfig
from cert_ray.errors import ConfigError, InputError, ShardCorruptError
from cert_ray.operations.remove import preview, remove
from cert_ray.schemas import DOCUMENTS
from cert_ray.tokens.encoding import PackConfig, View
from cert_ray.tokens.pack import pack_in_process
from cert_ray.tokens.vocabulary import TokenizerConfig, train_on_dataset
from tests.dataset.builders import FILE, in_this_process

pytestmark = pytest.mark.slow

GONE = "Someone/Secret"
ASKED = Removal(repository=GONE.lower(), asked="2026-01-02", reason="request 17")
MARK = "zzq"  # stands in every file of the repository, and in copies of two of them


def source(index: int, mark: str) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [f"{mark}_{letters[index]}{letters[item]}{letters[item - index]}" for item in range(26)]
    names = "\n".join(f"value_{word} = make_{word}(other_{word}, {item})" for item, word in enumerate(words))
    return f"{FILE.format(index=index, library='polars')}\n\n{names}\n"


def row(index: int, repository: str | None, text: str) -> dict[str, Any]:
    return {
        "content": text,
        "max_stars_repo_path": f"src/file_{index:02d}.py",
        "max_stars_repo_name": repository,
        "max_stars_count": 100 if repository == GONE else index,
        "max_stars_repo_licenses": ["MIT"],
    }


@pytest.fixture(scope="module", autouse=True)
def _without_ray() -> Iterator[None]:
    with in_this_process():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreprocessConfig, Path]:
    """A run of four shards; the repository has files in two of them, and others hold a copy and a near copy of one."""
    folder = tmp_path_factory.mktemp("takedown")
    rows = [
        row(i, GONE if i in (1, 2, 7) else f"other/{i}", source(i, MARK if i in (1, 2, 7) else "everything_else"))
        for i in range(16)
    ]
    rows[13] = row(13, "other/copies", rows[2]["content"])
    rows[15] = row(15, "other/nearly", rows[7]["content"] + "\nlast_value = 1\n")
    rows[14] = row(14, None, rows[14]["content"])
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=4)
    options = PreprocessConfig.model_validate({"sources": {"inputs": [str(folder / "rows.parquet")], "unit_bytes": 1}})
    manifest = preprocess(options, str(folder / "run"), workers=2)
    assert (manifest.rows_kept, manifest.dropped) == (14, {"exact_duplicate": 1, "near_duplicate": 1})
    assert len(manifest.shards) == 4
    return options, folder / "run"


@pytest.fixture
def run(finished: tuple[PreprocessConfig, Path], tmp_path: Path) -> Path:
    shutil.copytree(finished[1], tmp_path / "run")
    return tmp_path / "run"


def contents(run: Path) -> dict[str, bytes]:
    """Every file below `run` by its name."""
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def texts(run: Path) -> Iterator[tuple[str, str]]:
    """All that a reader finds below `run`: cells of tables, and text files."""
    for path in run.rglob("*"):
        if path.suffix == ".parquet":
            yield str(path), json.dumps(pq.read_table(path).to_pylist(), default=repr)
        elif path.is_file() and path.suffix != ".u16":
            yield str(path), path.read_text(errors="replace")


def holders(run: Path) -> set[str]:
    """The files below `run` that hold text of the repository; the copies in one shard are other repositories' own."""
    found = {str(Path(name).relative_to(run)) for name, text in texts(run) if MARK in text}
    copies = run / "documents" / "shard-00003.parquet"
    if copies.exists():
        rows = pq.read_table(copies).to_pylist()
        assert {r["repository"] for r in rows if MARK in (r["content"] or "")} <= {"other/copies", "other/nearly"}
    return found - {"documents/shard-00003.parquet"}


def test_text_is_gone_and_everything_else_stays(run: Path) -> None:
    before = contents(run)
    assert {"documents/shard-00000.parquet", "dataset/shard-00001.parquet", "dataset/card/card.html"} <= holders(run)
    done = remove(str(run), ASKED)
    assert holders(run) == set()
    manifest = manifests.read_manifest(str(run / "dataset"), "dataset", "preprocess")
    assert (manifest.rows_read, manifest.rows_kept) == (16, 11)
    assert manifest.dropped == {"exact_duplicate": 1, "near_duplicate": 1, "removed_on_request": 3}
    for stage in ("documents", "dataset"):
        for file in manifests.read_manifest(str(run / stage), stage, "preprocess").files:
            manifests.check_file(str(run / stage), file, "preprocess")
    rows = [r for shard in sorted((run / "dataset").glob("*.parquet")) for r in pq.read_table(shard).to_pylist()]
    assert len(rows) == 11
    assert manifest.counts["content_bytes"] == sum(r["size_bytes"] for r in rows)
    drops = [r for p in (run / "dataset" / "drops").iterdir() for r in pq.read_table(p).to_pylist()]
    assert Counter(r["reason"] for r in drops) == manifest.dropped
    assert "removed on request" in (run / "dataset" / "card" / "card.html").read_text()
    after = contents(run)
    untouched = [name for name in before if "shard-00002" in name or "shard-00003" in name or name.startswith("dedup")]
    assert len(untouched) > 10
    assert {name: after[name] for name in untouched} == {name: before[name] for name in untouched}
    (recorded,) = read_removals(str(run))
    assert recorded == done
    assert (recorded.asked, recorded.reason, recorded.finished) == ("2026-01-02", "request 17", True)
    rewritten = {file.file: file for file in recorded.files}
    assert {name: file.rows for name, file in rewritten.items()} == {
        "documents/shard-00000.parquet": 2, "documents/shard-00001.parquet": 1,
        "dataset/shard-00000.parquet": 2, "dataset/shard-00001.parquet": 1,
    }  # fmt: skip
    for name, file in rewritten.items():
        assert file.after == storage.checksum(str(run / name)).checksum != file.before
    assert MARK not in (run / "removals.jsonl").read_text()


def test_asked_again_nothing_changes(run: Path) -> None:
    first = remove(str(run), ASKED)
    before = contents(run)
    assert remove(str(run), Removal(repository=GONE.upper(), asked="2027-01-01")) == first
    assert contents(run) == before


class Killed(BaseException):
    """Stands for the process's death: nothing catches it."""


def test_killed_at_any_write_and_run_again_it_ends_the_same(
    finished: tuple[PreprocessConfig, Path], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One file for the card's nine: its pictures take a second, and there are two dozen kills.
    monkeypatch.setattr(removal, "write_card", lambda folder, _: storage.write_text(f"{folder}/card/card.html", "card"))
    remove(str(run), ASKED)
    wanted = {name: content for name, content in contents(run).items() if "/card/" not in name}
    real_write, kills = storage.write_bytes, 0
    while True:
        again = tmp_path / f"killed-{kills}"
        shutil.copytree(finished[1], again)
        left = kills

        def write_or_die(url: str, payload: Any) -> storage.Written:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return real_write(url, payload)

        monkeypatch.setattr(storage, "write_bytes", write_or_die)
        try:
            remove(str(again), ASKED)
            break
        except Killed:
            kills += 1
        finally:
            monkeypatch.setattr(storage, "write_bytes", real_write)
        (again / "dataset" / ".shard-00000.parquet.x1y2.partial").write_text(MARK)  # what a killed write leaves
        remove(str(again), ASKED)
        ended = {name: content for name, content in contents(again).items() if "/card/" not in name}
        assert ended == wanted, f"killed at write {kills - 1}"
        shutil.rmtree(again)
    assert kills == 2 + 2 * 2 + 2 * 4 + 1 + 2  # record twice, documents, dataset, card, manifests


def test_preprocessing_finishes_an_interrupted_removal_and_never_brings_it_back(
    finished: tuple[PreprocessConfig, Path], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = finished[0]
    real_write, left = storage.write_bytes, 3

    def write_or_die(url: str, payload: Any) -> storage.Written:
        nonlocal left
        left -= 1
        if not left:
            raise Killed
        return real_write(url, payload)

    monkeypatch.setattr(storage, "write_bytes", write_or_die)
    with pytest.raises(Killed):
        remove(str(run), ASKED)
    monkeypatch.setattr(storage, "write_bytes", real_write)
    finished_by_it = preprocess(options, str(run))
    assert finished_by_it.dropped["removed_on_request"] == 3
    assert holders(run) == set()
    assert not read_removals(str(run))[0].finished
    assert remove(str(run), ASKED).finished

    before = contents(run)
    assert preprocess(options, str(run)) == finished_by_it
    assert contents(run) == before
    for change in ({"sketch_kind": "names"}, {"cleaning": {"min_lines": 6}}):
        other = preprocess(PreprocessConfig.model_validate({**options.model_dump(), **change}), str(run))
        assert other.rows_kept == 11
        assert other.dropped["removed_on_request"] == 3
        assert holders(run) == set()


@pytest.mark.parametrize(
    "damaged",
    [
        ["dataset/shard-00000.parquet"],
        ["documents/shard-00000.parquet", "dataset/shard-00001.parquet"],
        [
            "dedup/keys/shard-00001.parquet",
            "dedup/signatures/shard-00000.parquet",
            "dedup/clusters/shard-00003.parquet",
        ],
        ["documents", "dedup", "dataset"],
    ],
)
def test_what_is_rebuilt_after_a_removal_equals_what_was_there(
    finished: tuple[PreprocessConfig, Path], run: Path, damaged: list[str]
) -> None:
    """Copies of a removed file stay out, near ones too, though nothing in the run holds its text any more."""
    remove(str(run), ASKED)
    before = contents(run)
    for name in damaged:
        if (run / name).is_dir():
            shutil.rmtree(run / name)
        else:
            (run / name).write_bytes((run / name).read_bytes()[:-9])
    (run / "dataset" / "manifest.json").unlink(missing_ok=True)  # a finished dataset reads no intermediates
    manifest = preprocess(finished[0], str(run))
    assert manifest.dropped == {"exact_duplicate": 1, "near_duplicate": 1, "removed_on_request": 3}
    assert holders(run) == set()
    after = contents(run)
    assert [name for name in {*before, *after} if before.get(name) != after.get(name)] == []


def test_a_near_copy_that_is_appended_after_a_removal_does_not_come_in(
    finished: tuple[PreprocessConfig, Path], run: Path, tmp_path: Path
) -> None:
    remove(str(run), ASKED)
    preprocess(finished[0], str(run), intermediates="remove")
    rows = [row(16, "late/copy", source(1, MARK) + "\nlast_value = 2\n"), row(17, "late/own", source(17, "other"))]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "late.parquet")
    options = PreprocessConfig.model_validate(
        {**finished[0].model_dump(), "appended": [[str(tmp_path / "late.parquet")]]}
    )
    manifest = preprocess(options, str(run))
    assert manifest.dropped == {"exact_duplicate": 1, "near_duplicate": 2, "removed_on_request": 3}
    assert (manifest.rows_read, manifest.rows_kept) == (18, 12)


def test_a_folder_whose_reports_do_not_tell_of_a_takedown_is_gone_on_from(
    finished: tuple[PreprocessConfig, Path], tmp_path: Path
) -> None:
    """As earlier versions left them: shards that were made after the request have no `stands_for`."""
    run = tmp_path / "run"
    write_removals(str(run), [ASKED])
    wanted = preprocess(finished[0], str(run))
    documents = run / "documents"
    noted = [path for path in documents.rglob("*.json") if '"stands_for":"' in path.read_text().replace(": ", ":")]
    assert {path.name for path in noted} == {"manifest.json", "shard-00000.json", "shard-00001.json"}
    for path in noted:
        path.write_text(re.sub(r'("stands_for": ?)"\w+"', r"\1null", path.read_text()))
    (run / "dataset" / "manifest.json").unlink()
    again = preprocess(finished[0], str(run))
    assert (again.rows_read, again.rows_kept, again.dropped) == (wanted.rows_read, wanted.rows_kept, wanted.dropped)
    (run / "removals.jsonl").unlink()
    shutil.rmtree(run / "dedup")
    (run / "dataset" / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"removals\.jsonl back"):
        preprocess(finished[0], str(run))


def test_intermediates_that_were_deleted_are_not_missed(
    finished: tuple[PreprocessConfig, Path], run: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "whole")
    preprocess(finished[0], str(run), intermediates="remove")
    remove(str(run), ASKED)
    remove(str(tmp_path / "whole"), ASKED)
    for folder in (run, tmp_path / "whole"):
        assert holders(folder) == set()
    whole = contents(tmp_path / "whole")
    assert {n: c for n, c in contents(run).items() if n.startswith("dataset/")} == {
        n: c for n, c in whole.items() if n.startswith("dataset/")
    }


def test_packed_tokens_are_made_again_for_the_shards_that_changed(run: Path) -> None:
    dataset, tokenizer, tokens = str(run / "dataset"), str(run / "tokenizer"), run / "tokens" / "base"
    train_on_dataset(dataset, tokenizer, TokenizerConfig(vocab_size=400), seed=0)
    options = PackConfig(view=View.BASE)
    first = pack_in_process(dataset, tokenizer, str(tokens), options)
    untouched = {path.name: path.stat().st_mtime_ns for path in tokens.glob("shard-00003*")}
    remove(str(run), ASKED)
    assert not list(tokens.glob("shard-00000*"))
    assert not manifests.is_finished(str(tokens))
    again = pack_in_process(dataset, tokenizer, str(tokens), options)
    assert (first.rows_kept, again.rows_kept) == (14, 11)
    assert first.notes["dataset_digest"] != again.notes["dataset_digest"]
    assert {path.name: path.stat().st_mtime_ns for path in tokens.glob("shard-00003*")} == untouched
    packed = contents(tokens)
    remove(str(run), ASKED)
    assert contents(tokens) == packed


@pytest.mark.parametrize(
    ("selector", "rows"),
    [
        ({"path_prefix": "src/file_0"}, 10),
        ({"path_prefix": "src/", "repository": "other/3"}, 1),
        ({"source": "nowhere"}, 0),
        ({"repository": "someone/secre"}, 0),
    ],
)
def test_files_are_selected_by_all_that_is_given(run: Path, selector: dict[str, str], rows: int) -> None:
    wanted = Removal.from_mapping({**selector, "asked": "2026-01-02"}, "test")
    assert sum(file.rows for file in preview(str(run), wanted) if file.file.startswith("dataset/")) == rows
    before = contents(run)
    if not rows:
        with pytest.raises(InputError, match=r"holds no file of (source|repository) .*--keep-out"):
            remove(str(run), wanted)
        assert contents(run) == before
        remove(str(run), wanted, keep_out=True)
        assert len(read_removals(str(run))) == 1
    else:
        remove(str(run), wanted)
        manifest = manifests.read_manifest(str(run / "dataset"), "dataset", "preprocess")
        assert manifest.dropped["removed_on_request"] == rows


def test_two_removals_in_one_shard_add_up_whatever_their_order_and_paths(
    finished: tuple[PreprocessConfig, Path], tmp_path: Path
) -> None:
    """Files of several repositories have one path, as in a table of whole repositories they often do."""
    rows = [{**row(i, f"other/{i}", source(i, "own")), "max_stars_repo_path": "src/main.py"} for i in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    options = PreprocessConfig.model_validate({"sources": {"inputs": [str(tmp_path / "rows.parquet")]}})
    run = tmp_path / "run"
    preprocess(options, str(run))
    for repository in ("other/2", "other/1"):
        remove(str(run), Removal(repository=repository, asked="2026-01-02"))
    before = contents(run)
    (run / "dataset" / "shard-00000.parquet").write_bytes(b"")
    assert preprocess(options, str(run)).dropped == {"removed_on_request": 2}
    assert contents(run) == before


def test_two_removals_add_up(run: Path) -> None:
    remove(str(run), ASKED)
    remove(str(run), Removal(repository="other/0", asked="2026-01-03"))
    manifest = manifests.read_manifest(str(run / "dataset"), "dataset", "preprocess")
    assert manifest.dropped == {"exact_duplicate": 1, "near_duplicate": 1, "removed_on_request": 4}
    assert [(one.asked, one.finished) for one in read_removals(str(run))] == [
        ("2026-01-02", True),
        ("2026-01-03", True),
    ]


def test_a_damaged_shard_is_not_taken_for_an_interrupted_removal(run: Path) -> None:
    path = run / "dataset" / "drops" / "shard-00000.parquet"
    path.write_bytes(path.read_bytes()[:-5] + b"wrong")
    with pytest.raises(ShardCorruptError, match=r"drops/shard-00000\.parquet.*preprocess"):
        remove(str(run), ASKED)


def test_what_cannot_be_asked_for(run: Path, tmp_path: Path) -> None:
    for options in ({"asked": "2026-01-02"}, {"repository": "", "asked": "2026-01-02"}):
        with pytest.raises(ConfigError, match="repository, source, path_prefix"):
            Removal.from_mapping(options, "remove")
    with pytest.raises(ConfigError, match="asked"):
        Removal.from_mapping({"repository": "a/b", "asked": "today"}, "remove")
    with pytest.raises(InputError, match="no run"):
        remove(str(tmp_path), ASKED)
    (run / "removals.jsonl").write_text('{"repo": "a/b"}\n')
    with pytest.raises(InputError, match=r"removals\.jsonl: not a list of removals"):
        remove(str(run), ASKED)


def test_rows_without_a_repository_are_left_alone() -> None:
    table = pa.table({name: pa.nulls(2, DOCUMENTS.field(name).type) for name in DOCUMENTS.names}, schema=DOCUMENTS)
    assert selected(table, [ASKED]).to_pylist() == [False, False]
    assert blank(table, []) is table
    assert selected(table.slice(0, 0), [ASKED]).to_pylist() == []
