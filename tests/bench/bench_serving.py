"""Two-stage answers per second, beside the released way: Hugging Face pipelines, two stages in turn, one by one.

The same weights, precision, threads and prompts (PandasEval and NumpyEval) on both sides, in one process and run. The
released way draws always 100 new tokens, up to 50 samples a batch, and cuts afterwards; top_k is off on both sides. In:
a model folder with the project's special tokens, or a sketcher's and a generator's. Out: requests per second of wall
time and of CPU time; on a busy machine only the second says much. With `--force` every request goes to stage two: the
winning sketch is given a placeholder on both sides.

The engine alone is measured, without HTTP. Each prompt is asked once, so neither kept prompts nor kept answers help.

Example: python -m tests.bench.bench_serving --sketcher MODEL --output results --benchmarks ../shared/benchmarks --force
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cert_ray.serving.answering import Answerer, load_engine
from cert_ray.serving.answers import CascadeAnswer, Route
from cert_ray.serving.batching import Turns
from cert_ray.serving.boundaries import PAPER_STOPS, cut_at, split_trailing_blanks
from cert_ray.serving.contexts import sketch_context
from cert_ray.serving.engines import DEFAULT_HOOKS, Completion, Drawn, Engine, EngineConfig, Hooks, Work
from cert_ray.serving.sampling import Sampling
from cert_ray.sketching import prompt_format
from tests.bench.measuring import markdown, publish

MAX_TOKENS, TOP_P, PEER_BATCH = 100, 0.9, 50


@dataclass(frozen=True, slots=True)
class Rate:
    """What some requests took. `second_stage` is the share that reached stage two."""

    requests: int
    wall_s: float
    cpu_s: float
    second_stage: float
    latencies_s: tuple[float, ...]

    @property
    def per_wall_s(self) -> float:
        return self.requests / self.wall_s

    @property
    def per_cpu_s(self) -> float:
        return self.requests / self.cpu_s


def main() -> None:
    """Measure each row, ours then the peer's."""
    given = _arguments()
    warnings.simplefilter("ignore")
    torch.set_num_threads(given.threads)
    prompts = read_prompts(given.benchmarks, given.seed)
    ours, peer = _Ours(given), _Peer(given)
    taken = iter(range(0, len(prompts), 1))

    def fresh(count: int) -> list[str]:
        return [prompts[next(taken) % len(prompts)] for _ in range(count)]

    ours(fresh(1), 2, 0.2, 1)  # the first pass through a model reads it from disk
    rows, figures = [], {}
    for name, n, temperature, clients, own, theirs in _work(given):
        asked = fresh(max(own, theirs))
        mine = ours(asked[:own], n, temperature, clients)
        other = peer(asked[:theirs], n, temperature)
        figures[name] = {"ours": mine, "peer": other}
        rows.append(_row(name, mine, other))
        print(rows[-1], file=sys.stderr, flush=True)
    heads = ["work", "ours, requests/s", "released way", "times", "ours, requests/CPU-s", "released way", "times",
             "reach stage two: ours, theirs", "requests: ours, theirs"]  # fmt: skip
    tables = [markdown(heads, rows)] if rows else []
    if given.latency:
        latency, raw = _latency(ours, peer, fresh(given.latency))
        figures["latency"] = raw
        tables.append(latency)
    publish(given.output, "serving", "python -m tests.bench.bench_serving " + " ".join(sys.argv[1:]), tables, figures)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sketcher", required=True, help="model folder")
    parser.add_argument("--generator", help="model folder; default: the sketcher's")
    parser.add_argument("--benchmarks", type=Path, required=True, help="folder of PandasEval and NumpyEval")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=32, help="ours, n = 20; 0: leave those rows out")
    parser.add_argument("--peer-requests", type=int, default=2, help="the peer's, n = 20")
    parser.add_argument("--evaluation", type=int, default=4, help="ours, n = 200; 0: leave that row out")
    parser.add_argument("--peer-evaluation", type=int, default=1, help="the peer's, n = 200")
    parser.add_argument("--latency", type=int, default=0, help="answers whose latency is measured; 0: none")
    parser.add_argument("--temperature", type=float, action="append", help="default: 0.2 and 0.8")
    parser.add_argument("--force", action="store_true", help="every request goes to stage two")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _work(given: argparse.Namespace) -> list[tuple[str, int, float, int, int, int]]:
    """Name, n, temperature, clients, our requests, the peer's."""
    forced = ", all to stage two" if given.force else ""
    rows = [
        (f"n = 20, {given.clients} clients, temperature {temperature}{forced}", 20, temperature, given.clients,
         given.requests, given.peer_requests)
        for temperature in given.temperature or (0.2, 0.8)
        if given.requests
    ]  # fmt: skip
    if given.evaluation:
        name = f"evaluation, n = 200, temperature 0.2{forced}"
        rows.append((name, 200, 0.2, given.evaluation, given.evaluation, given.peer_evaluation))
    return rows


