"""An engine without a model: its answers follow from prompt and seed alone, and each token takes a given time.

What it costs is known, so it shows what all around it costs; what it answers is known, so a wrong answer is seen.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

from cert_ray.serving.answering import Answerer
from cert_ray.serving.answers import CascadeAnswer, Listener, Route
from cert_ray.serving.deployment import ServeConfig, ServedModel
from cert_ray.serving.engines import Completion, FinishReason
from cert_ray.serving.events import SketchCandidate, SketchChosen, TextDrawn
from cert_ray.serving.replicas import Engines
from cert_ray.serving.sampling import Sampling
from tests.serving.fakes import FakeAnswerer


def paced_tokens(prompt: str, sampling: Sampling, choice: int) -> list[str]:
    """The tokens of one choice: `max_tokens` of them, each a space and six hexadecimal digits."""
    tokens = []
    for place in range(sampling.max_tokens):
        name = f"{sampling.seed} {choice} {place} {prompt}".encode()
        tokens.append(f" {hashlib.blake2b(name, digest_size=3).hexdigest()}")
    return tokens


class PacedAnswerer(FakeAnswerer):
    """Waits `token_s` for each token; requests do not slow each other, as in a batch that is not full."""

    def __init__(self, token_s: float) -> None:
        self._token_s = token_s

    def answer_one(self, prompt: str, sampling: Sampling, listener: Listener) -> CascadeAnswer:
        """Choices side by side, a token each at a step."""
        chosen = SketchChosen("x = df", (), 1, 1.0, 1, (SketchCandidate("x = df", (), 1, -0.5),))
        tell = listener.tell or (lambda event: None)
        tell(chosen)
        columns = [paced_tokens(prompt, sampling, choice) for choice in range(sampling.n)]
        for step in range(sampling.max_tokens):
            listener.check()
            time.sleep(self._token_s)
            reason: FinishReason | None = "length" if step + 1 == sampling.max_tokens else None
            for choice, tokens in enumerate(columns):
                tell(TextDrawn(choice, tokens[step], reason))
        ids = tuple(range(sampling.max_tokens))
        choices = tuple(Completion(ids, "".join(tokens), "length", -0.5) for tokens in columns)
        timings_s = {"generate": sampling.max_tokens * self._token_s}
        return CascadeAnswer(choices, Route.SKETCHER, "x = df", 1, 1.0, 3, timings_s, chosen)


class PacedEngines(Engines):
    """Engines without models: a model's folder is called by the seconds that a token takes."""

    @staticmethod
    def check(config: ServeConfig) -> None:
        """There is nothing to load."""

    def load_now(self, model: ServedModel) -> Answerer:
        return PacedAnswerer(float(Path(model.model or "0").name))
