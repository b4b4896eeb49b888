"""An engine over any causal language model of transformers, on CPU or GPU.

In: a Hugging Face folder. Out: an `Engine` whose requests share forward passes (`batching.py`), and whose samples share
what they have in common (`joint.py`). Models whose attention can be packed run that way (`packed_attention.py`). On
loading, the packed pass is compared with the model's own; where it differs or fails, each request runs by itself with
transformers' cache.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from tokenizers import Tokenizer

from cert_ray.errors import InputError
from cert_ray.serving import packed_attention
from cert_ray.serving.batching import Batch, Counted, Request, Turns
from cert_ray.serving.boundaries import FirstTokens
from cert_ray.serving.constraints import Courses
from cert_ray.serving.engines import DEFAULT_HOOKS, NOT_FINITE_CURE, Drawn, EngineConfig, Hooks, Work, check_length
from cert_ray.serving.gathered_attention import Arena, GatheredStep, Slots
from cert_ray.serving.joint import JointSamples
from cert_ray.serving.model_folders import Described, end_ids, find_infill, load_model, window
from cert_ray.serving.packed_attention import Feed, Kept, Part, Tree
from cert_ray.serving.packed_linear import pack_linear_layers
from cert_ray.serving.sampling import log_totals

_log = logging.getLogger(__name__)

# The allowed difference between two ways to compute logits, as a share of their range: fp32 gives 1e-6, bf16 1e-2; a
# wrong mask or position gives 0.1 and more. Measured with random GPT-Neo, Llama and GPT-2 models.
_SAME_SHARE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}


class TransformersEngine:
    """An `Engine` over a Hugging Face folder (safetensors, tokenizer.json)."""

    def __init__(
        self,
        folder: str,
        config: EngineConfig | None = None,
        turns: Turns | None = None,
        described: Described | None = None,
    ) -> None:
        """Load the model in `folder`, local or remote. `described` is its description, if it was just made.

        Engines that share cores should share `turns`.

        Raises:
            InputError: when it is no such folder, holds no safetensors or no tokenizer.json, or a model whose numbers
                are not finite.
            SchemaVersionError: when its manifest is of another version, or not that of a model.
            ConfigError: when it lacks the `infill` tokens of the configuration.
        """
        self.config = config or EngineConfig()
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        device = self.config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        model, self._tokenizer = load_model(folder, getattr(torch, self.config.dtype), described)
        model.to(device).eval()
        if gathers(model.device):
            # cuDNN's attention, which PyTorch prefers on Hopper GPUs, plans anew for every shape, and every step has
            # new ones: on an H100, request by request, the answers of 20 prompts were not there after 80 s.
            torch.backends.cuda.enable_cudnn_sdp(False)
        self._context_tokens = window(folder, model.config)
        self._infill_tokens = find_infill(folder, self._tokenizer, self.config.infill)
        self._end_ids = end_ids(model.config, model.generation_config, self._tokenizer)
        self._first_tokens = FirstTokens(self._tokenizer, model.get_input_embeddings().num_embeddings)
        self._courses = Courses(self._tokenizer, model.get_input_embeddings().num_embeddings, self._end_ids)
        ids, expected_TV = _tried(model, self._context_tokens, folder)
        self.is_packed = _pack(model, ids, expected_TV, self.config)
        self._model = model
        forward_pass = _Packed(model, self._tokenizer) if self.is_packed else _OneByOne(model, self._tokenizer)
        self._batch = Batch(forward_pass, self.config, turns or Turns(), model.device.type)

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
        """Whether drafts are wanted, and the model runs in a way that lets them be taken back."""
        return self.is_packed and self.config.draft_tokens > 0

    @property
    def counted(self) -> Counted:
        """How much the model was used since it was loaded."""
        return self._batch.counted

    def draw(self, work: Work, hooks: Hooks = DEFAULT_HOOKS) -> Drawn:
        """Draw the samples; see `Engine.draw`."""
        if not work.prompt:  # a text starts after an end of text
            work = replace(work, prompt=(min(self._end_ids, default=0),))
        check_length(len(work.prompt), self._context_tokens)
        course = None if work.template is None else self._courses.begin(work.template)
        samples = JointSamples(
            work,
            self._context_tokens,
            self._tokenizer,
            self._end_ids,
            self._first_tokens,
            course,
            self.config.draft_tokens,
        )
        request = Request(samples, hooks)
        self._batch.submit(request)
        return request.wait()


def gathers(device: torch.device) -> bool:
    """Whether the requests of a step attend together. Not on a CPU, where copying keys costs more than calls."""
    return device.type != "cpu"


class _Packed:
    """All requests in one forward pass."""

    takes_drafts = True

    def __init__(self, model: Any, tokenizer: Tokenizer | None = None) -> None:
        """`tokenizer` is for the batch, which asks for it."""
        self._model, self.tokenizer = model, tokenizer
        self._arena = Arena() if gathers(model.device) else None

    def begin(self) -> Tree:
        return Kept() if self._arena is None else Slots(self._arena)

    def forward(self, feeds: Sequence[Feed]) -> list[torch.Tensor]:
        return packed_attention.forward(self._model, feeds, None if self._arena is None else self._step)

    def _step(self, parts: Sequence[Part]) -> GatheredStep:
        assert self._arena is not None
        return GatheredStep(parts, self._arena, self._model.device)

    def beginning(self, kept: Tree, tokens: int) -> Tree:
        return kept.beginning(tokens)

    def give_back(self) -> None:
        if self._arena is not None:
            self._arena.give_back()


class _OneByOne:
    """One forward pass per request, with a row for each branch, in transformers' own cache."""

    takes_drafts = False  # rows must stay equally long

    def __init__(self, model: Any, tokenizer: Tokenizer) -> None:
        self._model, self.tokenizer = model, tokenizer

    def begin(self) -> dict[str, Any]:
        return {"cache": None}

    def beginning(self, kept: dict[str, Any], tokens: int) -> None:  # noqa: ARG002 - a cache cannot be cut in general
        return None

    def give_back(self) -> None:
        """Nothing to do: each request's cache goes with it."""

    @torch.inference_mode()
    def forward(self, feeds: Sequence[Feed]) -> list[torch.Tensor]:
        return [self._forward_one(feed) for feed in feeds]

    def _forward_one(self, feed: Feed) -> torch.Tensor:
        device = self._model.device
        if feed.parents is None:
            ids = torch.tensor([feed.tokens], device=device)
            shown = len(feed.tokens) if feed.all_logits else 1
        else:
            feed.kept["cache"].batch_select_indices(torch.tensor(feed.parents, device=device))
            ids, shown = torch.tensor(feed.tokens, device=device)[:, None], 1
        result = self._model(input_ids=ids, past_key_values=feed.kept["cache"], use_cache=True)
        feed.kept["cache"] = result.past_key_values
        logits_BQV: torch.Tensor = result.logits[:, -shown:]
        return logits_BQV[0] if feed.parents is None else logits_BQV[:, -1]