def _row(name: str, mine: Rate, other: Rate) -> list[str]:
    return [
        name,
        f"{mine.per_wall_s:.3g}",
        f"{other.per_wall_s:.3g}",
        f"{mine.per_wall_s / other.per_wall_s:.3g}",
        f"{mine.per_cpu_s:.3g}",
        f"{other.per_cpu_s:.3g}",
        f"{mine.per_cpu_s / other.per_cpu_s:.3g}",
        f"{mine.second_stage:.0%}, {other.second_stage:.0%}",
        f"{mine.requests}, {other.requests}",
    ]


def read_prompts(folder: Path, seed: int) -> list[str]:
    """The prompts of both benchmarks, in an order that `seed` decides."""
    prompts = []
    for name in ("PandasEval", "NumpyEval"):
        with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            prompts += [json.loads(line)["prompt"] for line in lines]
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    return [prompts[place] for place in order]


def _timed(prompts: Sequence[str], run: Callable[[str], bool], clients: int) -> Rate:
    """`run` says whether a request reached stage two."""

    def one(prompt: str) -> tuple[bool, float]:
        began = time.perf_counter()
        return run(prompt), time.perf_counter() - began

    began, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(clients) as pool:
        results = list(pool.map(one, prompts))
    wall_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu
    share = sum(reached for reached, _ in results) / len(results)
    return Rate(len(prompts), wall_s, cpu_s, share, tuple(latency for _, latency in results))


class _ForcedSketcher:
    """The sketcher, each of whose samples ends in a placeholder."""

    def __init__(self, engine: Engine) -> None:
        self.tokenizer, self.context_tokens, self.infill_tokens = engine.tokenizer, engine.context_tokens, None
        self.takes_drafts = engine.takes_drafts
        self._engine = engine
        self._number = engine.tokenizer.token_to_id(prompt_format.special_token("number"))

    def _marked(self, sample: Completion) -> Completion:
        text = prompt_format.encode_code(self.tokenizer, " x" if not sample.text.strip() else sample.text.rstrip())
        return replace(sample, ids=(*text, self._number))

    def draw(self, work: Work, hooks: Hooks = DEFAULT_HOOKS) -> Drawn:
        enough = hooks.enough
        if enough is not None:
            marked = lambda ended, begun: enough([(self._marked(one), votes) for one, votes in ended], begun)  # noqa: E731
            hooks = replace(hooks, enough=marked)
        drawn = self._engine.draw(work, hooks)
        return replace(drawn, samples=tuple(sample and self._marked(sample) for sample in drawn.samples))


class _Ours:
    """Both stages by the project's engine, all clients at once."""

    def __init__(self, given: argparse.Namespace) -> None:
        turns, config = Turns(), EngineConfig(dtype=given.dtype, threads=given.threads)
        sketcher = load_engine(given.sketcher, config, turns)
        generator = load_engine(given.generator, config, turns) if given.generator else sketcher
        self._answerer = Answerer(_ForcedSketcher(sketcher) if given.force else sketcher, generator)

    def answer(self, prompt: str, n: int, temperature: float) -> CascadeAnswer:
        sampling = Sampling(n=n, max_tokens=MAX_TOKENS, temperature=temperature, top_p=TOP_P)
        return self._answerer.answer([prompt], sampling)[0]

    def __call__(self, prompts: Sequence[str], n: int, temperature: float, clients: int) -> Rate:
        sketcher_only = (Route.SKETCHER,)
        return _timed(prompts, lambda prompt: self.answer(prompt, n, temperature).route not in sketcher_only, clients)


