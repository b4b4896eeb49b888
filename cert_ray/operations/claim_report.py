"""The measured claim for people and for machines. In: finished parts and trained models of a recipe. Out: scores with
intervals, paired comparisons with the smallest difference that could have been seen, cost; as JSON, Markdown, HTML and
a picture. Statistics are those of `evaluation.statistics`; nothing is run in here, and no clock is read.

Seeds are merged problem by problem: samples add up, so pass@1 is the mean over seeds. Intervals and tests are over
problems (`evaluation.statistics` says what they cover).
"""

from __future__ import annotations

import base64
import io
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import jinja2

from cert_ray import manifests, storage
from cert_ray.evaluation.report import percent, points, template_engine
from cert_ray.evaluation.statistics import Counts, compare, score_interval
from cert_ray.manifests import Manifest
from cert_ray.operations.claim import (
    SYSTEMS,
    Mode,
    Part,
    Trained,
    check_claim,
    model_name,
    parts,
    seeded,
    trained_models,
)
from cert_ray.operations.model_cards import write_card
from cert_ray.operations.recipe import Recipe, RunFolders
from cert_ray.operations.reproduce import PART_FILE, claim_folder, is_finished
from cert_ray.training import records
from cert_ray.training.model_card import Score, base_facts

POOLED = "pooled"
_PAIRS = (("base", "xl"), ("base", "cert"), ("xl", "cert"))
_K = (1, 10, 100)
_CARDS = (("xl", "xl", "model"), ("sketcher", "cert", "cascade"), ("generator", "cert", "cascade"))
_NAMES = {"base": "base", "xl": "XL", "cert": "CERT"}

Table = dict[tuple[Mode, str, str], dict[str, Counts]]  # mode, system, benchmark -> task_id -> counts


def missing_parts(recipe: Recipe) -> list[str]:
    """The names of parts that are not finished."""
    return [part.name for part in parts(check_claim(recipe)) if not is_finished(recipe, part)]


def write_report(recipe: Recipe) -> dict[str, Any]:
    """Write `claim.json`, `claim.md`, `claim.html` and `claim.png` into the claim's folder, and the scores into the
    models' cards; returns the JSON.

    Every part must be finished.
    """
    report: dict[str, Any] = json.loads(json.dumps(build_report(recipe)))  # exactly what the file holds, types included
    picture = draw_scores(report)
    folder = claim_folder(recipe)
    storage.write_text(storage.join(folder, "claim.json"), json.dumps(report, indent=1) + "\n")
    storage.write_text(storage.join(folder, "claim.md"), render(report, "claim.md.j2"))
    storage.write_bytes(storage.join(folder, "claim.png"), picture)
    encoded = base64.b64encode(picture).decode()
    storage.write_text(storage.join(folder, "claim.html"), render(report, "claim.html.j2", picture=encoded))
    wanted = seeded(recipe)
    for seed in check_claim(recipe).seeds:
        for name, system, shown_as in _CARDS:
            write_card(wanted, model_name(wanted, name, seed), card_scores(report, system, shown_as))
    return report


def card_scores(report: dict[str, Any], system: str, shown_as: str) -> list[Score]:
    """The scores of a system for its models' cards; pooled ones appear only in the report."""
    rows = [row for row in report["scores"] if row["system"] == system and row["benchmark"] != POOLED]
    keys = ("benchmark", "mode", "k", "value", "low", "high", "problems")
    return [Score(system=shown_as, **{key: row[key] for key in keys}) for row in rows]


def build_report(recipe: Recipe) -> dict[str, Any]:
    """Everything that the report says, ready for JSON."""
    claim = check_claim(recipe)
    table = read_counts(recipe)
    benchmarks = list(dict.fromkeys(part.benchmark_name for part in parts(claim)))
    modes: list[Mode] = ["greedy"] if claim.n is None else ["greedy", "sampled"]
    trained, told = _trained(recipe), _told(recipe)
    models = _models(recipe, trained)
    return {
        "libraries": list(recipe.libraries or ()),
        "base": _base(recipe),
        "seeds": list(claim.seeds),
        "sampling": {"n": claim.n, "temperature": claim.temperature, "top_p": claim.top_p, "tokens": claim.max_tokens},
        "dtype": claim.dtype,
        "benchmarks": benchmarks,
        "dataset": _dataset(recipe),
        "models": models,
        "scores": [row for mode in modes for row in _scores(table, mode, benchmarks)],
        "comparisons": [row for mode in modes for row in _comparisons(table, mode, benchmarks)],
        "cost": _cost(models, told),
        "machines": _machines(trained, told),
    }


