"""What stands behind a front door: one model, or a sketcher and a generator, in one process.

A single model is a plain one, unless its config.json says that it was trained on the view `context_first`: then it is
both stages of a cascade.

In: model folders. Out: an `Answerer` that completes prompts one by one. HTTP, Ray and evaluation all use this, so they
give the same answers.

With `retrieve`, the models read documentation of the library ahead of a prompt, as in training. A prompt is read alone
if it has a suffix, if the log-probabilities of its own tokens are asked for, or if the window has no room for more.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from typing import Final, Self

import pydantic

from cert_ray import storage
from cert_ray.config import Config
from cert_ray.errors import CertRayError, ConfigError, DeadlineError, RequestCancelledError
from cert_ray.retrieval.retriever import RetrieveConfig, Retriever
from cert_ray.serving.answers import CascadeAnswer, Listener
from cert_ray.serving.batching import Turns
from cert_ray.serving.cascade import run_cascade, run_context_first
from cert_ray.serving.cascade_config import CascadeConfig
from cert_ray.serving.engines import Engine, EngineConfig, Steps
from cert_ray.serving.events import Event, TextDrawn
from cert_ray.serving.model_checks import check_models
from cert_ray.serving.model_folders import Described, trained_view
from cert_ray.serving.sampling import Mode, Sampling
from cert_ray.serving.single import run_single
from cert_ray.serving.transformers_engine import TransformersEngine
from cert_ray.serving.vllm_engine import VllmEngine
from cert_ray.tokens.encoding import MODEL_VIEW, View

# Limits of the kept answers: tokens per entry, and how many tokens one counts for when kept with its log-probabilities.
# Measured with SmolLM2's tokenizer: 35 bytes a token without them, 340 to 860 with them.
_ANSWER_TOKENS: Final = 1_024
_TOLD_WEIGHT: Final = 20


class ModelConfig(Config):
    """Which models answer: either `model`, or `sketcher` and `generator`. All are folders or URLs.

    Where an option depends on what `model` was trained on, its config.json is read, if it lies on this machine.
    """

    model: str | None = None
    sketcher: str | None = None
    generator: str | None = None
    cascade: CascadeConfig = CascadeConfig()
    engine: EngineConfig = EngineConfig()
    answer_cache: int = pydantic.Field(default=1024, ge=0)  # answers kept for repeated requests
    prompts_at_once: int = pydantic.Field(default=16, ge=1)  # in calls with several prompts
    retrieve: RetrieveConfig | None = None  # documentation of a library that the models were trained to read

    @pydantic.model_validator(mode="after")
    def _check_models(self) -> Self:
        given = (self.model is not None, self.sketcher is not None, self.generator is not None)
        if given not in ((True, False, False), (False, True, True)):
            raise ConfigError(
                f"model={self.model!r}, sketcher={self.sketcher!r}, generator={self.generator!r}: give either model, "
                "or sketcher and generator."
            )
        # The model may not lie on the front door's machine, or its store be closed to it: then the engine refuses.
        if self.model is not None and storage.is_local(self.model) and _is_at_hand(self.model):
            self._check_model(self.model)
        if self.cascade.mode is Mode.CONSTRAINED and self.engine.kind == "vllm":
            raise ConfigError(
                "cascade.mode='constrained' with engine.kind='vllm': that engine cannot make an answer follow its "
                "sketch. Use engine.kind='transformers', or cascade.mode='cascade'."
            )
        return self

    def _check_model(self, model: str) -> None:
        """Refuse cascade options that one model cannot honour. Options written out with their default values pass."""
        cascade = self.cascade
        asked = {
            name: f"cascade.{name}={_shown(getattr(cascade, name))}"
            for name, field in CascadeConfig.model_fields.items()
            if getattr(cascade, name) != field.default
        }
        if not asked:
            return
        if not _is_context_first(model):
            raise ConfigError(
                f"{', '.join(asked.values())} with model={model!r}: one plain model has no cascade options. A model "
                f"trained for both stages has them, but {storage.join(model, 'config.json')} does not say "
                f'"{MODEL_VIEW}": "{View.CONTEXT_FIRST.value}". Give such a model, or sketcher and generator, or leave '
                f"out cascade.{' and cascade.'.join(asked)}; a request's own `stop` and `best_of` work with any model."
            )
        layout = [asked[name] for name in ("kind", "routing", "sketch_scope") if name in asked]
        if layout:
            raise ConfigError(
                f"{', '.join(layout)} with model={model!r}, which reads the context first, as code: it has no sketch "
                "of the context, writes only the kind of sketch that it was trained on, and marks where sketches "
                "begin and end with special tokens. Leave these options out."
            )

    @property
    def folders(self) -> dict[str, str]:
        """The models given, by option, with local paths made absolute: servers run in other folders."""
        given = {"model": self.model, "sketcher": self.sketcher, "generator": self.generator}
        return {option: storage.absolute(folder) for option, folder in given.items() if folder is not None}

    def check(self, name: str | None = None) -> dict[str, Described]:
        """What the models' folders say about them, for `Answerer.load`. `name` is what they go by among several.

        Raises:
            CertRayError: as `Answerer.load`, when they cannot be loaded.
        """
        return self._check(self.folders, name)

    def _check(self, folders: Mapping[str, str], name: str | None) -> dict[str, Described]:
        found = check_models(folders, self.engine, name)
        if self.model is not None and found:
            self._check_model(self.model)  # now that it is at hand
        return found

    def check_in_reach(self, name: str | None = None) -> str | None:
        """`check` the folders that can be read from here. Returns why others cannot be, or None if all can.

        Other machines may have a folder, the rights, or the credentials that this process lacks. What is here and
        readable must be a model.
        """
        away = {role: _why_out_of_reach(folder) for role, folder in self.folders.items()}
        try:
            self._check({role: folder for role, folder in self.folders.items() if away[role] is None}, name)
        except CertRayError:
            raise
        except Exception as error:
            if all(map(storage.is_local, self.folders.values())):
                raise
            return f"{type(error).__name__}: {error}"  # without credentials, a store's driver may raise anything
        return next((why for why in away.values() if why is not None), None)

    def absolute(self) -> Self:
        """The same configuration, for a process in another folder."""
        retrieve = None if self.retrieve is None else self.retrieve.absolute()
        return self.model_copy(update={**self.folders, "retrieve": retrieve})

    def pinned(self) -> Self:
        """The same configuration, tied to the documentation as it is now: loading it with another one is refused.

        Raises:
            InputError: when there is none, or it is not the one this configuration is tied to.
        """
        return self if self.retrieve is None else self.model_copy(update={"retrieve": self.retrieve.pinned()})


class Answerer:
    """Completes prompts with models that are loaded once. Safe to call from several threads."""

    steps: Sequence[Steps] = ()  # what runs the models' steps

    def __init__(
        self,
        sketcher: Engine | None,
        generator: Engine,
        cascade: CascadeConfig | None = None,
        answer_cache: int = 0,
        prompts_at_once: int = 16,
        retriever: Retriever | None = None,
        *,
        context_first: bool = False,
    ) -> None:
        """Without a `sketcher`, `generator` is a plain model or, with `context_first`, both stages.

        `answer_cache` is how many answers are kept.
        """
        self._retriever = retriever
        self._context_first = context_first
        self._sketcher, self._generator = sketcher, generator
        self._cascade = cascade or CascadeConfig()
        self._answers = AnswerCache(answer_cache)
        self._pool = ThreadPoolExecutor(prompts_at_once, thread_name_prefix="cert-ray-prompt")

    @classmethod
    def load(cls, config: ModelConfig) -> Answerer:
        """Load the models. Their folders are checked first: `config.check` reports before any weights are read.

        Raises:
            InputError: when a folder holds no model that can be served.
            SchemaVersionError: when a folder was written by another version.
            TokenizerMismatchError: when a stage of the cascade does not know the special tokens.
            ConfigError: when an engine option does not suit a model, or a model is both stages but given as one.
        """
        retriever = None if config.retrieve is None else Retriever.load(config.retrieve)
        described = config.check()
        turns = Turns()
        engines = {role: load_engine(one.folder, config.engine, turns, one) for role, one in described.items()}
        kept = (config.cascade, config.answer_cache, config.prompts_at_once, retriever)
        if config.model is not None:
            is_both = described["model"].view == View.CONTEXT_FIRST
            answerer = cls(None, engines["model"], *kept, context_first=is_both)
        else:
            answerer = cls(engines["sketcher"], engines["generator"], *kept)
        answerer.steps = (turns, *(engine for engine in engines.values() if isinstance(engine, VllmEngine)))
        return answerer

    @property
    def cache_hits(self) -> int:
        """Prompts answered from kept answers."""
        return self._answers.hits

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

        `deadline_s` is a reading of `time.monotonic`. `on_event` is called with the prompt's index and the event, in
        order for each prompt: from the calling thread or, for several prompts, from threads of this answerer. An
        exception from it ends the request. Every choice's last `TextDrawn` comes before this returns.

        Raises:
            RequestError: 400, for a prompt that does not fit the window, or an option that these models cannot serve.
            RequestCancelledError: `cancelled` was set. Work stops with the token being drawn.
            DeadlineError: the deadline passed. Work stops with the token being drawn.
        """
        given_up = threading.Event()  # one prompt's failure ends the others

        def check() -> None:
            check_wanted(cancelled, deadline_s)
            check_wanted(given_up, None)

        def answer_one(place: int, prompt: str) -> CascadeAnswer:
            try:
                return self._answer_one(prompt, sampling, Listener(check, on_event and partial(on_event, place)))
            except BaseException:
                given_up.set()
                raise

        if len(prompts) == 1:
            return [answer_one(0, prompts[0])]
        futures = [self._pool.submit(answer_one, place, prompt) for place, prompt in enumerate(prompts)]
        wait(futures)
        errors = [error for error in (future.exception() for future in futures) if error is not None]
        if errors:  # the first that is a cause, not a consequence
            raise next((error for error in errors if not isinstance(error, RequestCancelledError)), errors[0])
        return [future.result() for future in futures]

    def _answer_one(self, prompt: str, sampling: Sampling, listener: Listener) -> CascadeAnswer:
        listener.check()
        known = self._answers.find(prompt, sampling)
        if known is not None:
            _tell_again(known, listener)
            return known
        ahead = self._documentation(prompt, sampling)
        if self._context_first:
            answer = run_context_first(prompt, sampling, self._generator, self._cascade, listener, ahead)
        elif self._sketcher is None:
            answer = run_single(prompt, sampling, self._generator, listener, ahead)
        else:
            answer = run_cascade(prompt, sampling, self._sketcher, self._generator, self._cascade, listener, ahead)
        self._answers.keep(prompt, sampling, answer)
        return answer

    def _documentation(self, prompt: str, sampling: Sampling) -> str:
        """The documentation retrieved for `prompt`, to go ahead of it; "" when none is wanted."""
        scored = sampling.echo and (sampling.logprobs is not None or sampling.max_tokens == 0)
        if self._retriever is None or sampling.suffix is not None or scored:
            return ""
        return self._retriever.header(prompt)


