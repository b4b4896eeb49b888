"""Lines with fixed order and units, records that survive a round trip, a picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from cert_ray import manifests
from cert_ray.config import Config
from cert_ray.training import records
from cert_ray.training.records import (
    StepRecord,
    described,
    draw_losses,
    from_json_lines,
    progress_line,
    steps_by_machines,
    to_json_lines,
    write_losses,
)

FIRST = StepRecord(step=10, epoch=0, loss=6.5, learning_rate=5e-4, gradient_norm=None, tokens=20_000, tokens_per_s=1.5)
SECOND = StepRecord(
    step=20,
    epoch=1,
    loss=5.25,
    learning_rate=1e-4,
    gradient_norm=0.5,
    tokens=40_000,
    tokens_per_s=2.0,
    held_out_loss=5.5,
)


def test_the_line_has_fixed_order_and_units():
    assert progress_line(FIRST, 20, 4_000.0) == (
        "step 10/20  loss 6.5000 nats/token  lr 5.00e-04  gradient norm -  4,000 tokens/s  5 s left"
    )
    measured = FIRST.model_copy(update={"memory_bytes": 12_340_000_000})
    assert progress_line(measured, 20, 4_000.0, 0.4567).endswith("4,000 tokens/s  MFU 45.7%  12.3 GB  5 s left")
    assert progress_line(SECOND, 20, 0.0).endswith("0 tokens/s  0 s left  held-out loss 5.5000 nats/token")


def test_records_survive_the_file():
    assert from_json_lines(to_json_lines([FIRST, SECOND]), "loss.jsonl") == [FIRST, SECOND]


def test_gradients_that_overflowed_in_fp16_are_recorded():
    overflowed = StepRecord(**FIRST.model_dump() | {"gradient_norm": float("inf")})
    assert from_json_lines(to_json_lines([overflowed]), "loss.jsonl") == [FIRST]  # JSON knows no infinity


def test_machines_are_told_with_how_many_workers_and_the_steps_that_they_did():
    assert described(["B", "A", "B"]) == "A + 2 x B"
    first = steps_by_machines({}, "A", 40)
    second = steps_by_machines(first, "2 x B", 5)
    assert steps_by_machines(second, "A", 10) == {"A": 50, "2 x B": 5}
    assert steps_by_machines(second, "C", 0) == second == {"A": 40, "2 x B": 5}


def test_the_picture_is_a_png_and_the_same_each_time():
    picture = draw_losses([FIRST, SECOND], "tiny: base", unigram_nats=6.0)
    assert picture.startswith(b"\x89PNG")
    assert picture == draw_losses([FIRST, SECOND], "tiny: base", unigram_nats=6.0)


def _unwritable(monkeypatch, output):
    (output / "loss.png").mkdir()


def _undrawable(monkeypatch, output):
    def fails(*_):
        raise ValueError("no font")

    monkeypatch.setattr(records, "draw_losses", fails)


@pytest.mark.parametrize("spoil", [_unwritable, _undrawable])
def test_a_picture_that_fails_is_told_and_the_losses_stand(make_config, monkeypatch, caplog, spoil):
    config = make_config()
    Path(config.output).mkdir()
    spoil(monkeypatch, Path(config.output))
    write_losses(config, manifests.summarize("tokens", Config(), "0", []), [FIRST, SECOND])
    assert from_json_lines((Path(config.output) / "loss.jsonl").read_text(), "loss.jsonl") == [FIRST, SECOND]
    assert "model/loss.png is not written: " in caplog.text