def read_counts(recipe: Recipe) -> Table:
    """Samples and passes of every problem, merged over seeds."""
    table: Table = defaultdict(dict)
    for part in parts(check_claim(recipe)):
        counts = table[part.mode, part.system, part.benchmark_name]
        text = storage.read_text(storage.join(claim_folder(recipe), part.name, "results.jsonl"))
        for row in map(json.loads, text.splitlines()):
            drawn, passed = counts.get(row["task_id"], (0, 0))
            counts[row["task_id"]] = (drawn + row["num_samples"], passed + row["num_passed"])
    return table


def _scores(table: Table, mode: Mode, benchmarks: list[str]) -> list[dict[str, Any]]:
    rows = []
    for system in SYSTEMS:
        for benchmark in [*benchmarks, POOLED]:
            chosen = benchmarks if benchmark == POOLED else [benchmark]
            counts = [list(table[mode, system, name].values()) for name in chosen]
            flat = [one for problems in counts for one in problems]
            for k in (k for k in _K if k <= min(drawn for drawn, _ in flat)):
                interval = score_interval(counts, k)
                rows.append(
                    {
                        "mode": mode,
                        "system": system,
                        "benchmark": benchmark,
                        "k": k,
                        "problems": len(flat),
                        "samples": sum(drawn for drawn, _ in flat),
                        "passed": sum(passed for _, passed in flat),
                        "value": interval.value,
                        "low": interval.low,
                        "high": interval.high,
                    }
                )
    return rows


def _comparisons(table: Table, mode: Mode, benchmarks: list[str]) -> list[dict[str, Any]]:
    rows = []
    for first, second in _PAIRS:
        for benchmark in [*benchmarks, POOLED]:
            chosen = benchmarks if benchmark == POOLED else [benchmark]
            found = compare(
                [table[mode, first, name] for name in chosen], [table[mode, second, name] for name in chosen], 1
            )
            names = {"mode": mode, "pair": [first, second], "benchmark": benchmark}
            rows.append({**names, **asdict(found)})
    return rows


def _base(recipe: Recipe) -> dict[str, Any]:
    """What the models started from, named as on their cards; a dequantised base must be marked as such."""
    start = recipe.models["xl"].start
    known = base_facts(start if start not in recipe.models else RunFolders(recipe.run).model(start))
    return {"name": known["base"], "dequantised_from": known.get("dequantised_from")}


def _dataset(recipe: Recipe) -> dict[str, Any]:
    return manifests.files_counted(manifests.read_manifest(RunFolders(recipe.run).dataset, "dataset", "preprocess"))


def _trained(recipe: Recipe) -> dict[Trained, Manifest]:
    """The compared models, with their manifests."""
    folders = RunFolders(recipe.run)
    compared = trained_models(seeded(recipe))
    return {model: manifests.read_manifest(folders.model(model.name), "model", "train") for model in compared}


def _models(recipe: Recipe, compared: Mapping[Trained, Manifest]) -> list[dict[str, Any]]:
    """What each trained model learned from, and its losses in nats per token."""
    folders, rows = RunFolders(recipe.run), []
    for trained, manifest in compared.items():
        folder = folders.model(trained.name)
        steps = records.from_json_lines(storage.read_text(storage.join(folder, "loss.jsonl")), folder)
        before = [0, *(step.tokens for step in steps[:-1])]
        seconds = sum((step.tokens - past) / step.tokens_per_s for step, past in zip(steps, before, strict=True))
        keys = ("first_loss", "last_loss", "held_out_loss")
        rows.append(
            {
                "model": trained.kind,
                "seed": trained.seed,
                "parameters": manifest.counts["parameters"],
                "steps": len(steps),
                "tokens": manifest.counts["tokens"],
                "training_s": round(seconds, 1),
                **{key: manifest.notes[key] for key in keys},
            }
        )
    return rows


