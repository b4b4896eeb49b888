"""Samples per second of the project's own engine beside vLLM: behind the project's interface, and called plainly.

One model, precision and prompt set (PandasEval and NumpyEval, without the blanks at their ends), one stage, all prompts
of a row at once; samples are cut at the paper's stop strings, at most 100 tokens, top_p 0.9. Behind the interface vLLM
is asked what the own engine answers, too: a seed for each sample, and log-probabilities. Plainly it is asked for text
alone, without seeds, n samples in a request. Run by a Python that has vLLM or its build for CPUs (docs/engine.md).

In: a model folder. Out: samples and tokens per second of wall time and of CPU time of all processes, in turn per row;
medians of `--runs`, each run with other prompts. What vLLM uses while nothing is asked is measured first.

Example: VLLM_PYTHON -m tests.bench.bench_engines --model MODEL --benchmarks ../shared/benchmarks --output results
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cert_ray.serving.answering import load_engine
from cert_ray.serving.boundaries import PAPER_STOPS, split_trailing_blanks
from cert_ray.serving.engines import Engine, EngineConfig, Work
from cert_ray.sketching import prompt_format
from tests.bench.bench_serving import MAX_TOKENS, TOP_P, read_prompts
from tests.bench.measuring import Spread, cpu_by_kind, markdown, publish

_IDLE_S = 5.0
Draw = Callable[[Sequence[tuple[int, ...]], int, float], int]  # prompts, n, temperature; the tokens that were drawn


@dataclass(frozen=True, slots=True)
class Taken:
    """What one contender took for one row."""

    samples: int
    tokens: int
    wall_s: float
    cpu_s: float


def main() -> None:
    """Measure each row, contender by contender."""
    given = _arguments()
    warnings.simplefilter("ignore")
    ours = load_engine(given.model, EngineConfig(dtype=given.dtype, threads=given.threads))
    vllm: Any = load_engine(given.model, EngineConfig(kind="vllm", dtype=given.dtype, kv_cache_gib=given.kv_cache_gib))
    contenders: dict[str, Draw] = {
        "ours": lambda prompts, n, temperature: _through_interface(ours, prompts, n, temperature),
        "vLLM, same interface": lambda prompts, n, temperature: _through_interface(vllm, prompts, n, temperature),
        "vLLM plainly": lambda prompts, n, temperature: _plainly(vllm, prompts, n, temperature),
    }
    texts = [split_trailing_blanks(prompt)[0] for prompt in read_prompts(given.benchmarks, given.seed)]
    prompts = [tuple(prompt_format.encode_code(ours.tokenizer, text)) for text in texts]
    taken = 0
    for draw in contenders.values():
        _measure(draw, prompts[taken : taken + 2], 2, 0.2)  # first passes compile, and read weights from disk
        taken += 2
    idle = _idle_share()
    rows, figures = [], {"idle, share of a core": idle}
    for name, n, temperature, count in _work(given):
        runs: dict[str, list[Taken]] = {contender: [] for contender in contenders}
        for _ in range(given.runs):
            asked = [prompts[(taken + place) % len(prompts)] for place in range(count)]
            taken += count
            for contender, draw in contenders.items():
                _forget_prompts(vllm)  # or it would have read them for the contender before
                runs[contender].append(_measure(draw, asked, n, temperature))
        figures[name] = runs
        rows += _rows(name, runs)
        print(*rows[-len(contenders) :], sep="\n", file=sys.stderr, flush=True)
    heads = ["work", "contender", "samples/s", "ours is", "samples/CPU-s", "ours is", "tokens a sample"]
    note = f"While nothing is asked: {idle:.2f} of a core."
    command = "python -m tests.bench.bench_engines " + " ".join(sys.argv[1:])
    publish(given.output, "engines", command, [markdown(heads, rows), note], figures)
    vllm.close()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder with the project's special tokens")
    parser.add_argument("--benchmarks", type=Path, required=True, help="folder of PandasEval and NumpyEval")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the own engine")
    parser.add_argument("--kv-cache-gib", type=float, default=2.0, help="of vLLM")
    parser.add_argument("--prompts", type=int, default=16, help="at once, n = 1 and n = 20")
    parser.add_argument("--evaluation", type=int, default=4, help="prompts at once, n = 200; 0: leave that row out")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _work(given: argparse.Namespace) -> list[tuple[str, int, float, int]]:
    """Name, n, temperature, prompts."""
    rows = [
        (f"{given.prompts} prompts at once, n = {n}, temperature {temperature}", n, temperature, given.prompts)
        for n, temperature in ((1, 0.2), (20, 0.2), (20, 0.8))
    ]
    if given.evaluation:
        rows.append((f"{given.evaluation} prompts at once, n = 200, temperature 0.2", 200, 0.2, given.evaluation))
    return rows


def _through_interface(engine: Engine, prompts: Sequence[tuple[int, ...]], n: int, temperature: float) -> int:
    def draw(prompt: tuple[int, ...]) -> int:
        work = Work(prompt, n, MAX_TOKENS, temperature, TOP_P, seed=1, stop=PAPER_STOPS)
        return engine.draw(work).tokens

    with ThreadPoolExecutor(len(prompts)) as pool:
        return sum(pool.map(draw, prompts))


def _plainly(vllm: Any, prompts: Sequence[tuple[int, ...]], n: int, temperature: float) -> int:
    """As vLLM's own server asks; it is reached inside of the project's engine, so that it runs once."""
    kind = vllm._vllm.sampling_params.RequestOutputKind.FINAL_ONLY
    options = vllm._vllm.SamplingParams(
        n=n, max_tokens=MAX_TOKENS, temperature=temperature, top_p=TOP_P, stop=list(PAPER_STOPS), output_kind=kind
    )

    async def one(place: int, prompt: tuple[int, ...]) -> int:
        name, drawn = f"plain-{time.monotonic_ns()}-{place}", 0
        async for output in vllm._engine.generate({"prompt_token_ids": list(prompt)}, options, name):
            drawn += sum(len(sample.token_ids) for sample in output.outputs)
        return drawn

    async def every() -> int:
        return sum(await asyncio.gather(*(one(place, prompt) for place, prompt in enumerate(prompts))))

    return asyncio.run_coroutine_threadsafe(every(), vllm._loop).result()


def _forget_prompts(vllm: Any) -> None:
    asyncio.run_coroutine_threadsafe(vllm._engine.reset_prefix_cache(), vllm._loop).result()


def _measure(draw: Draw, prompts: Sequence[tuple[int, ...]], n: int, temperature: float) -> Taken:
    began, cpu = time.perf_counter(), _cpu_s()
    tokens = draw(prompts, n, temperature)
    return Taken(len(prompts) * n, tokens, time.perf_counter() - began, _cpu_s() - cpu)


def _cpu_s() -> float:
    return sum(cpu_by_kind(os.getpid()).values())


def _idle_share() -> float:
    before = _cpu_s()
    time.sleep(_IDLE_S)
    return (_cpu_s() - before) / _IDLE_S


def _rows(name: str, runs: dict[str, list[Taken]]) -> list[list[str]]:
    def spreads(contender: str) -> tuple[Spread, Spread, Spread]:
        taken = runs[contender]
        return (
            Spread.of([one.samples / one.wall_s for one in taken]),
            Spread.of([one.samples / one.cpu_s for one in taken]),
            Spread.of([one.tokens / one.samples for one in taken]),
        )

    mine = spreads("ours")
    rows = []
    for contender in runs:
        wall, cpu, tokens = spreads(contender)
        is_ours = contender == "ours"
        rows.append([
            name,
            contender,
            str(wall),
            "" if is_ours else f"{mine[0].median / wall.median:.2f}x",
            str(cpu),
            "" if is_ours else f"{mine[1].median / cpu.median:.2f}x",
            str(tokens),
        ])  # fmt: skip
    return rows


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
