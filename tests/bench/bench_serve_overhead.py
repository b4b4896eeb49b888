"""What Ray Serve costs: the same front door over the same engine, behind Serve and behind bare uvicorn.

All sides answer in turn, on the same cores, to a client with a process of its own. Engines: `paced`, which waits a
fixed time for each token and uses no processor, and `llama`, a random Llama of about 110M parameters on one thread,
whose decoding takes what it takes. Figures: the median latency of one client, and the requests per second of several.

Serve's sides: `serve`, as `cert-ray serve` starts it; `calls`, as on a cluster that nobody set up otherwise;
`haproxy`, as on a cluster with the settings of docs/serving.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.bench.measuring import Spread, markdown, publish

ROOT = Path(__file__).resolve().parents[2]
TOKENS = 15  # of an answer, as the paper's cut leaves it
AT_ONCE = 8  # requests that an engine works on together
PORT = 18_531
THREADS = 1  # of the Llama's engine, on every side: Ray gives an engine of one CPU one, PyTorch takes all cores
# What is set for a side before its Ray starts, beside what `cert-ray serve` sets itself.
SIDES: dict[str, dict[str, str]] = {
    "uvicorn": {},
    "serve": {},
    "calls": {},
    "haproxy": {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": "2147483647",
    },
}


def save_llama(folder: Path) -> str:
    """A random Llama: 12 layers, 768 wide, and the small tokenizer of the tests."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.serving.builders import small_tokenizer

    tokenizer = small_tokenizer()
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def serve_bare(folder: str, paced: bool) -> None:
    """One process: uvicorn, the front door, the engine."""
    import uvicorn

    from cert_ray.serving.answering import Answerer, ModelConfig
    from cert_ray.serving.backends import LocalBackend
    from cert_ray.serving.http import create_app
    from tests.serving.paced import PacedAnswerer

    config = ModelConfig.from_mapping({"model": folder, "engine": {"threads": THREADS}}, "benchmark")
    answerer = PacedAnswerer(float(Path(folder).name)) if paced else Answerer.load(config)
    app = create_app(LocalBackend({"cert": (None, answerer)}))
    uvicorn.run(app, host="127.0.0.1", port=PORT, log_level="error")


def serve_on_ray(side: str, folder: str, paced: bool) -> None:
    """A Ray, Serve on it, and the application, until the input ends."""
    warnings.simplefilter("ignore")
    import ray

    from cert_ray.operations.on_ray import ray_session
    from cert_ray.serving.deployment import ServerConfig
    from cert_ray.serving.on_ray import Engines, start_server
    from tests.serving.paced import PacedEngines

    options = {"model": folder, "engine": {"threads": THREADS}, "max_ongoing_requests": AT_ONCE, "port": PORT}
    config = ServerConfig.from_mapping(options, "benchmark")
    with ExitStack() as stack:
        if side == "serve":
            stack.enter_context(ray_session())
        else:
            short = stack.enter_context(tempfile.TemporaryDirectory(prefix="bs"))
            ray.init(address="local", include_dashboard=True, _temp_dir=short, log_to_driver=False)
            stack.callback(ray.shutdown)
        stack.enter_context(start_server(config, PacedEngines if paced else Engines))
        sys.stdin.read()


