"""What an engine is: something that draws n samples for the tokens of a prompt.

In: `Work`, which is all that an answer may depend on, and `Hooks`, which say who is listening. Out: `Drawn`. An engine
knows nothing of sketches: `cascade.py` gives it prompts and reads its tokens. `transformers_engine.py` runs any causal
language model of transformers, `vllm_engine.py` what vLLM runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol, Self

import pydantic
from tokenizers import Tokenizer

from cert_ray.config import Config
from cert_ray.errors import ConfigError, RequestError
from cert_ray.serving.constraints import Template

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log-probabilities of a text's tokens, in the fields of OpenAI's `logprobs` object, all equally long.

    `token_logprobs` are under the model itself: at temperature 1, without a nucleus and, while a sample must still
    begin with blanks, among the tokens that may come. A prompt's first token has None. `top_logprobs` hold the
    alternatives asked for and the token itself. `text_offset` counts characters from the beginning of the text that
    the tokens belong to (the answer, or the prompt). A character spelled by several tokens belongs to the last of them.
    """

    tokens: tuple[str, ...]
    token_logprobs: tuple[float | None, ...]
    top_logprobs: tuple[dict[str, float] | None, ...]
    text_offset: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """One sample. `text` is cut at the stop string; `ids` are all tokens drawn, except the end of text.

    `mean_logprob` is the mean natural log-probability, under the model, of the tokens drawn, end of text included.
    `blank_tokens` count neither there nor in `logprobs`. `logprobs` is None unless asked for; it covers the tokens that
    begin within `text`. `keeps_to_template` is None if there is no template.
    """

    ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    mean_logprob: float
    logprobs: TokenLogprobs | None = None
    keeps_to_template: bool | None = None
    blank_tokens: int = 0  # how many of the first `ids` hold only the blanks that were asked for

    @property
    def tokens(self) -> int:
        """Tokens that count as drawn."""
        return len(self.ids) - self.blank_tokens


@dataclass(frozen=True, slots=True)
class Work:
    """One prompt to be completed `n` times: all that the samples depend on, besides the model."""

    prompt: tuple[int, ...]
    n: int = 1
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    start: str = ""  # blanks that each sample must begin with; they are then removed from its text
    code_only: bool = False  # placeholders are never drawn: code has none
    logprobs: int | None = None  # alternatives per token; unless `code_only`, placeholders are reported as their words
    score_prompt: bool = False  # also report the log-probabilities of the prompt's own tokens
    # Sample i draws with stream i modulo this: the released code's fault of drawing the same samples again.
    streams: int | None = None
    template: Template | None = None  # what each sample must look like, as long as the model agrees
    comes_again: bool = False  # while `Drawn` is held, a longer prompt that begins with this one will come
    draft: tuple[int, ...] = ()  # a guess at the samples (`drafts.source`); no sample depends on it


def _ignore_text(index: int, text: str, finish_reason: FinishReason | None) -> None:
    """Nobody listens."""


# Its arguments: the samples that have ended, each with how many drew it; and the known tokens of those that have not,
# each with how many share them. True ends the unfinished ones where they are.
Enough = Callable[[Sequence[tuple[Completion, int]], Sequence[tuple[tuple[int, ...], int]]], bool]


@dataclass(frozen=True, slots=True)
class Hooks:
    """Who waits for some work. Hooks are called while it is done, and must be quick."""

    # Raises what ends the work. Called before every token, and now and then by the waiting thread.
    check: Callable[[], None] = lambda: None
    # Called by the waiting thread, with a sample's number and more of its text, which is final.
    on_text: Callable[[int, str, FinishReason | None], None] = _ignore_text
    streams_text: bool = False  # whether `on_text` wants the text while it is drawn
    enough: Enough | None = None


DEFAULT_HOOKS = Hooks()


@dataclass(frozen=True, slots=True)
class Drawn:
    """`samples` in the order of their numbers; None for those cut short because there was enough."""

    samples: tuple[Completion | None, ...]
    tokens: int  # drawn by all samples together, without ends of text
    cached_tokens: int = 0  # tokens of the prompt that were not read again
    prompt_logprobs: TokenLogprobs | None = None
    pin: object = field(
        default=None, compare=False, repr=False
    )  # with `comes_again`: keeps the prompt from being dropped