@torch.inference_mode()
def _tried(model: Any, context_tokens: int, folder: str) -> tuple[list[int], torch.Tensor]:
    """Some token ids, and the logits of the model's own forward pass after each; `InputError` if any is not finite."""
    vocab_size = model.get_input_embeddings().num_embeddings
    ids = [(7 * place + 3) % vocab_size for place in range(min(12, context_tokens))]
    logits_TV = model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float()
    if not bool(log_totals(logits_TV).isfinite().all()):
        raise InputError(folder, "its model's outputs are not finite", NOT_FINITE_CURE.capitalize())
    return ids, logits_TV


@torch.inference_mode()
def _pack(model: Any, ids: list[int], expected_TV: torch.Tensor, config: EngineConfig) -> bool:
    """Make `model` attend packed, if the results match its own forward pass. Also lays its weights out."""
    before = model.config._attn_implementation
    if config.packed_weights:
        pack_linear_layers(model)
    if not packed_attention.enable(model):
        return False
    try:
        logits = _walk(_Packed(model), ids)
    except Exception as failure:  # noqa: BLE001 - whatever a model does not expect: it is run the other way
        _log.warning("%s cannot use packed attention (%r): requests are not batched", type(model).__name__, failure)
        model.set_attn_implementation(before)
        return False
    rows = list(range(len(ids) - len(logits), len(ids)))
    error = float((torch.stack(logits).float() - expected_TV[rows]).abs().max())
    allowed = _SAME_SHARE[model.dtype] * float(expected_TV.max() - expected_TV.min())
    if not error <= allowed:  # as NaN is not
        _log.warning("%s: packed attention is off by %.2g: requests are not batched", type(model).__name__, error)
        model.set_attn_implementation(before)
        return False
    return True


def _walk(model: _Packed, ids: list[int]) -> list[torch.Tensor]:
    """Logits after the last of `ids`: one drawn beside another branch, the others in a run behind a discarded draft."""
    kept, other = model.begin(), model.begin()
    model.forward([Feed(kept, ids[:2])])
    first = model.forward([Feed(other, ids[3:6]), Feed(kept, ids[2:5])])[1]
    logits = [first[0]]
    parents = [0, 0]
    for place in range(5, len(ids) - 2):
        fed = model.forward([Feed(kept, [ids[0], ids[0], ids[place]], parents, runs=[2, 1])])[0]
        logits.append(fed[2])
        parents = [0, 2]
    fed = model.forward([Feed(kept, [ids[0], *ids[len(logits) + 4 :]], parents, runs=[1, 2])])[0]
    return [*logits, *fed[1:]]
