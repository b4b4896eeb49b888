"""What the operator of a cascade may change. Options only; what they do stands in `cascade` and `layouts`."""

from __future__ import annotations

from typing import Literal, Self

import pydantic

from cert_ray.config import Config
from cert_ray.errors import ConfigError
from cert_ray.serving.boundaries import PAPER_STOPS
from cert_ray.serving.sampling import Mode
from cert_ray.sketching import SketchKind


class CascadeConfig(Config):
    """Of a cascade of two models, or of one model of both stages."""

    kind: SketchKind = SketchKind.CONSTANTS  # the kind that the sketcher was trained on
    sketches: int | None = pydantic.Field(default=None, ge=1)  # None: as many as completions are asked for
    sketch_scope: Literal["answer", "file"] = "answer"
    stop: tuple[str, ...] = PAPER_STOPS  # both stages are cut here, and at the request's own stop strings
    # Whether a sketch needs stage two: by its special tokens, or as the authors' code did, which looked for the words
    # in the text, and so takes `astype(float)` for a placeholder (PAPER.md). `released` also gives the models plain
    # text instead of special tokens, and goes with `kind: released` and models trained on that.
    routing: Literal["special_tokens", "released"] = "special_tokens"
    # Draw the same samples again after so many, as the authors' code did after 50. None: every sample its own.
    reseed_every: int | None = pydantic.Field(default=None, ge=1)
    # Where sketches are the answers, those of the one that won come first in either order.
    rank: Literal["drawn", "likelihood"] = "drawn"  # answers in the order drawn, or the likeliest per token first
    # Unless a request asks otherwise.
    mode: Literal[Mode.CASCADE, Mode.CONSTRAINED, Mode.SKETCH_ONLY, Mode.GENERATOR_ONLY] = Mode.CASCADE
    # With mode `constrained`: an answer goes on freely where the generator gives less than this probability to all that
    # the sketch allows. Assumed.
    least_share: float = pydantic.Field(default=0.001, gt=0, le=1)
    # Three newlines end a block of the generator's training text: behind them the next block's sketch begins.
    generator_stop: tuple[str, ...] = ("\n\n\n",)

    @pydantic.model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.mode is Mode.CONSTRAINED and self.routing == "released":
            raise ConfigError("mode='constrained' with routing='released': words do not tell placeholders from code.")
        return self
