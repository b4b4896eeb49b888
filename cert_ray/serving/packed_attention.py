"""Many requests, and many branches of each, in one forward pass of a transformers model without padding.

All tokens of a step stand in one row, [1, S]; linear layers see nothing else. Only attention tells requests apart: it
adds each request's new keys and values to the kept ones, and runs PyTorch's fused attention over them.

A request keeps the keys and values of its prompt and all its samples in one place, each shared beginning once. Its
samples form a tree: a token sees only its ancestors, by a boolean mask, and its depth is its position. So a branch
costs no copy, a request's keys are read once for all branches, and drafted tokens that were not drawn are taken back by
no longer being seen.

On a GPU, `gathered_attention` keeps the keys and attends to them.

In: a loaded model, `Feed`s. Out: logits. Works for models with transformers' attention interface and for GPT-Neo, whose
layers may be local. With more than a scale and a window (sinks, soft caps), `forward` raises `NotImplementedError`.

Shapes: S tokens of the step, Q of them of one request, K keys kept, H heads, G key heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, cast

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from cert_ray.gpt_neo import FusedSelfAttention

_NAME = "cert_ray_packed"
_SPARE_KEYS = 64  # room for new tokens before the keys must be copied to a larger place; assumed
# Branches that split long ago see little of what the others see. So their queries attend in groups of this many, each
# to a copy of just the keys it sees. Measured (one core of a Xeon, fp32, heads and sizes of SmolLM2-135M, a layer): 58
# branches of 50 tokens each 4.5 ms together and 1.7 by eights, of 100 9.7 and 3.3; 20 of 50 0.58 and 0.56.
_TOGETHER = 8
_MANY_SEEN = 50_000  # queries times keys, from which this is done


class Tree:
    """The tokens of one request: their positions, and what the newest see. Subclasses hold the keys and values."""

    def __init__(self) -> None:
        self.positions_K = torch.zeros(0, dtype=torch.long)
        # What each of the newest tokens that gave logits sees, [Q, K]; None: there is one, which sees everything.
        self.visible_QK: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.positions_K)

    def select(self, places: torch.Tensor) -> None:
        """Keep only the tokens at these rising places; what stands behind the last of them may be overwritten."""
        raise NotImplementedError

    def beginning(self, tokens: int) -> Self:
        """A copy of the first `tokens` tokens, which must be of the prompt."""
        raise NotImplementedError

    def read(self, tokens: int, drafted: int) -> list[int]:
        """Add `tokens` tokens of a prompt, the last `drafted` of them a draft; returns their positions."""
        first, keys = len(self), len(self) + tokens
        newest = torch.arange(first, keys)
        self.visible_QK = None
        if drafted:
            self.visible_QK = torch.arange(keys) < torch.arange(keys - drafted, keys + 1)[:, None]
        self.positions_K = torch.cat([self.positions_K, newest])
        return list(range(first, keys))

    def grow(self, parents: Sequence[int], runs: Sequence[int]) -> list[int]:
        """Add the next step's tokens: for each branch, a run of given length after its parent. Returns positions."""
        if self.visible_QK is None and list(runs) == [1]:
            positions = [int(self.positions_K[-1]) + 1]
            self.positions_K = torch.cat([self.positions_K, torch.tensor(positions)])
            return positions
        seen_QK = self.visible_QK if self.visible_QK is not None else torch.ones(1, len(self), dtype=torch.bool)
        depth_B = self.positions_K[-len(seen_QK) :][list(parents)]
        seen_BK = self._forget_unseen(seen_QK[list(parents)])
        if list(runs) == [1] and bool(seen_BK.all()):
            self.visible_QK = None
        else:
            branch_Q = torch.arange(len(runs)).repeat_interleave(torch.tensor(runs))
            own_QQ = (branch_Q[:, None] == branch_Q) & torch.ones(len(branch_Q), len(branch_Q), dtype=torch.bool).tril()
            self.visible_QK = torch.cat([seen_BK[branch_Q], own_QQ], dim=1)
        newest = torch.cat([depth + torch.arange(1, size + 1) for depth, size in zip(depth_B, runs, strict=True)])
        self.positions_K = torch.cat([self.positions_K, newest])
        return newest.tolist()

    def _forget_unseen(self, seen_BK: torch.Tensor) -> torch.Tensor:
        """Drop what no branch sees any more: at once at the end, elsewhere once it is half. Returns what is still seen.

        Drafts that were not drawn stand at the end, where nothing needs to be moved.
        """
        alive_K = seen_BK.any(dim=0)
        keys = int(alive_K.nonzero()[-1]) + 1
        if 2 * int(alive_K.sum()) > keys:
            self.positions_K = self.positions_K[:keys]
            return seen_BK[:, :keys]
        places = alive_K.nonzero()[:, 0]
        self.select(places)
        self.positions_K = self.positions_K[places]
        return seen_BK[:, places]


