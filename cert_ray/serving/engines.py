"""From a prompt's tokens to n sampled completions, by a Hugging Face causal language model.

In: token numbers and sampling options. Out: `Completion`s, in the order of the samples. An engine knows nothing of
sketches: `cascade.py` gives it prompts and reads its tokens. Only safetensors are loaded, never a model's code.

The prompt is read once and its cache is repeated for the n samples; a sample leaves the batch as soon as it ends.
Each prompt is decoded by itself: batching several prompts together is not done here.
"""

from __future__ import annotations

import copy
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import pydantic
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from cert_ray import storage
from cert_ray.config import Config
from cert_ray.errors import InputError, RequestError
from cert_ray.gpt_neo import fuse_attention
from cert_ray.manifests import is_finished, read_manifest
from cert_ray.serving.boundaries import FirstTokens, StopWatch, cut_at, drop_start
from cert_ray.serving.sampling import draw_tokens, token_logprobs, uniform_streams
from cert_ray.sketching import prompt_format

FinishReason = Literal["stop", "length"]
_Draw = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # logits [B, V], uniform numbers [B] -> tokens [B]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log-probabilities of a text's tokens, in the fields of OpenAI's `logprobs` object, all equally long.

    `token_logprobs` are under the model itself (temperature 1, no nucleus); None for a prompt's first token.
    `top_logprobs` hold the alternatives asked for and the token itself. `text_offset` counts characters from the
    beginning of the text that the tokens belong to (the answer, or the prompt).
    """

    tokens: tuple[str, ...]
    token_logprobs: tuple[float | None, ...]
    top_logprobs: tuple[dict[str, float] | None, ...]
    text_offset: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """One sample. `text` is cut at the stop string; `ids` are all tokens drawn, end of text apart.

    `mean_logprob` is the mean natural log-probability of the tokens drawn, end of text included, under the model.
    `logprobs` is None unless asked for; its tokens are those that `text` begins in.
    """

    ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    mean_logprob: float
    logprobs: TokenLogprobs | None = None


class Engine(Protocol):
    """What samples completions. `context_tokens` bounds prompt and answer together."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def context_tokens(self) -> int: ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        n: int,
        max_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        stop: Sequence[str],
        starts: Sequence[str] | None = None,
    ) -> list[list[Completion]]:
        """`n` completions for each prompt. `starts` are blanks that the answers must begin with, one per prompt."""
        ...


class EngineConfig(Config):
    """How a model is held in memory and run."""

    device: str | None = None  # None: the first GPU, else the CPU
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    threads: int | None = pydantic.Field(default=None, ge=1)  # torch's intra-op threads; None leaves torch's choice
    # Samples decoded side by side. 64 rows of a 110M GPT-Neo at 1,024 tokens hold 4.8 GB of fp32 cache.
    max_rows: int = pydantic.Field(default=64, ge=1)


