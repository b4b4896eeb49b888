"""One step of decoding on the CPU: the engine's forward pass, against static caches, compilation and 8-bit weights.

    python -m tests.bench.bench_decoding --model bases/smollm2-135m --output results

A step feeds one token for each of some rows behind a prompt that they share. CPU-milliseconds of a step, the ways taken
in turns in every run, all of them in memory; what the first step of a compiled way takes; and how often a way's
likeliest token is that of fp32. Ways:

    engine            packed attention and weights laid out, as `cert-ray serve` runs a model
    growing cache     transformers' forward pass and default cache
    static cache      the same with `StaticCache`
    compiled          the same through `torch.compile`
    engine, int8      packed attention, and linear layers of `torch.ao.quantization.quantize_dynamic`, by row
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, StaticCache

from cert_ray.serving import packed_attention
from cert_ray.serving.model_folders import load_model
from cert_ray.serving.packed_attention import Feed, Kept
from cert_ray.serving.packed_linear import pack_linear_layers
from cert_ray.sketching import prompt_format
from tests.bench.measuring import Spread, markdown, publish

Step = Callable[[], Any]


def main() -> None:
    """Time every way."""
    given = _arguments()
    warnings.simplefilter("ignore")
    torch.set_num_threads(given.threads)
    text = Path(__file__).read_text()
    reference, tokenizer = load_model(given.model, torch.float32)
    ids = prompt_format.encode_code(tokenizer, text)[:400]
    likeliest = _likeliest(reference.eval(), ids)
    models = {name: make(reference) for name, make in _ways().items() if not given.way or name in given.way}
    figures: dict[str, Any] = {
        name: {"agrees": float((_likeliest(model, ids) == likeliest).float().mean())} for name, model in models.items()
    }
    for rows in given.rows:
        with torch.inference_mode():
            measured = _measure(models, ids[: given.prompt], rows, given)
        for name, (first_s, spread) in measured.items():
            figures[name][str(rows)] = {"first_s": first_s, "step_ms": spread}
            print(name, f"{rows} rows", f"{first_s:.1f} s", spread, sep=" | ", flush=True)
    tables: list[list[object]] = []
    for name, found in figures.items():
        of_rows = [found[str(rows)] for rows in given.rows]
        first = f"{max(one['first_s'] for one in of_rows):.1f}"
        tables.append([name, *(one["step_ms"] for one in of_rows), first, f"{found['agrees']:.1%}"])
    headers = ["way", *(f"{rows} rows, CPU-ms" for rows in given.rows), "first step, s", "likeliest as in fp32"]
    command = "python -m tests.bench.bench_decoding " + " ".join(sys.argv[1:])
    publish(given.output, "decoding", command, [markdown(headers, tables)], figures)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face folder, Llama-like")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", action="append", type=int, help="default: 1, 4 and 16")
    parser.add_argument("--way", action="append", help="default: all")
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--steps", type=int, default=16, help="of a run")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    given.rows = given.rows or [1, 4, 16]
    return given


def _ways() -> dict[str, Callable[[Any], Any]]:
    """From the model in fp32, a model of its own for each way."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    ways: dict[str, Callable[[Any], Any]] = {}
    for name, dtype in dtypes.items():
        ways[f"engine, {name}"] = partial(_engine, dtype=dtype)
        for way in ("growing cache", "static cache", "compiled"):
            ways[f"{way}, {name}"] = partial(_copied, dtype=dtype)
    ways["engine, int8"] = _quantised
    return ways


def _copied(reference: Any, dtype: torch.dtype) -> Any:
    return copy.deepcopy(reference).to(dtype).eval()


def _engine(reference: Any, dtype: torch.dtype) -> Any:
    model = _copied(reference, dtype)
    pack_linear_layers(model)
    assert packed_attention.enable(model)
    return model


def _quantised(reference: Any) -> Any:
    # Deprecated, and still what PyTorch brings for this; torchao is another package. A scale for each row of weights.
    each_row = {torch.nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
    model = torch.ao.quantization.quantize_dynamic(copy.deepcopy(reference).eval(), each_row)
    assert packed_attention.enable(model)
    return model


@torch.inference_mode()
def _likeliest(model: Any, ids: list[int]) -> torch.Tensor:
    """After each of `ids`."""
    if model.config._attn_implementation.startswith("cert_ray"):
        return packed_attention.forward(model, [Feed(Kept(), ids, None, True)])[0].argmax(-1)
    return model(torch.tensor([ids])).logits[0].argmax(-1)


def _measure(
    models: dict[str, Any], prompt: list[int], rows: int, given: argparse.Namespace
) -> dict[str, tuple[float, Spread]]:
    """Of each way: seconds of the first step, and CPU-milliseconds of a step behind the third of each run."""
    torch._dynamo.reset()
    firsts: dict[str, list[float]] = {name: [] for name in models}
    steps: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(given.runs):
        for name, model in models.items():
            first_s, step_ms = _run(_starter(name)(model, prompt, rows, given.steps + 4), given.steps)
            firsts[name].append(first_s)
            steps[name].append(step_ms)
    return {name: (max(firsts[name]), Spread.of(steps[name])) for name in models}


def _run(step: Step, steps: int) -> tuple[float, float]:
    began = time.perf_counter()
    step()
    first_s = time.perf_counter() - began
    step(), step()
    began = time.process_time()
    for _ in range(steps):
        step()
    return first_s, 1e3 * (time.process_time() - began) / steps


def _starter(name: str) -> Callable[..., Step]:
    way = name.partition(",")[0]
    return {"engine": _start_engine, "growing cache": _start_growing}.get(way) or partial(
        _start_static, compiled=way == "compiled"
    )


def _start_engine(model: Any, prompt: list[int], rows: int, steps: int) -> Step:
    kept, parents = Kept(), [0] * rows
    packed_attention.forward(model, [Feed(kept, prompt)])

    def step() -> None:
        packed_attention.forward(model, [Feed(kept, [7] * rows, list(parents))])
        parents[:] = range(rows)

    return step


def _start_growing(model: Any, prompt: list[int], rows: int, steps: int) -> Step:
    cache = DynamicCache(config=model.config)
    model(torch.tensor([prompt] * rows), past_key_values=cache, logits_to_keep=1)
    ids_R1 = torch.full((rows, 1), 7)
    return lambda: model(ids_R1, past_key_values=cache)


_compiled: dict[int, Any] = {}


def _start_static(model: Any, prompt: list[int], rows: int, steps: int, *, compiled: bool) -> Step:
    cache = StaticCache(config=model.config, max_cache_len=len(prompt) + steps)
    model(torch.tensor([prompt] * rows), past_key_values=cache, logits_to_keep=1)
    ids_R1, place_1 = torch.full((rows, 1), 7), torch.tensor([[len(prompt)]])
    forward = model
    if compiled:
        if id(model) not in _compiled:  # the models live as long as this does
            _compiled[id(model)] = torch.compile(model.forward, dynamic=False)
        forward = _compiled[id(model)]

    def step() -> None:
        forward(ids_R1, past_key_values=cache, position_ids=place_1.expand(rows, 1))
        place_1.add_(1)

    return step


if __name__ == "__main__":
    main()