def _told(recipe: Recipe) -> dict[Part, dict[str, Any]]:
    """What each part's evaluation recorded about itself."""
    urls = {part: storage.join(claim_folder(recipe), part.name, PART_FILE) for part in parts(check_claim(recipe))}
    return {part: json.loads(storage.read_text(url)) for part, url in urls.items()}


def _cost(models: Sequence[dict[str, Any]], told: Mapping[Part, dict[str, Any]]) -> dict[str, Any]:
    """Wall seconds: of all training (`models` has each model's), and of answering and running per system and mode."""
    seconds: dict[str, dict[str, float]] = {}
    for part, noted in told.items():
        entry = seconds.setdefault(f"{part.system} {part.mode}", {"answering_s": 0.0, "total_s": 0.0})
        for key in entry:
            entry[key] = round(entry[key] + noted[key], 1)
    training = round(sum(row["training_s"] for row in models), 1)
    evaluating = round(sum(entry["total_s"] for entry in seconds.values()), 1)
    return {"training_s": training, "evaluating_s": evaluating, "parts": seconds}


def _machines(compared: Mapping[Trained, Manifest], told: Mapping[Part, dict[str, Any]]) -> dict[str, list[str]]:
    """Where the models were trained, where they answered, and where their programs ran, as far as it was noted."""
    notes = [manifest.notes for manifest in compared.values()]
    # Earlier versions recorded only the last machine of worker 0.
    trained_on = [machine for noted in notes for machine in noted.get("machines") or [noted.get("machine")]]
    answered_on = [machine for noted in told.values() for machine in noted.get("answered_on", ())]
    ran_on = [noted.get("ran_on") for noted in told.values()]
    found = {"training": trained_on, "answering": answered_on, "running": ran_on}
    return {what: sorted({machine for machine in machines if machine}) for what, machines in found.items()}


def draw_scores(report: dict[str, Any]) -> bytes:
    """A PNG of pass@1 with intervals: a panel for each mode, a group for each benchmark."""
    from matplotlib.figure import Figure

    modes = list(dict.fromkeys(row["mode"] for row in report["scores"]))
    groups = [*report["benchmarks"], POOLED]
    figure = Figure(figsize=(1 + 4 * len(modes), 3.6), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    for axes, mode in zip(panels, modes, strict=True):
        for place, system in enumerate(SYSTEMS):
            chosen = {row["benchmark"]: row for row in report["scores"] if _is(row, mode, system)}
            rows = [chosen[group] for group in groups]
            across = [index + 0.22 * (place - 1) for index in range(len(groups))]
            values = [row["value"] for row in rows]
            reach = [[row["value"] - row["low"] for row in rows], [row["high"] - row["value"] for row in rows]]
            axes.errorbar(across, values, yerr=reach, fmt="o", capsize=3, label=_NAMES[system])
        axes.set(title=mode, xticks=range(len(groups)), xticklabels=groups, ylim=(0, None))
        axes.grid(axis="y", alpha=0.3)
    panels[0].set(ylabel="pass@1, 95% interval")
    panels[-1].legend()
    sink = io.BytesIO()
    figure.savefig(sink, format="png", metadata={"Software": None})
    return sink.getvalue()


def _is(row: dict[str, Any], mode: str, system: str) -> bool:
    return bool((row["mode"], row["system"], row["k"]) == (mode, system, 1))


def render(report: dict[str, Any], template: str, **more: Any) -> str:
    """The report, rendered with one of the two templates."""
    loader = jinja2.PackageLoader("cert_ray.operations", "")
    environment = template_engine(loader, html=template.endswith(".html.j2"))
    environment.filters["percent"] = lambda value: "-" if value is None else percent(value)
    environment.filters["points"] = points
    return environment.get_template(template).render(report=report, names=_NAMES, **more)
