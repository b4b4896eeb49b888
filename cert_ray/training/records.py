"""What a run reports about itself: one record per step, as a log line, as JSON Lines, and as a picture.

In: numbers of a step, and the machines that trained it. Out: text with fixed order and units; `loss.jsonl`, `loss.png`.
Losses are means in nats per predicted token.
"""

from __future__ import annotations

import io
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence

from cert_ray import storage
from cert_ray.config import Config
from cert_ray.manifests import Manifest
from cert_ray.training.config import TrainConfig

_log = logging.getLogger(__name__)

METRICS_NAME, PICTURE_NAME = "loss.jsonl", "loss.png"  # below a run's output


class StepRecord(Config, allow_inf_nan=True):  # measured, not chosen: in fp16 a step's gradients may overflow
    """One step: what it was trained on, and how well that was predicted before the update."""

    step: int  # steps done, so the first is 1
    epoch: int  # of the step's first row, from 0
    loss: float
    learning_rate: float
    gradient_norm: float | None
    tokens: int  # predicted so far, without padding
    tokens_per_s: float  # of this step
    held_out_loss: float | None = None  # measured after this step
    mfu: float | None = None  # of this step, as `utilization` defines it; None if the device's peak is not known
    memory_bytes: int | None = None  # of worker 0: peak allocated on its GPU, or resident if it has none


def progress_line(record: StepRecord, steps: int, tokens_per_s: float, mfu: float | None = None) -> str:
    """The line for the log; `tokens_per_s` and `mfu` are means since the previous line."""
    remaining_s = (steps - record.step) * (record.tokens / record.step) / tokens_per_s if tokens_per_s else 0.0
    norm = "-" if record.gradient_norm is None else f"{record.gradient_norm:.2f}"
    line = (
        f"step {record.step}/{steps}  loss {record.loss:.4f} nats/token  lr {record.learning_rate:.2e}  "
        f"gradient norm {norm}  {tokens_per_s:,.0f} tokens/s  "
    )
    if mfu is not None:
        line += f"MFU {mfu:.1%}  "
    if record.memory_bytes is not None:
        line += f"{record.memory_bytes / 1e9:.1f} GB  "
    line += f"{remaining_s:,.0f} s left"
    return line if record.held_out_loss is None else f"{line}  held-out loss {record.held_out_loss:.4f} nats/token"


def to_json_lines(records: Sequence[StepRecord]) -> str:
    """One line with a JSON object per step."""
    return "".join(record.model_dump_json() + "\n" for record in records)


def from_json_lines(text: str, where: str) -> list[StepRecord]:
    """The records of `to_json_lines`."""
    return [StepRecord.from_mapping(json.loads(line), where) for line in text.splitlines()]


def described(machines: Sequence[str]) -> str:
    """The machines of all workers, given one entry per worker, as text: `2 x A + B`."""
    return " + ".join(f"{count} x {name}" if count > 1 else name for name, count in sorted(Counter(machines).items()))


def steps_by_machines(earlier: Mapping[str, int], now: str, steps: int) -> dict[str, int]:
    """How many steps each set of machines did: `earlier`, plus `steps` by the machines that `now` describes."""
    total = Counter(earlier)
    total[now] += steps
    return {machines: count for machines, count in total.items() if count}


def write_losses(config: TrainConfig, pack: Manifest, records: Sequence[StepRecord]) -> None:
    """Write `records` below the output of `config`, as JSON Lines and as a picture.

    A picture must not cost a run: if it cannot be drawn or written, a warning says so.
    """
    storage.write_text(storage.join(config.output, METRICS_NAME), to_json_lines(records))
    title = f"{config.base if '/' not in config.base else storage.name_of(config.base)}: {pack.config.get('view')}"
    picture = storage.join(config.output, PICTURE_NAME)
    try:
        drawn = draw_losses(records, title, pack.notes.get("held_out_unigram_entropy_nats"))
        storage.write_bytes(picture, drawn)
    except Exception as error:  # noqa: BLE001 - whatever matplotlib or a store raises
        _log.warning("%s is not written: %s", picture, error)


def draw_losses(records: Sequence[StepRecord], title: str, unigram_nats: float | None = None) -> bytes:
    """A PNG of the losses over tokens; `unigram_nats`, the entropy of single tokens, is drawn as the mark to beat."""
    from matplotlib.figure import Figure  # takes one second to import

    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.plot([record.tokens for record in records], [record.loss for record in records], lw=1, label="training")
    held_out = [(record.tokens, record.held_out_loss) for record in records if record.held_out_loss is not None]
    axes.plot([tokens for tokens, _ in held_out], [loss for _, loss in held_out], "o-", ms=4, label="held out")
    if unigram_nats is not None:
        axes.axhline(unigram_nats, ls="--", lw=1, color="grey", label="unigram entropy (held out)")
    axes.set(xlabel="tokens", ylabel="nats per token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    sink = io.BytesIO()
    figure.savefig(sink, format="png", metadata={"Software": None})
    return sink.getvalue()
