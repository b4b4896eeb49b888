"""The dashboards with real data: every stage run small on a head of its own, scraped by a real Prometheus.

    python -m tests.dashboards.scrape --output DIR

In: the Python files of this machine, as `cert-ray demo` takes them. Out, below DIR: the run; `panels.md`, what every
query of every dashboard returned; one picture per dashboard, drawn from the samples. The exit status is 1 when a
panel that should show something is empty. Stages are submitted as jobs, since a counter that goes with its process must
have been scraped before. Wants `prometheus` on PATH; takes minutes, so it is no part of the suite.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from cert_ray.operations.demo import DemoConfig, demo_recipe
from cert_ray.telemetry.metrics import CATALOGUE
from tests.dashboards.draw import draw_dashboard
from tests.dashboards.test_dashboards import BUILDER
from tests.ray_heads import ROOT, Head, free_port, started_head, stop, submit

SCRAPE_EVERY_S = 5  # Ray's own file for Prometheus says 10
STEP_S = 5
INPUT_BYTES = 120_000_000
CLIENTS, ASKED_S = 4, 150
ANSWERS = "answers.json"
_PROMPTS = ("import numpy as np\n\ndef mean(values):\n    return ", "import pandas as pd\n\nframe = pd.", "x = ")
# What this run cannot show: no GPU here; MFU wants one, and no peak of a CPU is assumed.
EMPTY_HERE = {"ray_node_gpus_utilization": "no GPU", "ray_cert_ray_train_mfu": "MFU is of a GPU's peak"}


@dataclass(frozen=True, slots=True)
class Answered:
    """What Prometheus gave for one query: every series' labels, and its samples (seconds, value)."""

    dashboard: str
    panel: str
    unit: str
    from_zero: bool
    legend: str
    expression: str
    series: tuple[tuple[Mapping[str, str], tuple[tuple[float, float], ...]], ...]

    @property
    def why_empty(self) -> str | None:
        """Why nothing was to be expected; None where something was."""
        return next((why for name, why in EMPTY_HERE.items() if name in self.expression), None)


class Prometheus:
    """A running Prometheus, asked over HTTP."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=30)

    def ready(self) -> bool:
        """Whether it answers."""
        try:
            return self._client.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def query_range(self, expression: str, begins_s: float, ends_s: float) -> list[dict[str, Any]]:
        """Every series of `expression` between two times."""
        given = {"query": expression, "start": begins_s, "end": ends_s, "step": STEP_S}
        answer = self._client.get("/api/v1/query_range", params=given).json()
        assert answer["status"] == "success", answer
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def names(self) -> set[str]:
        """Every series' name."""
        return set(self._client.get("/api/v1/label/__name__/values").json()["data"])


