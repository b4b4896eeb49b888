"""An engine over vLLM, for NVIDIA GPUs and the architectures that vLLM runs (Llama, GPT-2 and the like): extra `vllm`.

In: a local Hugging Face folder. Out: an `Engine`. NOT RUN by this project on any GPU: it is written after vLLM's
published interface (`AsyncLLM`, `SamplingParams`), and its test stands a fake in vLLM's place. vLLM batches requests
and shares their prompts by itself. Other than `TransformersEngine`, it draws each sample by itself and with vLLM's
random numbers, so a seed gives another answer; it tells text and votes at the end only; blanks at the end of a prompt
stay in the prompt; and prompts are not scored.
"""

from __future__ import annotations

import asyncio
import importlib
import threading
import uuid
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoConfig

from cert_ray import storage
from cert_ray.errors import ConfigError, InputError, RequestError
from cert_ray.serving.boundaries import cut_at
from cert_ray.serving.engines import (
    DEFAULT_HOOKS,
    Completion,
    Drawn,
    EngineConfig,
    FinishReason,
    Hooks,
    Work,
    check_length,
)
from cert_ray.serving.joint import tell_logprobs
from cert_ray.serving.model_folders import find_infill, window
from cert_ray.sketching import prompt_format

_LOOK_S = 0.02  # between two looks at whether the answer is still wanted


class VllmEngine:
    """An `Engine` whose model runs in vLLM."""

    def __init__(self, folder: str, config: EngineConfig) -> None:
        """Start vLLM over the model in `folder`.

        Raises:
            InputError: when the folder is not local.
            ConfigError: when vLLM is not installed.
        """
        if not storage.is_local(folder):
            raise InputError(folder, "vLLM wants a local folder", "Copy the model to this machine.")
        try:
            engine_module = importlib.import_module("vllm.v1.engine.async_llm")
            self._vllm = importlib.import_module("vllm")
        except ImportError as error:
            raise ConfigError("engine.kind='vllm': vLLM is not installed. Install cert-ray[vllm].") from error
        path = storage.local_path(folder)
        self._tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        self._context_tokens = window(folder, AutoConfig.from_pretrained(path, trust_remote_code=False))
        self._infill_tokens = find_infill(folder, self._tokenizer, config.infill)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="cert-ray-vllm", daemon=True).start()
        options = self._vllm.AsyncEngineArgs(
            model=str(path), dtype=config.dtype, enable_prefix_caching=True, trust_remote_code=False
        )

        async def start() -> Any:
            return engine_module.AsyncLLM.from_engine_args(options)

        self._engine = asyncio.run_coroutine_threadsafe(start(), self._loop).result()

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the folder."""
        return self._tokenizer

    @property
    def context_tokens(self) -> int:
        """The model's window."""
        return self._context_tokens

    @property
    def infill_tokens(self) -> tuple[int, int, int] | None:
        """The tokens of `EngineConfig.infill`."""
        return self._infill_tokens

    @property
    def takes_drafts(self) -> bool:
        """Never: vLLM is given no tokens that an answer may hold."""
        return False

    def draw(self, work: Work, hooks: Hooks = DEFAULT_HOOKS) -> Drawn:
        """Draw the samples; see `Engine.draw`."""
        if work.score_prompt or work.max_tokens == 0:
            raise RequestError(400, "echo with logprobs: vLLM's engine does not score prompts.", "echo", "unsupported")
        if work.template is not None:
            raise RequestError(400, "mode constrained: vLLM's engine cannot; ask for cascade.", "mode", "unsupported")
        blanks = tuple(prompt_format.encode_code(self._tokenizer, work.start)) if work.start else ()
        prompt = [*work.prompt, *blanks]
        check_length(len(prompt), self._context_tokens)
        future = asyncio.run_coroutine_threadsafe(self._generate(prompt, work, hooks), self._loop)
        output = future.result()
        samples = tuple(self._completion(one, work) for one in sorted(output.outputs, key=lambda one: one.index))
        return Drawn(samples, sum(len(sample.ids) for sample in samples), output.num_cached_tokens or 0)

    async def _generate(self, prompt: list[int], work: Work, hooks: Hooks) -> Any:
        name = uuid.uuid4().hex
        task = asyncio.ensure_future(self._last_output(prompt, work, name))
        try:
            while not task.done():
                hooks.check()
                await asyncio.wait([task], timeout=_LOOK_S)
        except BaseException:
            task.cancel()
            await self._engine.abort(name)
            raise
        return task.result()

    async def _last_output(self, prompt: list[int], work: Work, name: str) -> Any:
        options = self._vllm.SamplingParams(
            n=work.n,
            max_tokens=min(work.max_tokens, self._context_tokens - len(prompt)),
            temperature=work.temperature,
            top_p=work.top_p,
            seed=work.seed,
            stop=list(work.stop),
            stop_token_ids=sorted(work.stop_token_ids),
            logit_bias=dict.fromkeys(prompt_format.marker_ids(self._tokenizer), -100.0) if work.code_only else None,
            include_stop_str_in_output=True,  # as the other engine: what completes a stop string was drawn
            skip_special_tokens=True,
            logprobs=work.logprobs or 0,
        )
        last = None
        async for output in self._engine.generate({"prompt_token_ids": prompt}, options, name):
            last = output
        assert last is not None, "vLLM ends a request with an output"
        return last

    def _completion(self, one: Any, work: Work) -> Completion:
        special = work.stop_token_ids | {self._tokenizer.token_to_id(prompt_format.END_OF_TEXT)}
        ids = tuple(one.token_ids)
        if ids and ids[-1] in special:
            ids = ids[:-1]
        whole = prompt_format.decode_code(self._tokenizer, ids)
        text = cut_at(whole, work.stop)
        drawn = [row[token].logprob for row, token in zip(one.logprobs, one.token_ids, strict=True)]
        told = None
        if work.logprobs is not None:
            tops = [tuple((token, entry.logprob) for token, entry in row.items()) for row in one.logprobs]
            told = tell_logprobs(self._tokenizer, ids, drawn[: len(ids)], tops[: len(ids)], "", len(text))
        reason: FinishReason = "stop" if one.finish_reason == "stop" or len(text) < len(whole) else "length"
        return Completion(ids, text, reason, sum(drawn) / max(1, len(drawn)), told)