@contextmanager
def answering(side: str, folder: str, paced: bool) -> Iterator[str]:
    """A URL that `side` answers, in processes of its own."""
    command = [sys.executable, "-m", "tests.bench.bench_serve_overhead", "--side", side, "--folder", folder]
    environment = {**os.environ, **SIDES[side]}
    process = subprocess.Popen(
        command + ["--paced"] * paced, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdin is not None
    try:
        yield wait_for(f"http://127.0.0.1:{PORT}")
    finally:
        process.stdin.close()
        if side == "uvicorn":
            process.terminate()
        process.wait()


def wait_for(url: str) -> str:
    """`url`, once it answers."""
    for _ in range(600):
        try:
            httpx.get(f"{url}/health", timeout=5).raise_for_status()
        except httpx.HTTPError:
            time.sleep(0.2)
        else:
            return url
    raise SystemExit(f"{url} does not answer")


async def ask(url: str, clients: int, seconds: float) -> list[float]:
    """Latencies of `clients` that ask one request after the other, once warm."""
    import aiohttp

    latencies: list[float] = []
    body = {"model": "cert", "prompt": "import pandas as pd\ndf =", "max_tokens": TOKENS, "temperature": 0.8}

    async def one(session: Any, place: int, until: float, kept: list[float]) -> None:
        number = 0
        while time.perf_counter() < until:
            number += 1
            began = time.perf_counter()
            async with session.post(f"{url}/v1/completions", json={**body, "seed": place * 10**6 + number}) as response:
                assert response.status == 200, await response.text()
                await response.read()
            kept.append(time.perf_counter() - began)

    async with aiohttp.ClientSession() as session:
        for length, kept in ((2.0, []), (seconds, latencies)):
            until = time.perf_counter() + length
            offset = 0 if kept is latencies else 500  # other seeds, so that no answer is in the cache
            await asyncio.gather(*(one(session, offset + place, until, kept) for place in range(clients)))
    return latencies


def measure(url: str, clients: int, seconds: float) -> tuple[float, float]:
    """Median latency in milliseconds, and requests per second, of a client process."""
    command = [sys.executable, "-m", "tests.bench.bench_serve_overhead", "--ask", url]
    command += ["--clients", str(clients), "--seconds", str(seconds)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    latencies = sorted(json.loads(ended.stdout))
    return 1e3 * latencies[len(latencies) // 2], len(latencies) / seconds


def compare(
    name: str, folder: str, paced: bool, sides: list[str], clients: int, runs: int, seconds: float
) -> list[list[object]]:
    """Rows of one engine: the sides take turns."""
    figures: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for _ in range(runs):
        for side in sides:
            with answering(side, folder, paced) as url:
                p50_ms, _ = measure(url, 1, seconds)
                _, rate = measure(url, clients, seconds)
                figures[side].append((p50_ms, rate))
    rows: list[list[object]] = []
    bare = [statistics.median(figure) for figure in zip(*figures["uvicorn"], strict=True)]
    for side in sides:
        latency, rate = (Spread.of(figure) for figure in zip(*figures[side], strict=True))
        extra_ms, lost = latency.median - bare[0], 1 - rate.median / bare[1]
        rows.append([name, side, latency, f"{extra_ms:+.1f} ms", rate, f"{-lost:+.0%}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--token-ms", type=float, nargs="*", default=[5.0, 20.0], help="of paced engines")
    parser.add_argument("--no-llama", action="store_true")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES)[1:], default=["serve"], help="beside bare uvicorn")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--paced", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--ask", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side == "uvicorn":
        serve_bare(arguments.folder, arguments.paced)
        return
    if arguments.side is not None:
        serve_on_ray(arguments.side, arguments.folder, arguments.paced)
        return
    if arguments.ask is not None:
        print(json.dumps(asyncio.run(ask(arguments.ask, arguments.clients, arguments.seconds))))
        return
    timing = (["uvicorn", *arguments.sides], arguments.clients, arguments.runs, arguments.seconds)
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for token_ms in arguments.token_ms:
            folder = Path(work) / str(token_ms / 1e3)
            folder.mkdir()
            rows += compare(f"paced, {token_ms:g} ms a token", str(folder), True, *timing)
        if not arguments.no_llama:
            (Path(work) / "llama").mkdir()
            rows += compare("Llama, 110M, random", save_llama(Path(work) / "llama"), False, *timing)
    several = f"requests/s of {arguments.clients} clients"
    table = markdown(["engine", "side", "p50 of one client, ms", "its cost", several, "its cost"], rows)
    publish(arguments.output, "serve_overhead", " ".join(["python -m tests.bench.bench_serve_overhead", *sys.argv[1:]]),
            [table], {"rows": rows})  # fmt: skip


if __name__ == "__main__":
    main()