class Engine(Protocol):
    """What draws samples. `context_tokens` bounds prompt and answer together. Safe to call from many threads."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def context_tokens(self) -> int: ...

    @property
    def infill_tokens(self) -> tuple[int, int, int] | None:
        """Token ids that mark prefix, suffix and middle; None if the model was not trained to fill in."""
        ...

    @property
    def takes_drafts(self) -> bool:
        """Whether `Work.draft` is of use."""
        ...

    def draw(self, work: Work, hooks: Hooks = DEFAULT_HOOKS) -> Drawn:
        """Draw the samples. A sample that reaches the window ends there, with finish_reason "length".

        Raises:
            RequestError: 400, when the prompt leaves no room for one token.
            Exception: what `hooks.check` raises.
        """
        ...


class Steps(Protocol):
    """What runs models step by step, and shows when a step hangs."""

    @property
    def step_s(self) -> float:
        """How long the running step has taken so far; 0 if none runs."""
        ...


# Options of transformers only: vLLM decides these by itself.
_TRANSFORMERS_ALONE: Final = ("device", "threads", "prefix_cache_tokens", "draft_tokens", "packed_weights")


class EngineConfig(Config):
    """How a model is held in memory and run."""

    kind: Literal["transformers", "vllm"] = "transformers"  # vllm: the extra `vllm`
    device: str | None = None  # None: the first GPU, else the CPU
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    threads: int | None = pydantic.Field(default=None, ge=1)  # torch's intra-op threads; None leaves torch's choice
    # No request joins when a forward pass has this many rows (distinct beginnings of samples, over all requests). It is
    # vLLM's `max_num_seqs`, and the next option its `max_num_batched_tokens`; unless given, vLLM chooses both.
    max_rows: int | None = pydantic.Field(default=None, ge=1)  # None: 256 on a CPU, 2,048 on a GPU
    # Tokens of prompts that are read beside one step of the others. None: 256 on a CPU, 8,192 on a GPU
    prefill_tokens: int | None = pydantic.Field(default=None, ge=1)
    # Tokens of prompts whose keys and values are kept for requests that begin alike: 46 KB a token for SmolLM2-135M in
    # fp32. Prompts that wait for stage two of a model of both stages are kept in addition, unless this is 0.
    prefix_cache_tokens: int = pydantic.Field(default=8192, ge=0)
    # Tokens of the sketch that are read after a sample's last one, in case it draws them; 0: none. Measured
    # (docs/benchmarks.md, "The sketch in stage two"): half the CPU time where it is followed, no loss elsewhere.
    draft_tokens: int = pydantic.Field(default=6, ge=0, le=64)
    packed_weights: bool = True  # rearrange linear layers' weights once, on the CPU (`packed_linear.py`)
    # The special tokens before prefix, suffix and middle, for a model that was trained to fill in the middle.
    infill: tuple[str, str, str] | None = None
    # Memory in which vLLM keeps keys and values, for each model; weights come on top. Assumed: 23 KB a token for
    # SmolLM2-135M in bf16, so 180,000 tokens.
    kv_cache_gib: float = pydantic.Field(default=4.0, gt=0)

    @pydantic.model_validator(mode="after")
    def _check_options_of_the_other(self) -> Self:
        of_the_other = _TRANSFORMERS_ALONE if self.kind == "vllm" else ("kv_cache_gib",)
        fields = type(self).model_fields
        useless = [
            f"{name}={getattr(self, name)!r}" for name in of_the_other if getattr(self, name) != fields[name].default
        ]
        if useless:
            raise ConfigError(f"{', '.join(useless)} with kind={self.kind!r}: not used by that engine. Leave it out.")
        return self


def step_sizes(config: EngineConfig, device_type: str) -> tuple[int, int]:
    """`max_rows` and `prefill_tokens`, with the device's defaults where `config` has None. Assumed for GPUs."""
    rows, tokens = (256, 256) if device_type == "cpu" else (2_048, 8_192)
    return config.max_rows or rows, config.prefill_tokens or tokens


def check_length(prompt_tokens: int, context_tokens: int, param: str = "prompt") -> None:
    """Raise `RequestError` (400) unless a window of `context_tokens` has room for the prompt and one more token."""
    if prompt_tokens >= context_tokens:
        raise RequestError(
            400,
            f"This model's window is {context_tokens} tokens, but the prompt has {prompt_tokens} tokens, which leaves "
            "no room for an answer. Shorten the prompt.",
            param,
            "context_length_exceeded",
        )


NOT_FINITE_CURE: Final = (
    "its weights may be damaged, or too large for engine.dtype=float16: copy it again, or use bfloat16 or float32."
)


def not_finite() -> RequestError:
    """The refusal (500) of a prompt after which the model's numbers are NaN or infinite. Another prompt may work.

    Without it, every token drawn would be the same one, whatever the prompt.
    """
    return RequestError(
        500,
        "The model's outputs for this prompt are not finite (NaN or infinity), so there is no answer. For whoever runs "
        "the server: "
        f"{NOT_FINITE_CURE}",
        None,
        "not_finite",
    )
