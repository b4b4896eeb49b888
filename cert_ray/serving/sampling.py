"""Which token comes next: options of a request, its random streams, and the draw itself.

In: logits and uniform numbers. Out: token numbers and log-probabilities. No model and no text in here.

A sample's random stream is a pure function of (seed, prompt, sample number). So an answer does not change with the
requests that happen to be decoded beside it, with their order, or with `n`: asking for 60 samples gives 60 streams, of
which the first 50 are those of `n = 50`.

Shapes: B rows (samples), V vocabulary, K candidates, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Self

import numpy as np
import pydantic
import torch
import xxhash

from cert_ray.config import Config
from cert_ray.errors import ConfigError

# Nucleus sampling sorts this many candidates, and all of them only when these hold less than top_p. Assumed: code is
# predictable, and 0.9 of the mass sits in far fewer tokens once a model is trained.
_CANDIDATES = 512


class Mode(StrEnum):
    """Which models take part in an answer."""

    CASCADE = "cascade"  # sketch, vote, fill in
    SKETCH_ONLY = "sketch_only"  # the sketches are the answers, the winner's first; placeholders stay words
    GENERATOR_ONLY = "generator_only"  # the generator is given the context alone
    SINGLE = "single"  # one plain model, cut at the request's stop strings only


class Sampling(Config):
    """What a request asks for, in OpenAI's terms and with its defaults; only the seed is never left open."""

    n: int = pydantic.Field(default=1, ge=1)
    best_of: int | None = pydantic.Field(default=None, ge=1)  # drawn; the n likeliest per token are given. None: n
    max_tokens: int = pydantic.Field(default=16, ge=0)  # 0 only with echo: score the prompt
    temperature: float = pydantic.Field(default=1.0, ge=0, le=2)  # 0 is greedy
    top_p: float = pydantic.Field(default=1.0, gt=0, le=1)
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()  # each ends a sample as the end of text does, and is not part of it
    logprobs: int | None = pydantic.Field(default=None, ge=0, le=5)  # alternatives told per token; None: nothing
    # The prompt stands before each choice's text, by whoever writes the response: `Completion.text` never holds it.
    # Together with `logprobs`, `CascadeAnswer.prompt_logprobs` is filled.
    echo: bool = False
    suffix: str | None = None  # text behind the answer; for models that were trained to fill in the middle
    mode: Mode | None = None  # None: the deployment's own

    @pydantic.model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.best_of is not None and self.best_of < self.n:
            raise ConfigError(f"best_of={self.best_of}: must not be less than n={self.n}.")
        if self.max_tokens == 0 and not self.echo:
            raise ConfigError("max_tokens=0: only with echo=true, which scores the prompt; ask for one token or more.")
        return self

    @property
    def drawn(self) -> int:
        """Samples that are drawn."""
        return self.best_of or self.n


def uniform_streams(seed: int, prompt: Sequence[int], samples: range, length: int) -> torch.Tensor:
    """Uniform numbers in [0, 1) for the numbered `samples` of one prompt: float64, [len(samples), length]."""
    prompt_bytes = np.asarray(prompt, dtype="<u4").tobytes()
    streams_BT = torch.empty(len(samples), length, dtype=torch.float64)
    for row, sample in enumerate(samples):
        name = f"{seed} {sample} ".encode() + prompt_bytes
        generator = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(name) >> 1)  # torch wants a signed seed
        torch.rand(length, generator=generator, dtype=torch.float64, out=streams_BT[row])
    return streams_BT


def draw_tokens(logits_BV: torch.Tensor, uniform_B: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """One token per row by inverse transform sampling from the nucleus: int64 [B].

    The nucleus is the smallest set of most likely tokens whose probability reaches `top_p` (Holtzman et al. 2020,
    arXiv:1904.09751). Temperature 0 takes the most likely token and ignores `uniform_B`.
    """
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    shifted_BV = (
        logits_BV.double() - logits_BV.max(dim=-1, keepdim=True).values.double()
    )  # so that tiny T cannot overflow
    probabilities_BV = torch.softmax(shifted_BV / temperature, dim=-1)
    if top_p >= 1:
        return _invert(probabilities_BV.cumsum(dim=-1), uniform_B)
    size_K = min(_CANDIDATES, probabilities_BV.shape[-1])
    values_BK, tokens_BK = probabilities_BV.topk(size_K, dim=-1)
    if bool((values_BK.sum(dim=-1) < top_p).any()):
        values_BK, tokens_BK = probabilities_BV.sort(dim=-1, descending=True)
    before_BK = values_BK.cumsum(dim=-1) - values_BK
    kept_BK = torch.where(before_BK < top_p, values_BK, 0.0)
    picked_B = _invert(kept_BK.cumsum(dim=-1), uniform_B)
    return tokens_BK.gather(-1, picked_B[:, None])[:, 0]


def _invert(cumulative_BK: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """The first place where the cumulative mass exceeds `uniform` times its total."""
    target_B1 = (uniform_B.to(cumulative_BK.device) * cumulative_BK[:, -1])[:, None]
    return torch.searchsorted(cumulative_BK, target_B1, right=True)[:, 0].clamp(max=cumulative_BK.shape[-1] - 1)


def token_logprobs(logits_BV: torch.Tensor, tokens_B: torch.Tensor) -> torch.Tensor:
    """Natural log-probability of each row's token under the model itself (temperature 1, no nucleus): float32 [B]."""
    return torch.log_softmax(logits_BV.float(), dim=-1).gather(-1, tokens_B[:, None])[:, 0]
