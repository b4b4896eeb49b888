"""Models of one view at equal tokens, side by side. In: folders of finished models. Out: `compared.md`, `compared.png`.

The models must have learned from one pack, as many rows of it in the same order; then their held-out losses are of the
same text and can be compared. Losses are in nats per token. Nothing is trained in here.

    python -m tests.bench.compare_models RUN/models/pycodegpt RUN/models/modern --output results
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from cert_ray import manifests
from cert_ray.manifests import Manifest
from cert_ray.training.config import TrainConfig
from cert_ray.training.inputs import STAGE, VERB
from cert_ray.training.records import METRICS_NAME, StepRecord, from_json_lines


def check_comparable(trained: dict[str, Manifest]) -> None:
    """Raise `ValueError` unless all read the same rows, and as many."""
    seen = {}
    for name, manifest in trained.items():
        config = TrainConfig.model_validate(manifest.config)
        seen[name] = (config.tokens, config.steps, config.rows_per_step, config.seed, config.resampling)
    if len(set(seen.values())) > 1:
        raise ValueError(f"these learned from other packs or rows, so they cannot be compared: {seen}")


def table(trained: dict[str, Manifest], losses: dict[str, list[StepRecord]]) -> str:
    """Markdown: held-out losses by tokens, one column a model, with parameters and speed below."""
    names = list(trained)
    rows = [["tokens", *names]]
    rows += [
        [f"{together[0].tokens:,}", *(f"{step.held_out_loss:.3f}" for step in together)]
        for together in zip(*losses.values(), strict=True)
        if all(step.held_out_loss is not None for step in together)
    ]
    rows.append(["parameters", *(f"{trained[name].counts['parameters']:,}" for name in names)])
    rows.append(["seconds of training", *(f"{_seconds(losses[name]):,.0f}" for name in names)])
    rows.append(["machines", *(", ".join(trained[name].notes["machines"]) for name in names)])
    rows.insert(1, ["---"] * len(rows[0]))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _seconds(steps: list[StepRecord]) -> float:
    before = [0, *(step.tokens for step in steps[:-1])]
    return sum((step.tokens - past) / step.tokens_per_s for step, past in zip(steps, before, strict=True))


def draw(losses: dict[str, list[StepRecord]], target: Path) -> None:
    """Training losses thin, held-out losses thick, over tokens."""
    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for colour, (name, steps) in enumerate(losses.items()):
        held_out = [(step.tokens, step.held_out_loss) for step in steps if step.held_out_loss is not None]
        axes.plot([step.tokens for step in steps], [step.loss for step in steps], f"C{colour}", lw=0.6, alpha=0.5)
        axes.plot(*zip(*held_out, strict=True), f"C{colour}o-", ms=4, label=f"{name}, held out")
    axes.set(xlabel="tokens", ylabel="nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(target, metadata={"Software": None})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="+", type=Path, help="folders of finished models")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    trained = {folder.name: manifests.read_manifest(str(folder), STAGE, VERB) for folder in given.models}
    check_comparable(trained)
    texts = {folder.name: (folder / METRICS_NAME).read_text() for folder in given.models}
    losses = {name: from_json_lines(text, name) for name, text in texts.items()}
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "compared.md").write_text(table(trained, losses))
    draw(losses, given.output / "compared.png")
    print((given.output / "compared.md").read_text())


if __name__ == "__main__":
    main()
