"""What stands behind a front door: one model, or sketcher and generator, in one process.

In: model folders. Out: an `Answerer` that completes prompts one by one. HTTP, Ray and evaluation all use this, so they
give the same answers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Self

import pydantic

from cert_ray import storage
from cert_ray.config import Config
from cert_ray.errors import ConfigError, DeadlineError, RequestCancelledError, TokenizerMismatchError
from cert_ray.serving.cascade import CascadeAnswer, CascadeConfig, run_cascade, run_single
from cert_ray.serving.engines import Engine, EngineConfig, TransformersEngine
from cert_ray.serving.events import Event, TextDrawn
from cert_ray.serving.sampling import Sampling
from cert_ray.sketching import PLACEHOLDER_KINDS, prompt_format


class ModelConfig(Config):
    """Which models answer: either `model`, or `sketcher` and `generator`. All are folders or URLs."""

    model: str | None = None
    sketcher: str | None = None
    generator: str | None = None
    cascade: CascadeConfig = CascadeConfig()
    engine: EngineConfig = EngineConfig()

    @pydantic.model_validator(mode="after")
    def _check_models(self) -> Self:
        given = (self.model is not None, self.sketcher is not None, self.generator is not None)
        if given not in ((True, False, False), (False, True, True)):
            raise ConfigError(
                f"model={self.model!r}, sketcher={self.sketcher!r}, generator={self.generator!r}: give either model, "
                "or sketcher and generator."
            )
        return self

    @property
    def folders(self) -> dict[str, str]:
        """The models given, by option, with local paths made absolute: servers run in other folders."""
        given = {"model": self.model, "sketcher": self.sketcher, "generator": self.generator}
        return {option: storage.absolute(folder) for option, folder in given.items() if folder is not None}


class Answerer:
    """Completes prompts with models that are loaded once. Safe to call from several threads."""

    def __init__(self, sketcher: Engine | None, generator: Engine, cascade: CascadeConfig | None = None) -> None:
        """Without a `sketcher`, `generator` is a plain model."""
        self._sketcher, self._generator = sketcher, generator
        self._cascade = cascade or CascadeConfig()

    @classmethod
    def load(cls, config: ModelConfig) -> Answerer:
        """Load the models.

        Raises:
            InputError: when a folder holds no model that can be served.
            SchemaVersionError: when a folder was written by another version.
            TokenizerMismatchError: when a stage of the cascade does not know the special tokens.
        """
        if config.model is not None:
            return cls(None, TransformersEngine(config.model, config.engine), config.cascade)
        assert config.sketcher is not None
        assert config.generator is not None
        sketcher, generator = (_load_stage(folder, config.engine) for folder in (config.sketcher, config.generator))
        return cls(sketcher, generator, config.cascade)

    def answer(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        *,
        cancelled: threading.Event | None = None,
        deadline_s: float | None = None,
        on_event: Callable[[int, Event], None] | None = None,
    ) -> list[CascadeAnswer]:
        """One answer per prompt, in order. Calls from many threads are decoded together.

        `deadline_s` is a reading of `time.monotonic`. `on_event` is called with the prompt's place and the event, in
        order for each prompt, from the calling thread or, for several prompts, from threads of this answerer; what it
        raises ends the request. Every choice's last `TextDrawn` comes before this returns.

        Raises:
            RequestError: 400, for a prompt that does not fit the window, or an option that these models cannot serve.
            RequestCancelledError: `cancelled` was set. The work ends with the token being drawn.
            DeadlineError: the deadline passed. The work ends with the token being drawn.
        """
        answers = []
        for place, prompt in enumerate(prompts):
            check_wanted(cancelled, deadline_s)
            if self._sketcher is None:
                answer = run_single(prompt, sampling, self._generator)
            else:
                answer = run_cascade(prompt, sampling, self._sketcher, self._generator, self._cascade)
            if on_event is not None:
                for index, choice in enumerate(answer.choices):
                    on_event(place, TextDrawn(index, choice.text, choice.finish_reason))
            answers.append(answer)
        check_wanted(cancelled, deadline_s)
        return answers


def check_wanted(cancelled: threading.Event | None, deadline_s: float | None) -> None:
    """Raise what ends the work, if it is not wanted any more."""
    if cancelled is not None and cancelled.is_set():
        raise RequestCancelledError(499, "The request was cancelled.", None, "cancelled")
    if deadline_s is not None and time.monotonic() >= deadline_s:
        raise DeadlineError(504, "No answer by the deadline. Ask for fewer tokens or samples.", None, "timeout")


def _load_stage(folder: str, config: EngineConfig) -> TransformersEngine:
    """A model of the cascade: one that does not know the special tokens cannot have been trained for it."""
    engine = TransformersEngine(folder, config)
    needed = (prompt_format.SEPARATOR, *(prompt_format.special_token(kind) for kind in PLACEHOLDER_KINDS))
    missing = [token for token in needed if engine.tokenizer.token_to_id(token) is None]
    if missing:
        raise TokenizerMismatchError(
            f"{folder}: its tokenizer lacks {', '.join(missing)}, so it is no sketcher or generator. Serve it as "
            "`model`, or train it with `cert-ray train` on the sketcher or generator view."
        )
    return engine