class AnswerCache:
    """The latest answers, by prompt and options: the same request gets the same answer.

    The seed is one of the options, except for greedy answers, which it does not change. Answers drawn with a seed that
    the request did not name are not kept: only a client that was told the seed could ask for them again.
    Long answers count as several: 200 samples of 1,000 tokens with their log-probabilities take 170 MB.
    """

    def __init__(self, most: int) -> None:
        """Keep at most `most` answers, and at most `most` times `_ANSWER_TOKENS` tokens in total."""
        self.hits = 0
        self._most, self._tokens = most, 0
        self._kept: OrderedDict[tuple[str, Sampling], CascadeAnswer] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, prompt: str, sampling: Sampling) -> CascadeAnswer | None:
        """The answer kept for this request, marked as from the cache; counts a hit."""
        with self._lock:
            key = (prompt, _options(sampling))
            answer = self._kept.get(key)
            if answer is None:
                return None
            self.hits += 1
            self._kept.move_to_end(key)
            return replace(answer, from_cache=True)

    def keep(self, prompt: str, sampling: Sampling, answer: CascadeAnswer) -> None:
        """Keep `answer`, unless it is too large by itself; the least recently used ones go."""
        comes_again = sampling.is_seeded or sampling.temperature == 0
        if self._most == 0 or not comes_again or _weight(answer) > self._most * _ANSWER_TOKENS:
            return
        key = (prompt, _options(sampling))
        with self._lock:
            replaced = self._kept.pop(key, None)
            self._kept[key] = answer
            self._tokens += _weight(answer) - (0 if replaced is None else _weight(replaced))
            while len(self._kept) > self._most or self._tokens > self._most * _ANSWER_TOKENS:
                self._tokens -= _weight(self._kept.popitem(last=False)[1])