class TransformersEngine:
    """An `Engine` over a Hugging Face folder (safetensors, tokenizer.json). Safe to call from several threads."""

    def __init__(self, folder: str, config: EngineConfig | None = None) -> None:
        """Load the model in `folder`, local or remote.

        Raises:
            InputError: when it is no such folder, or holds no safetensors or no tokenizer.json.
            SchemaVersionError: when its manifest is of another version, or not that of a model.
        """
        self.config = config or EngineConfig()
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        device = self.config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._model, self._tokenizer = _load(folder, getattr(torch, self.config.dtype))
        self._model.to(device).eval()
        self._device = torch.device(device)
        self._context_tokens = _window(folder, self._model.config)
        self._end_ids = _end_ids(self._model, self._tokenizer)
        self._first_tokens: FirstTokens | None = None
        self._lock = threading.Lock()  # one model, one decoding at a time: two would only slow each other

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the folder."""
        return self._tokenizer

    @property
    def context_tokens(self) -> int:
        """The model's window."""
        return self._context_tokens

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        n: int,
        max_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        stop: Sequence[str],
        starts: Sequence[str] | None = None,
    ) -> list[list[Completion]]:
        """`n` completions for each prompt, in order; see `Engine.generate`.

        An answer that reaches the window ends there, with finish_reason "length".

        Raises:
            RequestError: 400, when a prompt leaves no room for one token.
        """
        answers = []
        for prompt, start in zip(prompts, starts or [""] * len(prompts), strict=True):
            ids = list(prompt) or [min(self._end_ids, default=0)]  # a text begins after an end of text
            check_length(len(ids), self._context_tokens)
            steps = min(max_tokens, self._context_tokens - len(ids))
            distinct = 1 if temperature == 0 else n  # greedy samples are all the same
            uniform_BT = uniform_streams(seed, ids, range(distinct), steps)
            rows = [_Row(start) for _ in range(distinct)]
            draw = partial(draw_tokens, temperature=temperature, top_p=top_p)
            with self._lock, torch.inference_mode():
                self._decode(ids, rows, uniform_BT, draw, StopWatch(self._tokenizer, stop))
            completions = [self._completion(row, stop, start) for row in rows]
            answers.append(completions * (n // distinct))
        return answers

    def _decode(
        self, ids: list[int], rows: list[_Row], uniform_BT: torch.Tensor, draw: _Draw, watch: StopWatch
    ) -> None:
        """Read the prompt once, then draw every row to its end, `max_rows` side by side."""
        prefix = self._model(input_ids=torch.tensor([ids], device=self._device), use_cache=True, logits_to_keep=1)
        for first in range(0, len(rows), self.config.max_rows):
            chunk = slice(first, first + self.config.max_rows)
            cache = copy.deepcopy(prefix.past_key_values)
            cache.batch_repeat_interleave(len(rows[chunk]))
            logits_BV = prefix.logits[:, -1].expand(len(rows[chunk]), -1)
            self._decode_rows(rows[chunk], cache, logits_BV, uniform_BT[chunk], draw, watch)

    def _decode_rows(
        self,
        rows: list[_Row],
        cache: Any,
        logits_BV: torch.Tensor,
        uniform_BT: torch.Tensor,
        draw: _Draw,
        watch: StopWatch,
    ) -> None:
        active = list(range(len(rows)))
        for step in range(uniform_BT.shape[1]):
            logits_BV = self._refuse(logits_BV.float(), [rows[row] for row in active])
            tokens_B = draw(logits_BV, uniform_BT[active, step])
            drawn = zip(active, tokens_B.tolist(), token_logprobs(logits_BV, tokens_B).tolist(), strict=True)
            for row, token, logprob in drawn:
                self._append(rows[row], token, logprob, watch)
            kept = [place for place, row in enumerate(active) if not rows[row].ended]
            if not kept or step + 1 == uniform_BT.shape[1]:
                return
            if len(kept) < len(active):
                active = [active[place] for place in kept]
                kept_B = torch.tensor(kept, device=self._device)
                cache.batch_select_indices(kept_B)
                tokens_B = tokens_B[kept_B]
            logits_BV = self._model(input_ids=tokens_B[:, None], past_key_values=cache, use_cache=True).logits[:, -1]

    def _refuse(self, logits_BV: torch.Tensor, rows: list[_Row]) -> torch.Tensor:
        """Mask the tokens that would break the blanks with which a row must begin."""
        if not any(row.start_left for row in rows):
            return logits_BV
        if self._first_tokens is None:
            self._first_tokens = FirstTokens(self._tokenizer, logits_BV.shape[-1])
        logits_BV = logits_BV.clone()
        for place, row in enumerate(rows):
            refused_V = self._first_tokens.refused(row.start_left) if row.start_left else None
            if refused_V is not None:
                logits_BV[place].masked_fill_(refused_V.to(logits_BV.device), float("-inf"))
        return logits_BV

    def _append(self, row: _Row, token: int, logprob: float, watch: StopWatch) -> None:
        row.logprob_sum += logprob
        row.drawn += 1
        if token in self._end_ids:
            row.ended = True
            return
        row.ids.append(token)
        if row.start_left and self._first_tokens is not None:
            row.start_left = row.start_left[len(self._first_tokens.text_of(token)) :]
        row.ended = watch.seen(row.ids)

    def _completion(self, row: _Row, stop: Sequence[str], start: str) -> Completion:
        text = drop_start(prompt_format.decode_code(self._tokenizer, row.ids), start)
        cut = cut_at(text, stop)
        reason: FinishReason = "stop" if row.ended or len(cut) < len(text) else "length"
        return Completion(tuple(row.ids), cut, reason, row.logprob_sum / row.drawn)


def check_length(prompt_tokens: int, context_tokens: int) -> None:
    """Raise `RequestError` (400) unless a window of `context_tokens` has room for the prompt and one token more."""
    if prompt_tokens >= context_tokens:
        raise RequestError(
            400,
            f"This model's window is {context_tokens} tokens, but the prompt has {prompt_tokens} tokens, which leaves "
            "no room for an answer. Shorten the prompt.",
            "prompt",
            "context_length_exceeded",
        )


@dataclass(slots=True)
class _Row:
    """A sample while it is being drawn."""

    start_left: str  # blanks that it must still begin with
    ids: list[int] = field(default_factory=list)
    logprob_sum: float = 0.0
    drawn: int = 0
    ended: bool = False


def _load(folder: str, dtype: torch.dtype) -> tuple[Any, Tokenizer]:
    cure = "Give the folder that `cert-ray export` wrote, or one that transformers saved with safetensors."
    if not storage.is_folder(folder):
        raise InputError(folder, "no such model folder", cure)
    if is_finished(folder):  # ours: another schema version is refused by name; other folders have no manifest
        read_manifest(folder, "model", "export")
    if storage.is_local(folder):
        return _load_local(storage.local_path(folder), folder, dtype, cure)
    with tempfile.TemporaryDirectory(prefix="cert-ray-model-") as copied:
        storage.copy_folder_to_local(folder, Path(copied))
        return _load_local(Path(copied), folder, dtype, cure)


def _load_local(path: Path, folder: str, dtype: torch.dtype, cure: str) -> tuple[Any, Tokenizer]:
    for needed, pattern in (("config.json",) * 2, ("tokenizer.json",) * 2, ("safetensors weights", "*.safetensors")):
        if not any(path.glob(pattern)):
            raise InputError(folder, f"no {needed} in it", cure)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(folder, f"transformers cannot load it: {error}", cure) from error
    vocab_size, known = model.get_input_embeddings().num_embeddings, tokenizer.get_vocab_size(with_added_tokens=True)
    if known > vocab_size:
        raise InputError(folder, f"its tokenizer has {known} tokens, its model only {vocab_size}", cure)
    return fuse_attention(model), tokenizer


def _window(folder: str, model_config: Any) -> int:
    for name in ("max_position_embeddings", "n_positions"):
        window = getattr(model_config, name, None)
        if isinstance(window, int):
            return window
    raise InputError(folder, "config.json does not say how long the window is", "Add max_position_embeddings to it.")


def _end_ids(model: Any, tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end a text: those the model's configuration names, and the project's own end of text."""
    named = [model.config.eos_token_id, model.generation_config.eos_token_id]
    ids = {number for entry in named for number in (entry if isinstance(entry, list) else [entry])}
    own = tokenizer.token_to_id(prompt_format.END_OF_TEXT)
    # A model's default numbers (50256 for GPT-Neo) may lie outside a smaller vocabulary.
    known = tokenizer.get_vocab_size(with_added_tokens=True)
    return frozenset(number for number in (*ids, own) if number is not None and number < known)
