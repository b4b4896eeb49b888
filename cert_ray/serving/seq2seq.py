"""Completions by a sequence-to-sequence model (CodeT5, PLBART): its encoder reads the prompt, its decoder continues it.

In: a Hugging Face folder (safetensors, whatever tokenizer files AutoTokenizer reads). Out: a `complete(prompts, n)`.
For evaluation: each prompt runs by itself, through transformers' own `generate`. A prompt's samples depend on the
options, the prompt and `n` (samples are drawn side by side), not on what was asked before.

A model trained to restore masked text wants its mask where it is to write. `mask` is put after the prompt:
`<extra_id_0>` for CodeT5, `<mask>` for PLBART. PLBART then writes the whole text again; a prompt at the beginning of an
answer is removed.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any, Final

import torch
import xxhash
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from cert_ray import storage
from cert_ray.errors import InputError
from cert_ray.serving.boundaries import cut_at
from cert_ray.serving.completers import CompleterConfig
from cert_ray.serving.engines import EngineConfig, check_length

# Samples decoded side by side, to bound memory. Assumed.
_TOGETHER: Final = 50


def is_seq2seq(folder: str) -> bool:
    """Whether the model in `folder`, local or remote, has an encoder and a decoder; False where nothing says so."""
    config_url = storage.join(folder, "config.json")
    if not storage.exists(config_url):
        return False
    try:
        return bool(json.loads(storage.read_text(config_url)).get("is_encoder_decoder"))
    except (ValueError, AttributeError):
        return False  # loading it as a causal model reports what is wrong


class Seq2SeqCompleter:
    """A `complete` by the model in a local folder. Safe to call from several threads, which take turns."""

    def __init__(
        self,
        folder: str,
        config: CompleterConfig | None = None,
        engine: EngineConfig | None = None,
        mask: str | None = None,
    ) -> None:
        """Load the model.

        Raises:
            InputError: when transformers cannot load it, or it has no safetensors.
        """
        self._config, self._mask = config or CompleterConfig(), mask
        self._model, self._tokenizer = _load(folder, engine or EngineConfig())
        self._lock = threading.Lock()  # torch's random state belongs to the whole process

    def at(self, config: CompleterConfig) -> Seq2SeqCompleter:
        """The same loaded model with other options."""
        other = object.__new__(Seq2SeqCompleter)
        other.__dict__.update(self.__dict__, _config=config)
        return other

    def __call__(self, prompts: list[str], n: int) -> list[list[str]]:
        """`n` completions for each prompt, in order.

        Raises:
            RequestError: 400, when a prompt does not fit the encoder.
        """
        return [self._complete_one(prompt, n) for prompt in prompts]

    @torch.inference_mode()
    def _complete_one(self, prompt: str, n: int) -> list[str]:
        config = self._config
        encoded = self._tokenizer(prompt + (self._mask or ""), return_tensors="pt").to(self._model.device)
        window = getattr(self._model.config, "max_position_embeddings", None)
        if isinstance(window, int):  # T5's positions are relative
            check_length(encoded["input_ids"].shape[1], window)
        options: dict[str, Any] = {"max_new_tokens": config.max_tokens, "num_beams": 1, "do_sample": False}
        if config.temperature > 0:
            options |= {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
        inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        texts: list[str] = []
        with self._lock, torch.random.fork_rng():
            torch.manual_seed(xxhash.xxh3_64_intdigest(prompt.encode(), seed=config.seed) >> 1)
            while len(texts) < n:
                some = min(n - len(texts), _TOGETHER) if config.temperature > 0 else 1
                ids = self._model.generate(**inputs, **options, num_return_sequences=some)
                drawn = self._tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                texts += drawn if config.temperature > 0 else drawn * n
        return [cut_at(text.removeprefix(prompt), config.stop) for text in texts]


def _load(folder: str, engine: EngineConfig) -> tuple[Any, Any]:
    path = Path(storage.local_path(folder)) if storage.is_local(folder) else None
    cure = "Give a local folder (copy a remote one) that transformers saved, with safetensors and tokenizer."
    if path is None or not any(path.glob("*.safetensors")):
        raise InputError(folder, "no local folder with safetensors weights", cure)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        dtype = getattr(torch, engine.dtype)
        model = AutoModelForSeq2SeqLM.from_pretrained(path, dtype=dtype, use_safetensors=True, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(folder, f"transformers cannot load it: {error}", cure) from error
    device = engine.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval(), tokenizer
