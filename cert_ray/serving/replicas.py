"""What a replica of the deployment `engine` does: it holds models, and answers what front doors ask of them.

In: a `ServeConfig`. Out: answers, or events and then the answers. A single model is loaded at the start. Of several,
all are checked first, and each is loaded when asked for. Requests for one that cannot be loaded get the reason, so that
a damaged folder stops no other model. No Ray in here: `on_ray.py` has resources and which models stay in memory.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from transformers.utils.logging import disable_progress_bar

from cert_ray.errors import RequestError
from cert_ray.serving.answering import Answerer
from cert_ray.serving.answers import CascadeAnswer
from cert_ray.serving.backends import Bridge, Told
from cert_ray.serving.deployment import ServeConfig, ServedModel
from cert_ray.serving.engines import Steps
from cert_ray.serving.sampling import Sampling
from cert_ray.serving.unfit_models import UnfitModels

_FAILURES = 3  # of an engine in a row, not caused by the request: then it is restarted
# A step that takes longer hangs, and its engine is restarted. Assumed: loading is not a step, and a step reads part of
# a long prompt; 256 tokens of a model of 7B parameters take a CPU of 0.1 TFLOP/s 36 s.
_HANGS_S = 120.0


class Engines:
    """The models of one replica. Loading and answering run in threads, so that queues and health checks are served."""

    @staticmethod
    def check(config: ServeConfig) -> None:
        """Raise, before anything is deployed, what `ServeConfig.check_models` raises."""
        config.check_models()

    def __init__(self, options: Mapping[str, Any]) -> None:
        disable_progress_bar()  # for loading weights: without a terminal, each step of it would be a line
        self._config = config = ServeConfig.from_mapping(options, "engine deployment")
        self._models = config.models
        # Twice what Serve lets in, so that a cancelled request does not keep the next one from a thread.
        self._bridge = Bridge(2 * config.max_ongoing_requests)
        self._failures = 0
        self._steps: weakref.WeakSet[Steps] = weakref.WeakSet()  # a thread that hangs holds its own, dropped or not
        self._only: Answerer | None = None
        self._unfit = UnfitModels()
        self._loading: dict[str, asyncio.Future[Answerer]] = {}
        # One at a time: if transformers loads two at once, one may lack weights.
        self._loads = ThreadPoolExecutor(1, thread_name_prefix="loading")
        if len(self._models) == 1:  # now, so that a replica that reports ready is ready
            (model,) = self._models.values()
            self._only = self._watched(self.load_now(model))
        else:
            self._look_at_all()

    def _look_at_all(self) -> None:
        """Find the models that cannot be loaded. If none can, refuse to start.

        This costs reading a tokenizer for each: 0.13 CPU-seconds for one of 49,152 tokens (SmolLM2's, without its
        weights; Intel Xeon, 2026-11-26), beside the several seconds of any engine's start.
        """
        for name in self._models:
            try:
                self._look_at(name)
            except Exception as error:  # noqa: BLE001 - a store's driver raises whatever it likes
                self._unfit.add(name, error)
                last = error
        if len(self._unfit) == len(self._models):
            raise last

    def _look_at(self, name: str) -> None:
        """Raise what `check` raises for the model `name`."""
        self.check(self._config.model_copy(update={"models": {name: self._models[name]}}))

    def load_now(self, model: ServedModel) -> Answerer:
        """The answerer of `model`."""
        return Answerer.load(model)

    async def load(self, name: str) -> Answerer:
        """The answerer of one of several models. The deployment keeps the most recently used ones.

        A loading thread cannot be stopped: if its request goes away, the next one for the same model waits for it.
        """
        self._unfit.refuse(name)  # for a request that waited here while another one's attempt failed
        loading = self._loading.get(name)
        if loading is None:
            loading = self._loading[name] = asyncio.ensure_future(self._load(name))
            loading.add_done_callback(lambda done: done.cancelled() or done.exception())  # though nobody waits any more
        return await asyncio.shield(loading)

    async def _load(self, name: str) -> Answerer:
        try:
            load = asyncio.get_running_loop().run_in_executor(self._loads, self.load_now, self._models[name])
            return self._watched(await load)
        except Exception as error:
            raise self._unfit.add(name, error) from error
        finally:
            del self._loading[name]

    def _watched(self, answerer: Answerer) -> Answerer:
        """`answerer`, whose steps `check_health` watches from now on."""
        self._steps.update(answerer.steps)
        return answerer

    async def _answerer(self, name: str) -> Answerer:
        """The answerer of the model `name`.

        Raises:
            RequestError: 500 with the reason, if it is one of several and cannot be loaded.
        """
        if self._only is not None:
            return self._only
        self._unfit.refuse(name)
        if name in self._unfit:  # checked before Serve makes room for it, at another model's cost
            self._unfit.postpone(name)
            try:
                await asyncio.to_thread(self._look_at, name)
            except Exception as error:
                raise self._unfit.add(name, error) from error
            self._unfit.remove(name)
        return await self.load(name)

    async def answer(
        self, model: str, prompts: Sequence[str], options: dict[str, Any], timeout_s: float
    ) -> list[CascadeAnswer]:
        """One answer per prompt, in order."""
        answerer = await self._answerer(model)
        with self._failures_counted():
            return await self._bridge.answer(answerer, prompts, Sampling(**options), timeout_s)

    async def stream(
        self, model: str, prompts: Sequence[str], options: dict[str, Any], timeout_s: float
    ) -> AsyncGenerator[Told, None]:
        """The same, reported while it is drawn."""
        answerer = await self._answerer(model)
        with self._failures_counted():
            async for told in self._bridge.stream(answerer, prompts, Sampling(**options), timeout_s):
                yield told

    @contextmanager
    def _failures_counted(self) -> Iterator[None]:
        """Count consecutive requests that fail inside the engine. A refusal is neither a failure nor a success."""
        try:
            yield
        except RequestError:
            raise
        except Exception:
            self._failures += 1
            raise
        self._failures = 0

    def check_health(self) -> None:
        """Raise when this engine fails whatever it is asked, or hangs; Serve then starts another in its place."""
        if self._failures >= _FAILURES:
            raise RuntimeError(f"the last {self._failures} requests failed inside the engine")
        step_s = max((steps.step_s for steps in self._steps), default=0.0)
        if step_s > _HANGS_S:
            raise RuntimeError(f"the engine hangs: its step takes {step_s:.0f} s so far")