class Kept(Tree):
    """Keys and values of one request, stored layer by layer in tensors of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._layers: dict[int, torch.Tensor] = {}  # [2, G, capacity, D]

    def add(self, layer: int, key_GQD: torch.Tensor, value_GQD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the newest tokens' keys and values (`positions_K` counts them already). Returns all: [G, K, D] each."""
        keys, queries = len(self), key_GQD.shape[1]
        kept = self._layers.get(layer)
        if kept is None or kept.shape[2] < keys:
            room = keys + max(_SPARE_KEYS, keys // 2)
            larger = key_GQD.new_empty(2, key_GQD.shape[0], room, key_GQD.shape[2])
            if kept is not None:
                larger[:, :, : keys - queries] = kept[:, :, : keys - queries]
            kept = self._layers[layer] = larger
        kept[0, :, keys - queries : keys] = key_GQD
        kept[1, :, keys - queries : keys] = value_GQD
        return kept[0, :, :keys], kept[1, :, :keys]

    def select(self, places: torch.Tensor) -> None:
        """See `Tree.select`."""
        self._layers = {layer: kept.index_select(2, places.to(kept.device)) for layer, kept in self._layers.items()}

    def beginning(self, tokens: int) -> Self:
        """See `Tree.beginning`."""
        copied = type(self)()
        copied._layers = {layer: kept[:, :, :tokens].clone() for layer, kept in self._layers.items()}
        copied.positions_K = self.positions_K[:tokens].clone()
        return copied


@dataclass(slots=True)
class Feed:
    """What one request adds to a step: its prompt or a part of it, or a run of tokens for each of its branches.

    The first token of a run was drawn; those after it are a draft of what may be drawn next. The last tokens of a
    prompt's last part may be such a draft too.
    """

    kept: Any  # what the forward pass keeps of the request: `Kept` here
    tokens: list[int]
    parents: list[int] | None = None  # each run's parent, a row of the request's last logits; None: this is a prompt
    all_logits: bool = False  # of every token of a prompt, not only of the last
    runs: list[int] | None = None  # the length of each; None: one token each
    drafted: int = 0  # how many of a prompt's tokens


@dataclass(frozen=True, slots=True)
class Look:
    """What some queries of a request attend to."""

    queries: slice
    keys_K: torch.Tensor | None  # the keys' places; None: all
    # Added to the scores of each query, once for each of the heads that share a key head: 0 or -inf, [1, 1, Q, K].
    # None: a query sees everything or, in a prompt's first part, everything before it.
    mask: torch.Tensor | None


@dataclass(slots=True)
class Part:
    """One request in a step: where its tokens stand and, for each size of a layer's window, what they look at."""

    kept: Any  # a `Tree` of the step's own kind
    first: int
    queries: int
    prompt: bool
    _looks: dict[int | None, list[Look]] = field(default_factory=dict)

    def looks(self, window: int | None, shared: int, query_HSD: torch.Tensor) -> list[Look]:
        """What a layer with this window attends to, if `shared` heads share a key head."""
        if window not in self._looks:
            seen_QK = self.find_mask(window)
            if seen_QK is None:
                looks = [Look(slice(0, self.queries), None, None)]
            elif self.prompt or seen_QK.numel() < _MANY_SEEN or 4 * int(seen_QK.sum()) > seen_QK.numel():
                looks = [Look(slice(0, self.queries), None, _added(seen_QK, shared, query_HSD))]
            else:
                looks = list(_apart(seen_QK, shared, query_HSD))
            self._looks[window] = looks
        return self._looks[window]

    def find_mask(self, window: int | None) -> torch.Tensor | None:
        """What each query sees, [Q, K]; None as in `Look.mask`."""
        keys = len(self.kept)
        position_K: torch.Tensor = self.kept.positions_K
        position_Q1 = position_K[-self.queries :, None]
        near = window is None or int(position_Q1.max() - position_K.min()) < window
        if self.prompt:
            if near and self.queries == keys:
                return None
            visible_QK = position_K <= position_Q1
        elif self.kept.visible_QK is None:
            if near:
                return None
            visible_QK = torch.ones(self.queries, keys, dtype=torch.bool)
        else:
            visible_QK = cast(torch.Tensor, self.kept.visible_QK)
        if window is None or near:
            return visible_QK
        return visible_QK & (position_Q1 - position_K < window)


def _apart(seen_QK: torch.Tensor, shared: int, like: torch.Tensor) -> Iterator[Look]:
    """Neighbours look together at whatever any of them sees: they split last."""
    for first in range(0, len(seen_QK), _TOGETHER):
        own_QK = seen_QK[first : first + _TOGETHER]
        keys_K = own_QK.any(dim=0).nonzero()[:, 0]
        yield Look(slice(first, first + len(own_QK)), keys_K, _added(own_QK[:, keys_K], shared, like))


def _added(seen_QK: torch.Tensor, shared: int, like: torch.Tensor) -> torch.Tensor:
    hidden_QK = torch.zeros(seen_QK.shape, dtype=like.dtype).masked_fill_(~seen_QK, float("-inf"))
    return hidden_QK.repeat(shared, 1)[None, None].to(like.device)


class Step(Protocol):
    """Attention of one step, for all its requests."""

    def attend(
        self,
        layer: int,
        query_HSD: torch.Tensor,
        key_GSD: torch.Tensor,
        value_GSD: torch.Tensor,
        scale: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """[H, S, D]."""
        ...


_STEP: ContextVar[Step | None] = ContextVar("cert_ray_packed_step", default=None)


def enable(model: Any) -> bool:
    """Make `model` attend as this module does, if it can."""
    neo = [module for module in model.modules() if type(module) is FusedSelfAttention]
    if neo:
        for module in neo:
            module.__class__ = PackedSelfAttention
        return True
    if not getattr(model, "_supports_attention_backend", False):
        return False
    model.set_attn_implementation(_NAME)
    return True


@torch.inference_mode()
def forward(model: Any, feeds: Sequence[Feed], begin: Callable[[list[Part]], Step] | None = None) -> list[torch.Tensor]:
    """One forward pass over all feeds. For each: the logits of its tokens, or of its prompt's end and draft, [Q, V].

    `begin` makes the step, if what is kept is not `Kept`.
    """
    parts: list[Part] = []
    tokens: list[int] = []
    positions: list[int] = []
    wanted: list[int] = []
    counts: list[int] = []
    for feed in feeds:
        first, queries = len(tokens), len(feed.tokens)
        if feed.parents is None:
            places = feed.kept.read(queries, feed.drafted)
        else:
            places = feed.kept.grow(feed.parents, feed.runs or [1] * queries)
        parts.append(Part(feed.kept, first, queries, feed.parents is None))
        tokens += feed.tokens
        positions += places
        shown = queries if feed.parents is not None or feed.all_logits else 1 + feed.drafted
        wanted += range(first + queries - shown, first + queries)
        counts.append(shown)
    device = model.device
    reset = _STEP.set((begin or _OneByOne)(parts))
    try:
        logits_SV = model(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=torch.tensor([positions], device=device),
            attention_mask=torch.empty(1, 1, 1, 1, device=device),  # a mask of four axes is left alone; none is read
            use_cache=False,
            logits_to_keep=torch.tensor(wanted, device=device),
        ).logits[0]
    finally:
        _STEP.reset(reset)
    return list(logits_SV.split(counts))


class _OneByOne:
    """A step in which the requests attend one after the other."""

    def __init__(self, parts: list[Part]) -> None:
        self._parts = parts

    def attend(
        self,
        layer: int,
        query_HSD: torch.Tensor,
        key_GSD: torch.Tensor,
        value_GSD: torch.Tensor,
        scale: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """See `Step`."""
        attended_HSD = torch.empty_like(query_HSD)
        for part in self._parts:
            own = slice(part.first, part.first + part.queries)
            key_GKD, value_GKD = part.kept.add(layer, key_GSD[:, own], value_GSD[:, own])
            attended_HSD[:, own] = attend_one(part, query_HSD[:, own], key_GKD, value_GKD, scale, window)
        return attended_HSD


def attend_one(
    part: Part,
    query_HQD: torch.Tensor,
    key_GKD: torch.Tensor,
    value_GKD: torch.Tensor,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """One request's attention, [H, Q, D]."""
    heads, _, size = query_HQD.shape
    groups = key_GKD.shape[0]
    looks = part.looks(window, heads // groups, query_HQD)
    if part.prompt and looks[0].mask is None:
        attended: torch.Tensor = scaled_dot_product_attention(
            query_HQD[None], key_GKD[None], value_GKD[None], is_causal=True, scale=scale, enable_gqa=heads > groups
        )[0]
        return attended
    attended = torch.empty_like(query_HQD)
    for look in looks:
        some_HQD, some_GKD, values_GKD = query_HQD[:, look.queries], key_GKD, value_GKD
        if look.keys_K is not None:
            # `index_select` would first copy the whole tensors that these are views of.
            some_GKD, values_GKD = key_GKD[:, look.keys_K], value_GKD[:, look.keys_K]
        # Heads that share a key head become more queries of it: no key is copied for them.
        folded = some_HQD.reshape(1, groups, -1, size)
        found = scaled_dot_product_attention(folded, some_GKD[None], values_GKD[None], attn_mask=look.mask, scale=scale)
        attended[:, look.queries] = found.reshape(heads, -1, size)
    return attended


def _packed_attention(
    module: Any,
    query_BHSD: torch.Tensor,
    key_BGSD: torch.Tensor,
    value_BGSD: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 - the parts of the step say what is seen
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: [B, S, H, D]."""
    step = _STEP.get()
    if step is None or softcap is not None or s_aux is not None:
        raise NotImplementedError("packed attention works only inside `forward`, without a soft cap or sinks")
    attended_HSD = step.attend(module.layer_idx, query_BHSD[0], key_BGSD[0], value_BGSD[0], scaling, sliding_window)
    return attended_HSD.transpose(0, 1)[None], None


AttentionInterface.register(_NAME, _packed_attention)


class PackedSelfAttention(FusedSelfAttention):
    """GPT-Neo's attention over what each request keeps: unscaled, and within the window on local layers."""

    def _attn(
        self,
        query_BHSD: torch.Tensor,
        key_BHSD: torch.Tensor,
        value_BHSD: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, None]:
        step = _STEP.get()
        if step is None:
            return super()._attn(query_BHSD, key_BHSD, value_BHSD, attention_mask)
        window = self.config.window_size if self.attention_type == "local" else None
        attended_HSD = step.attend(self.layer_id, query_BHSD[0], key_BHSD[0], value_BHSD[0], 1.0, window)
        return attended_HSD[None], None
