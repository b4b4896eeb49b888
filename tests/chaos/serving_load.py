"""Clients of a completion server, in a process of their own: the `openai` client, as its users have it.

In: a base URL and a number of clients. Out, on standard output: "begun" when as many answers came as there are clients;
when standard input is closed, one JSON line per request (when it began, how long it took, streamed or not, what went
wrong). Every answer is compared with what `paced_tokens` says, so a wrong or a half one is an error, too.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from dataclasses import asdict, dataclass

import openai

from cert_ray.serving.sampling import Sampling
from tests.serving.paced import paced_tokens

TOKENS = 10


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request. `error` is None where the answer was right."""

    began: float  # of time.time, which is the same in every process of the machine
    seconds: float
    stream: bool
    error: str | None


class Clients:
    """`count` threads that ask one request after the other, every other one streamed."""

    def __init__(self, base_url: str, count: int, max_retries: int = openai.DEFAULT_MAX_RETRIES) -> None:
        self._client = openai.OpenAI(base_url=f"{base_url}/v1", api_key="unused", max_retries=max_retries, timeout=60)
        self._stop = threading.Event()
        self.outcomes: list[Outcome] = []
        self._threads = [threading.Thread(target=self._ask_on, args=(place,)) for place in range(count)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> list[Outcome]:
        """All outcomes, the requests that were on their way included."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._client.close()
        return self.outcomes

    def _ask_on(self, place: int) -> None:
        number = 0
        while not self._stop.is_set():
            number += 1
            seed, stream = 1_000_000 * place + number, (place + number) % 2 == 0
            began, clock = time.time(), time.perf_counter()
            error = self._ask(f"x{place} =", seed, stream)
            self.outcomes.append(Outcome(began, time.perf_counter() - clock, stream, error))

    def _ask(self, prompt: str, seed: int, stream: bool) -> str | None:
        expected = "".join(paced_tokens(prompt, Sampling(seed=seed, max_tokens=TOKENS), 0))
        options = {"model": "cert", "prompt": prompt, "seed": seed, "max_tokens": TOKENS}
        try:
            if stream:
                chunks = self._client.completions.create(**options, stream=True)
                text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
            else:
                text = self._client.completions.create(**options).choices[0].text
        except openai.APIError as error:
            status = getattr(error, "status_code", None)
            return f"{type(error).__name__} {status or ''}: {error.message[:200]}"
        return None if text == expected else f"another answer: {text[:80]!r}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base_url")
    parser.add_argument("--clients", type=int, default=8)
    arguments = parser.parse_args()
    clients = Clients(arguments.base_url, arguments.clients)
    clients.start()
    while len(clients.outcomes) < arguments.clients:
        time.sleep(0.05)
    print("begun", flush=True)
    sys.stdin.read()
    for outcome in clients.stop():
        print(json.dumps(asdict(outcome)))


if __name__ == "__main__":
    main()