@contextmanager
def started_prometheus(folder: Path, discovery: Path) -> Iterator[Prometheus]:
    """A Prometheus that scrapes what Ray lists in `discovery`, as an operator sets it up."""
    found = shutil.which("prometheus")
    if found is None:
        raise SystemExit("prometheus is missing: apt-get install prometheus")
    jobs = [{"job_name": "ray", "file_sd_configs": [{"files": [str(discovery)], "refresh_interval": "5s"}]}]
    settings = {"global": {"scrape_interval": f"{SCRAPE_EVERY_S}s"}, "scrape_configs": jobs}
    settings["rule_files"] = [str(BUILDER.FOLDER / "alerts.yaml")]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(settings))
    port = free_port()
    command = [found, f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/prometheus"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    prometheus = Prometheus(f"http://127.0.0.1:{port}")
    try:
        while not prometheus.ready():
            if process.poll() is not None:
                raise SystemExit((folder / "prometheus.log").read_text())
            time.sleep(0.2)
        yield prometheus
    finally:
        stop(process)


def run_stages(head: Head, output: Path) -> None:
    """Preprocessing, tokenizer, packing and training as jobs, then serving under requests, then an evaluation."""
    options = {"max_input_bytes": INPUT_BYTES, "base_steps": 80, "library_steps": 20}
    recipe = demo_recipe(DemoConfig.from_mapping({**options, "output": str(output / "run")}, "scrape"))
    # One worker: a rate wants a counter to be scraped twice while it grows, and Ray exports every ten seconds.
    recipe = recipe.model_copy(update={"workers": 1})
    written = output / "recipe.yaml"
    written.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    for stage in ("preprocess", "tokenizer", "pack", "train"):
        began_s = time.monotonic()
        done = submit(head, str(ROOT / "jobs" / f"{stage}.py"), str(written), timeout_s=1_200)
        (output / f"{stage}.log").write_text(done.stdout + done.stderr)
        if done.returncode:
            raise SystemExit(f"{stage} failed: see {output / f'{stage}.log'}")
        say(f"{stage}: {time.monotonic() - began_s:.0f} s")
    models = [f"--{name}={output}/run/models/{name}" for name in ("sketcher", "generator")]
    _serve(head, models, output)
    problems = ROOT / "cert_ray" / "operations" / "demo_problems.jsonl"
    arguments = ["evaluate", f"--problems={problems}", *models, "--n=400", "--max-tokens=32", "--on-ray"]
    cert_ray(head, output / "evaluate.log", *arguments, f"--output={output}/evaluation").wait(600)
    time.sleep(3 * SCRAPE_EVERY_S)  # the last counts are scraped


def cert_ray(head: Head, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """`cert-ray` on the head's cluster."""
    with log.open("wb") as stream:
        command = [str(Path(sys.executable).parent / "cert-ray"), *arguments, f"--address={head.gcs}"]
        return subprocess.Popen(
            command, env=dict(head.environment), stdout=stream, stderr=stream, cwd=ROOT, start_new_session=True
        )


def _serve(head: Head, models: list[str], output: Path) -> None:
    port = free_port()
    server = cert_ray(head, output / "serve.log", "serve", *models, f"--port={port}")
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            if server.poll() is not None:
                raise SystemExit(f"the server ended: see {output / 'serve.log'}")
            if _answers(url):
                break
            time.sleep(1)
        ends_s = time.monotonic() + ASKED_S
        threads = [threading.Thread(target=_ask, args=(url, place, ends_s)) for place in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        time.sleep(3 * SCRAPE_EVERY_S)
    finally:
        server.send_signal(signal.SIGINT)
        stop(server)
    say(f"served {CLIENTS} clients for {ASKED_S} s")


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v1/models", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def _ask(url: str, place: int, ends_s: float) -> None:
    """One request after the other: streamed, repeated (the cache's), and now and then one that is refused."""
    number = 0
    with httpx.Client(base_url=url, timeout=120) as client:
        while time.monotonic() < ends_s:
            number += 1
            asked = {"model": "cert", "prompt": _PROMPTS[number % 3], "n": 3, "max_tokens": 24, "temperature": 0.4}
            asked |= {"seed": 1 if number % 4 == 0 else 1_000 * place + number, "stream": number % 5 == 0}
            client.post("/v1/completions", json=asked if number % 11 else {**asked, "temperature": 9})


def ask_panels(prometheus: Prometheus, begins_s: float, ends_s: float) -> list[Answered]:
    """Every query of every dashboard, answered."""
    return [
        Answered(
            title,
            panel.title,
            panel.unit,
            panel.from_zero,
            legend,
            expression,
            tuple(
                (one["metric"], tuple((float(at), float(value)) for at, value in one["values"] if value != "NaN"))
                for one in prometheus.query_range(expression, begins_s, ends_s)
            ),
        )
        for title, panels in BUILDER.PANELS.items()
        for panel in panels
        for legend, expression in panel.series.items()
    ]


def table(answers: list[Answered]) -> str:
    """What every query returned, as Markdown."""
    lines = ["| dashboard | panel | legend | series | samples | newest |", "|---|---|---|---|---|---|"]
    for answer in answers:
        samples = sum(len(values) for _, values in answer.series)
        newest = ", ".join(f"{values[-1][1]:.4g}" for _, values in answer.series[:4] if values)
        legend = answer.legend.replace("|", "\\|")
        empty = answer.why_empty or "**nothing**"
        lines.append(
            f"| {answer.dashboard} | {answer.panel} | `{legend}` | {len(answer.series)} | {samples} "
            f"| {newest if samples else empty} |"
        )
    return "\n".join(lines) + "\n"


def draw(answers: list[Answered], output: Path) -> None:
    """A picture of each dashboard."""
    for title in BUILDER.PANELS:
        picture = draw_dashboard(title, [answer for answer in answers if answer.dashboard == title])
        (output / f"{title}.png").write_bytes(picture)


def say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True, help="a folder that is made anew")
    parser.add_argument("--redraw", action="store_true", help="only draw what an earlier scrape left in the folder")
    given = parser.parse_args()
    output = given.output.absolute()
    if given.redraw:
        draw([Answered(**one) for one in json.loads((output / ANSWERS).read_text())], output)
        return
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    began_s = time.time()
    with started_head(cpus=4) as head, started_prometheus(output, head.discovery) as prometheus:
        run_stages(head, output)
        answers = ask_panels(prometheus, began_s, time.time())
        missing = {metric.exported_name for metric in CATALOGUE} | set(BUILDER.RAY)
        missing -= prometheus.names() | set(EMPTY_HERE)
    (output / "panels.md").write_text(table(answers))
    (output / ANSWERS).write_text(json.dumps([asdict(answer) for answer in answers]))
    draw(answers, output)
    print(table(answers))
    if missing:
        say(f"no such series was scraped: {', '.join(sorted(missing))}")
    empty = [one for one in answers if one.why_empty is None and not any(values for _, values in one.series)]
    sys.exit(1 if empty or missing else 0)


if __name__ == "__main__":
    main()
