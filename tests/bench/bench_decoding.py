"""One step of decoding on the CPU: the engine's forward pass, against static caches, compilation and 8-bit weights.

    python -m tests.bench.bench_decoding --model bases/smollm2-135m --output results

A step feeds one token for each of some rows behind a prompt that they share. CPU-milliseconds of a step, ways taken in
turns; what the first step of a compiled way takes; and how often a way's likeliest token is that of fp32. Ways:

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
    tables: list[list[object]] = []
    figures: dict[str, Any] = {}
    for name, make in _ways().items():
        if given.way and name not in given.way:
            continue
        model = make(reference)
        agree = float((_likeliest(model, ids) == likeliest).float().mean())
        found: dict[str, Any] = {"agrees": agree}
        for rows in given.rows:
            with torch.inference_mode():
                first_s, spread = _measure(_starter(name), model, ids[: given.prompt], rows, given)
            found[str(rows)] = {"first_s": first_s, "step_ms": spread}
        figures[name] = found
        shown = [found[str(rows)]["step_ms"] for rows in given.rows]
        first = f"{max(found[str(rows)]['first_s'] for rows in given.rows):.1f}"
        tables.append([name, *shown, first, f"{agree:.1%}"])
        print(*map(str, tables[-1]), sep=" | ", flush=True)
        del model
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
    start: Callable[..., Step], model: Any, prompt: list[int], rows: int, given: argparse.Namespace
) -> tuple[float, Spread]:
    """Seconds of the first step, and CPU-milliseconds of a step behind the third of each run."""
    torch._dynamo.reset()
    first_s, found = 0.0, []
    for _ in range(given.runs):
        step = start(model, prompt, rows, given.steps + 4)
        began = time.perf_counter()
        step()
        first_s = max(first_s, time.perf_counter() - began)
        step(), step()
        began = time.process_time()
        for _ in range(given.steps):
            step()
        found.append(1e3 * (time.process_time() - began) / given.steps)
    return first_s, Spread.of(found)


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
        if id(model) not in _compiled:
            _compiled.clear()
            _compiled[id(model)] = torch.compile(model.forward, dynamic=False)
        forward = _compiled[id(model)]

    def step() -> None:
        forward(ids_R1, past_key_values=cache, position_ids=place_1.expand(rows, 1))
        place_1.add_(1)

    return step


if __name__ == "__main__":
    main()
