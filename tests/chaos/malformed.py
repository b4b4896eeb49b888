"""Malformed requests, many of them: whatever is sent, the answer is OpenAI's, and never a 500.

In: a number of requests and a seed. Out: statuses counted, on standard output; the exit status is 0 when every answer
had a status below 500 and, where it was an error, OpenAI's shape. Half of the requests come from the OpenAPI document
(schemathesis: as it describes them, and broken in one place), half from a fuzzer that knows the names of the fields.
Behind the front door are real models, tiny and random, so what the schema lets through meets an engine, too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import string
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import schemathesis
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode

from cert_ray.serving.answering import Answerer, ModelConfig
from cert_ray.serving.backends import LocalBackend
from cert_ray.serving.deployment import FrontDoorConfig
from cert_ray.serving.http import create_app
from cert_ray.serving.openai_schema import CompletionRequest, RequestLimits
from tests.serving.builders import save_model

LIMITS = RequestLimits(max_n=4, max_choices=8, max_prompts=4, max_tokens=8, max_body_bytes=10_000)
VALID = {"model": "cert", "prompt": "import pandas as pd\nx =", "max_tokens": 4, "n": 2, "seed": 1}

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("\ud800") | st.just("x" * 300)
values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
names = st.sampled_from(sorted(CompletionRequest.model_fields)) | st.text()
# A field of a valid request with a value of any kind; a third of the numbers near a bound.
near = st.sampled_from([-1, 0, 1, 2, 4, 5, 8, 9, 2**31, 2**63 - 1, 2**63, 1e308, -0.0])
bodies = st.dictionaries(names, values | near, max_size=4).map(lambda fields: json.dumps({**VALID, **fields}).encode())
good = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.text() | st.lists(st.text(), max_size=5),
        "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=4),
        "echo": st.booleans(),
        "stream": st.booleans(),
        "logprobs": st.integers(0, 5),
        "best_of": st.integers(1, 4),
        "max_tokens": st.integers(0, 8),
        "temperature": st.floats(0, 2),
        "top_p": st.floats(0.01, 1),
        "suffix": st.text(),
        "mode": st.sampled_from(["cascade", "constrained", "sketch_only", "generator_only", "single"]),
        "stop_token_ids": st.lists(st.integers(0, 500), max_size=3),
    },
).map(lambda fields: json.dumps({**VALID, **fields}).encode())


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A valid body with a few bytes cut out, doubled or replaced."""
    body = bytearray(json.dumps(VALID).encode())
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(body) - 1)))
        body[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=4))
    return bytes(body)


token = st.text(string.ascii_letters + string.digits + "-_/;=.,* ", max_size=30)
requests = st.fixed_dictionaries(
    {
        "content": st.one_of(bodies, good, damaged(), st.binary(max_size=200)),
        "headers": st.fixed_dictionaries(
            {"Content-Type": st.just("application/json") | token},
            optional={"Authorization": token, "Accept": token, "Content-Encoding": token, "Origin": token},
        ),
        "method": st.sampled_from(["POST"] * 12 + ["GET", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "X"]),
        "url": st.sampled_from(
            ["/v1/completions"] * 12 + ["/", "/v1/models", "/v1/completions/", "/v1/models/%00", "//"]
        ),
    }
)


def run_from_document(app: Any, count: int, seed: int, check: Callable[[int, str], None]) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    operations = [found.ok() for found in schema.get_all_operations()]
    cases = st.one_of(
        operation.as_strategy(generation_mode=mode) for operation in operations for mode in GenerationMode
    )

    @hypothesis.seed(seed)
    @settings(count)
    @hypothesis.given(case=cases)
    def ask(case: schemathesis.Case) -> None:
        response = case.call()
        check(response.status_code, response.text)

    ask()


def run_fuzzer(app: Any, count: int, seed: int, check: Callable[[int, str], None]) -> None:
    loop = asyncio.new_event_loop()
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    client = httpx.AsyncClient(transport=transport, base_url="http://cert")

    @hypothesis.seed(seed)
    @settings(count)
    @hypothesis.given(request=requests)
    def ask(request: dict[str, Any]) -> None:
        response = loop.run_until_complete(client.request(**request))
        check(response.status_code, response.text if request["method"] != "HEAD" else "")

    try:
        ask()
    finally:
        loop.run_until_complete(client.aclose())
        loop.close()


def settings(count: int) -> hypothesis.settings:
    return hypothesis.settings(
        max_examples=count,
        derandomize=False,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    statuses: Counter[int] = Counter()

    def check(status: int, text: str) -> None:
        statuses[status] += 1
        assert status < 500, text
        if status >= 400 and text:
            assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}, text

    with tempfile.TemporaryDirectory() as folder:
        models = {name: Path(folder) / name for name in ("sketcher", "generator")}
        for seed, path in enumerate(models.values()):
            path.mkdir()
            save_model(path, seed=seed, window=128)
        answerer = Answerer.load(ModelConfig(**{name: str(path) for name, path in models.items()}))
        app = create_app(LocalBackend({"cert": (None, answerer)}), FrontDoorConfig(limits=LIMITS))
        # Examples that are drawn twice are sent once: so until there are enough.
        for number in range(1_000):
            left = arguments.requests - statuses.total()
            if left <= 0:
                break
            run = run_from_document if number % 2 == 0 else run_fuzzer
            run(app, min(left, -(-arguments.requests // 2)), arguments.seed + number, check)
    print(
        f"{statuses.total()} requests: "
        + ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))
    )


if __name__ == "__main__":
    main()