def _options(sampling: Sampling) -> Sampling:
    """The options that an answer depends on."""
    seed = 0 if sampling.temperature == 0 else sampling.seed
    return sampling.model_copy(update={"seed": seed, "is_seeded": True})


def _weight(answer: CascadeAnswer) -> int:
    """The size of `answer` in tokens. Identical samples are one object."""
    distinct = {id(choice): choice for choice in answer.choices}.values()
    tokens = sum(len(one.ids) * (1 if one.logprobs is None else _TOLD_WEIGHT) for one in distinct)
    return tokens + (0 if answer.prompt_logprobs is None else _TOLD_WEIGHT * len(answer.prompt_logprobs.tokens))


def _tell_again(answer: CascadeAnswer, listener: Listener) -> None:
    if listener.tell is None:
        return
    if answer.chosen is not None:
        listener.tell(answer.chosen)
    for index, choice in enumerate(answer.choices):
        listener.tell(TextDrawn(index, choice.text, choice.finish_reason))


def check_wanted(cancelled: threading.Event | None, deadline_s: float | None) -> None:
    """Raise the error that ends the work, if nobody wants it any more."""
    if cancelled is not None and cancelled.is_set():
        raise RequestCancelledError(499, "The request was cancelled.", None, "cancelled")
    if deadline_s is not None and time.monotonic() >= deadline_s:
        raise DeadlineError(504, "No answer by the deadline. Ask for fewer tokens or samples.", None, "timeout")