class _Peer:
    """Both stages by pipelines, as the authors' code does it: each request by itself, always 100 new tokens."""

    def __init__(self, given: argparse.Namespace) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

        def load(folder: str) -> Any:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, given.dtype))
            tokenizer = AutoTokenizer.from_pretrained(folder, split_special_tokens=False)  # placeholders written out
            return pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")

        self._sketcher = load(given.sketcher)
        self._generator = load(given.generator) if given.generator else self._sketcher
        self._forced = given.force

    def __call__(self, prompts: Sequence[str], n: int, temperature: float) -> Rate:
        return _timed(prompts, lambda prompt: self._answer(prompt, n, temperature), 1)

    def _draw(self, pipe: Any, text: str, n: int, temperature: float) -> list[str]:
        texts: list[str] = []
        while len(texts) < n:
            drawn = pipe(
                text, num_return_sequences=min(PEER_BATCH, n - len(texts)), do_sample=True, temperature=temperature,
                top_p=TOP_P, top_k=0, max_new_tokens=MAX_TOKENS, min_new_tokens=MAX_TOKENS, return_full_text=False,
                skip_special_tokens=False,
            )  # fmt: skip
            texts += [entry["generated_text"] for entry in drawn]
        return [cut_at(text, PAPER_STOPS) for text in texts]

    def _answer(self, prompt: str, n: int, temperature: float) -> bool:
        body, _ = split_trailing_blanks(prompt)
        sketches = self._draw(self._sketcher, _shown(body), n, temperature)
        winner = Counter(sketches).most_common(1)[0][0]
        if not self._forced and winner.strip() and not any(kind in winner for kind in _SPELLED):
            return False
        self._draw(self._generator, f"{winner}{_SPELLED[0]}\n{prompt_format.SEPARATOR}\n{body}", n, temperature)
        return True

    def latency(self, prompt: str, new_tokens: int) -> float:
        """Seconds of one `generate` of so many tokens."""
        body, _ = split_trailing_blanks(prompt)
        began = time.perf_counter()
        self._generator(body, do_sample=True, temperature=0.2, top_p=TOP_P, top_k=0, max_new_tokens=new_tokens,
                        min_new_tokens=new_tokens, return_full_text=False)  # fmt: skip
        return time.perf_counter() - began


_SPELLED = tuple(prompt_format.special_token(kind) for kind in ("number", "string", "float"))


def _shown(body: str) -> str:
    """The context's sketch, placeholders spelled as their tokens."""
    seen = sketch_context(body)
    shown, last = "", 0
    for start, end, kind in seen.placeholders:
        shown += seen.text[last:start] + prompt_format.special_token(kind)
        last = end
    return shown + seen.text[last:]


def _latency(ours: _Ours, peer: _Peer, prompts: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """One two-stage answer (n = 1) beside one single-stage generate of as many new tokens, in turn."""
    rows = []
    for prompt in prompts:
        began, cpu = time.perf_counter(), time.process_time()
        answer = ours.answer(prompt, 1, 0.2)
        mine, mine_cpu = time.perf_counter() - began, time.process_time() - cpu
        tokens = answer.sketch_tokens + (answer.completion_tokens if "generate" in answer.timings_s else 0)
        cpu = time.process_time()
        other = peer.latency(prompt, max(1, tokens))
        rows.append((tokens, mine, other, mine_cpu, time.process_time() - cpu))
    mine, other, mine_cpu, other_cpu = (statistics.median(row[place] for row in rows) for place in (1, 2, 3, 4))
    table = markdown(
        ["p50 of one answer, n = 1", "two stages, ours", "one stage, generate", "ratio"],
        [["wall, s", f"{mine:.3g}", f"{other:.3g}", f"{mine / other:.2f}"],
         ["CPU, s", f"{mine_cpu:.3g}", f"{other_cpu:.3g}", f"{mine_cpu / other_cpu:.2f}"]],
    )  # fmt: skip
    return table, {"tokens, ours s, generate s, ours CPU s, generate CPU s": rows}


if __name__ == "__main__":
    main()
