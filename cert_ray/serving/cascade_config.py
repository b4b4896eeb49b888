"""The options of a cascade. Options only; `cascade` and `layouts` say what they do."""

from __future__ import annotations

from typing import Literal, Self

import pydantic

from cert_ray.config import Config
from cert_ray.errors import ConfigError
from cert_ray.serving.boundaries import PAPER_STOPS
from cert_ray.serving.sampling import Mode
from cert_ray.sketching import SketchKind


class CascadeConfig(Config):
    """For a cascade of two models, or for one model that is both stages."""

    kind: SketchKind = SketchKind.CONSTANTS  # the kind that the sketcher was trained on
    sketches: int | None = pydantic.Field(default=None, ge=1)  # None: as many as completions are asked for
    sketch_scope: Literal["answer", "file"] = "answer"
    stop: tuple[str, ...] = PAPER_STOPS  # both stages are cut here, and at the request's own stop strings
    # How to tell whether a sketch needs stage two: by its special tokens, or, as the authors' code did, by looking for
    # the placeholder words in the text, which takes `astype(float)` for a placeholder. `released` also gives
    # the models plain text instead of special tokens; it goes with `kind: released` and models trained on that.
    routing: Literal["special_tokens", "released"] = "special_tokens"
    # Repeat the same samples after this many, as the authors' code did after 50. None: never.
    reseed_every: int | None = pydantic.Field(default=None, ge=1)
    # Answers in the order drawn, or the likeliest per token first. Where sketches are the answers, the winner's come
    # first either way.
    rank: Literal["drawn", "likelihood"] = "drawn"
    # The mode of requests that do not name one.
    mode: Literal[Mode.CASCADE, Mode.CONSTRAINED, Mode.SKETCH_ONLY, Mode.GENERATOR_ONLY] = Mode.CASCADE
    # With mode `constrained`: an answer goes on freely where the generator gives less than this probability to all the
    # tokens that the sketch allows. Assumed.
    least_share: float = pydantic.Field(default=0.001, gt=0, le=1)
    # Three newlines end a block of the generator's training text; the next block's sketch would follow.
    generator_stop: tuple[str, ...] = ("\n\n\n",)

    @pydantic.model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.mode is Mode.CONSTRAINED and self.routing == "released":
            raise ConfigError(
                "mode='constrained' with routing='released': that routing finds placeholders by their words, so it "
                "cannot tell them from code. Use routing='special_tokens', or another mode."
            )
        return self