def load_engine(
    folder: str, config: EngineConfig, turns: Turns | None = None, described: Described | None = None
) -> Engine:
    """The engine that the configuration names, over the model in `folder`; see `load_model` for `described`."""
    if config.kind == "vllm":
        return VllmEngine(folder, config)
    return TransformersEngine(folder, config, turns, described)


def _shown(value: object) -> str:
    """An option's value as a user writes it: an enumeration's member is a string."""
    return repr(str(value)) if isinstance(value, str) else repr(value)


def _is_at_hand(folder: str) -> bool:
    return storage.exists(storage.join(folder, "config.json"))


def _why_out_of_reach(folder: str) -> str | None:
    """Why a local folder cannot be read from here, or None. For a store, its driver says."""
    if not storage.is_local(folder):
        return None
    path = storage.local_path(folder)
    if not os.access(path, os.F_OK):  # `Path.exists` raises below a folder that may not be entered
        return f"{folder} does not exist on this machine"
    if path.is_dir() and not (
        os.access(path, os.R_OK | os.X_OK) and all(os.access(file, os.R_OK) for file in path.iterdir())
    ):
        return f"this user has no permission to read {folder}"
    return None


def _is_context_first(folder: str) -> bool:
    return trained_view(folder) == View.CONTEXT_FIRST
