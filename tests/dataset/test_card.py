"""The card: figures that add up, nothing fetched, examples marked on both sides, the same bytes each time."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cert_ray import manifests, storage
from cert_ray.dataset.card import STEPS, funnel, write_card
from cert_ray.dataset.options import PreprocessConfig
from cert_ray.dataset.pairs import blocks_of
from cert_ray.dataset.statistics import ClusterSample, shard_statistics, write_statistics
from cert_ray.manifests import Manifest, ShardReport
from cert_ray.schemas import DropReason
from cert_ray.sketching.anonymize import SketchKind
from tests.dataset.builders import FILE, annotated_rows


def make_dataset(folder: Path, contents: list[str], dropped: dict[str, int], counts: dict[str, int]) -> Manifest:
    rows = annotated_rows(contents)
    storage.write_parquet(rows, str(folder / "shard-00000.parquet"))
    sample = ClusterSample(survivor=0, size=7, kept="kept.py", copies=("<script>.py", "copy.py"))
    write_statistics(str(folder), "shard-00000", shard_statistics(rows, (sample,)))
    report = ShardReport(
        shard="shard-00000", unit_digest="", files=(), rows_read=len(rows) + sum(dropped.values()),
        rows_kept=len(rows), dropped=dropped, counts=counts,
    )  # fmt: skip
    config = PreprocessConfig.model_validate({"sources": {"inputs": ["corpus"]}})
    return manifests.summarize(
        "dataset", config, "digest", [report], notes={"recall": {"value": 0.97}, "parts": [1, 2]}
    )


class _Links(HTMLParser):
    """Everything that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.marks = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.marks += tag == "mark"
        if tag in {"script", "link", "iframe", "object", "embed"}:
            self.fetched.append(tag)
        for name, value in attrs:
            if name in {"src", "href", "xlink:href", "data"} and not (value or "").startswith("#"):
                self.fetched.append(value or "")


def test_every_reason_that_preprocessing_gives_belongs_to_one_step() -> None:
    named = [reason for reasons in STEPS.values() for reason in reasons]
    assert len(named) == len(set(named))
    assert set(DropReason) - {DropReason.OTHER_LIBRARY} <= set(named)


def test_funnel_goes_from_read_to_kept_whatever_the_reasons(tmp_path: Path) -> None:
    dropped = {"near_duplicate": 5, "empty": 2, "unreadable": 1, "of_a_later_version": 4}
    manifest = make_dataset(tmp_path, [FILE.format(index=1, library="x")], dropped, {})
    steps = [(step.name, step.left, step.dropped) for step in funnel(manifest)]
    assert steps == [("files", 13, 0), ("read", 8, 5), ("clean", 6, 2), ("not a near copy", 1, 5)]


def test_card_is_whole_without_a_network_and_the_same_each_time(tmp_path: Path) -> None:
    contents = [FILE.format(index=index, library="polars") for index in range(6)]
    counts = {"content_bytes": 1_234_567, "placeholders": 9, "redacted_email": 41}
    manifest = make_dataset(tmp_path, contents, {"empty": 3}, counts)
    write_card(str(tmp_path), manifest)
    html = (tmp_path / "card" / "card.html").read_text()
    links = _Links()
    links.feed(html)
    assert links.fetched == []
    assert "&lt;script&gt;.py" in html
    assert links.marks >= 2 * 5 * 4  # five examples, both sides, more than three placeholders each
    assert html.count('<details class="example"') == 5
    markdown = (tmp_path / "card" / "card.md").read_text()
    for text in (html, markdown):
        for figure in ("1.2 MB", "secrets redacted: email", "41", "recall: value", "0.97", "copy.py", "6 (66.7%)"):
            assert figure in text
    pictures = re.findall(r"\]\((\w+\.svg)\)", markdown)
    assert len(pictures) == html.count("<figure") == 7
    before = {path.name: path.read_bytes() for path in (tmp_path / "card").iterdir()}
    assert set(pictures) <= set(before)
    write_card(str(tmp_path), manifest)
    assert {path.name: path.read_bytes() for path in (tmp_path / "card").iterdir()} == before


def test_card_of_an_empty_dataset(tmp_path: Path) -> None:
    write_card(str(tmp_path), make_dataset(tmp_path, [], {}, {}))
    assert "0 (0.0%)" in (tmp_path / "card" / "card.html").read_text()


@pytest.mark.parametrize("kind", [SketchKind.CONSTANTS, SketchKind.BOTH])
def test_blocks_hold_everything_but_blank_lines_and_mark_what_was_replaced(kind: SketchKind) -> None:
    (row,) = annotated_rows(["é = 'ü'\n\n\ndef f():\n    return 3\n"]).to_pylist()
    segments = [
        {"code_start": 0, "code_end": 10, "sketch_start": 0, "sketch_end": 12},
        {"code_start": 12, "code_end": 33, "sketch_start": 14, "sketch_end": 41},
    ]
    first, second = blocks_of({**row, "segments": segments}, kind)
    assert [(piece.text, piece.kind) for piece in first.sketch] == [("é = ", None), ("string", "string")]
    code = [(piece.text, piece.kind) for piece in (*first.code, *second.code)]
    if kind is SketchKind.CONSTANTS:
        assert code == [
            ("é = ", None), ("'ü'", "string"),
            ("def ", None), ("f", "func"), ("():\n    return ", None), ("3", "number"),
        ]  # fmt: skip
    else:  # not what the row was sketched as: nothing is marked rather than something wrong
        assert code == [("é = 'ü'", None), ("def f():\n    return 3", None)]
