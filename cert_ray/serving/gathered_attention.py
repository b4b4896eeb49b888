"""Attention of all requests of a step in a few kernels, for GPUs: there, launches cost more than what they compute.

Keys and values of all requests lie in one place, an `Arena` of numbered slots, as in vLLM's paged attention (Kwon et
al. 2023, arXiv:2309.06180) with pages of one token. At each step, the slots of the decoding requests are gathered, and
requests of about the same size, padded to the longest of them, share one call of PyTorch's fused attention. So a layer
costs about ten launches per size, however many requests there are; `packed_attention` alone takes about ten per
request. Gathering copies all kept keys at every layer, which a GPU does at 3 TB/s. Prompts attend one by one: each
comes only once. A request that begins like another one shares its slots.

In: a loaded model that `packed_attention` runs, its `Feed`s with `Slots`. Out: the same logits, up to rounding.

Shapes: as in `packed_attention`; P requests of a group, Q and K padded to the most among them; C slots of the arena.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import scaled_dot_product_attention

from cert_ray.serving.packed_attention import Part, Tree, attend_one

_LEAST_SLOTS = 4_096  # least size of an arena; assumed
_MOST_GATHERED = 1 << 18  # slots per call: 200 MB of keys and values for SmolLM2-135M in bf16; assumed
_ALIGNED_KEYS = 8  # the fused kernels want the rows of masks to be a multiple of this many bf16 numbers long

_GIVEN_BACK = 4  # an arena shrinks above this many times what is held, and `_LEAST_SLOTS`; assumed

SlotNumbers = npt.NDArray[np.int64]


@dataclass(slots=True, eq=False)
class Holder:
    """A user of slots, given by their numbers."""

    slots: SlotNumbers


_NONE: SlotNumbers = np.empty(0, np.int64)


class Arena:
    """Slots for the keys and values of one token each, in every layer; counts who uses a slot.

    It grows as needed, by half, and gives memory back when most of it holds nothing. `capacity` and `forget` may be
    called from any thread, all else only from the stepping one.
    """

    def __init__(self) -> None:
        self._layers: dict[int, torch.Tensor] = {}  # [C, 2, G, D]
        self._uses = np.zeros(0, np.int32)
        self._free: list[int] = []
        # Who holds which slots, to be told when they move. A holder may be dropped in any thread: its slots become free
        # at the next count.
        self._holders: dict[int, Holder] = {}
        self._forgotten: deque[Holder] = deque()

    @property
    def used(self) -> int:
        """Slots in use."""
        uses = self._uses.copy()
        for holder in self._forgotten.copy():
            uses[holder.slots] -= 1
        return int(np.count_nonzero(uses))

    @property
    def capacity(self) -> int:
        """Slots that have memory."""
        return len(self._uses)

    def hold(self, slots: SlotNumbers) -> Holder:
        """Count one more user of `slots`, until it is forgotten."""
        self._uses[slots] += 1
        holder = Holder(slots)
        self._holders[id(holder)] = holder
        return holder

    def forget(self, holder: Holder) -> None:
        """Count one user fewer of its slots."""
        self._forgotten.append(holder)

    def take(self, count: int) -> SlotNumbers:
        """`count` free slots, now with one user each.

        Raises:
            torch.OutOfMemoryError: when the arena would have to grow and cannot; it stays as it was.
        """
        self._collect()
        if len(self._free) < count:
            self._grow(max(_LEAST_SLOTS, self.capacity + max(count, self.capacity // 2)))
        left = len(self._free) - count
        taken = np.array(self._free[left:], np.int64)
        del self._free[left:]
        self._uses[taken] = 1
        return taken

    def _grow(self, capacity: int) -> None:
        """Grow layer by layer: only one is in memory twice at a time. New slots count once every layer has them."""
        for number, kept in self._layers.items():
            self._layers[number] = _larger(kept, capacity)
        self._free += range(self.capacity, capacity)
        self._uses = np.concatenate([self._uses, np.zeros(capacity - self.capacity, np.int32)])

    def release(self, slots: SlotNumbers) -> None:
        """Count one user fewer of `slots`."""
        self._uses[slots] -= 1
        self._free += slots[self._uses[slots] == 0].tolist()

    def _collect(self) -> None:
        while self._forgotten:
            holder = self._forgotten.popleft()
            del self._holders[id(holder)]
            self.release(holder.slots)

    def give_back(self) -> None:
        """If more than three quarters hold nothing, move the rest together and give memory back to the device.

        Never in the middle of a step, which knows its slots by their numbers. Keeps twice what is held, so that the
        memory given back is needed again only after at least as many tokens as are held now.
        """
        self._collect()
        used = self.capacity - len(self._free)
        if self.capacity <= _GIVEN_BACK * max(used, _LEAST_SLOTS):
            return
        capacity = max(_LEAST_SLOTS, 2 * used)
        slots = np.flatnonzero(self._uses)
        try:
            smaller = {number: kept.new_empty(capacity, *kept.shape[1:]) for number, kept in self._layers.items()}
        except torch.OutOfMemoryError:  # others use the rest of the memory; there will be room once less is held
            return
        for number, kept in smaller.items():
            kept[:used] = self._layers[number][torch.from_numpy(slots).to(kept.device)]
        self._layers = smaller
        moved = np.cumsum(self._uses > 0) - 1
        for holder in self._holders.values():
            holder.slots = moved[holder.slots]
        self._uses = np.concatenate([self._uses[slots], np.zeros(capacity - used, np.int32)])
        self._free = list(range(used, capacity))
        torch.cuda.empty_cache()  # otherwise PyTorch would keep it; without a GPU this does nothing

    def layer(self, number: int, like_GSD: torch.Tensor) -> torch.Tensor:
        """Keys and values of a layer, [C, 2, G, D] or longer; a layer that keeps nothing yet is allocated."""
        if number not in self._layers:
            groups, _, size = like_GSD.shape
            self._layers[number] = like_GSD.new_empty(self.capacity, 2, groups, size)
        return self._layers[number]


def _larger(kept_C2GD: torch.Tensor, capacity: int) -> torch.Tensor:
    if len(kept_C2GD) >= capacity:  # left over from a growth that failed at another layer
        return kept_C2GD
    larger = kept_C2GD.new_empty(capacity, *kept_C2GD.shape[1:])
    larger[: len(kept_C2GD)] = kept_C2GD
    return larger


class Slots(Tree):
    """What an arena keeps of one request."""

    def __init__(self, arena: Arena, shared: SlotNumbers = _NONE) -> None:
        """`shared` are slots of another request, used by this one too."""
        super().__init__()
        self._arena = arena
        self._holder = arena.hold(shared)
        weakref.finalize(self, arena.forget, self._holder).atexit = False

    @property
    def numbers(self) -> SlotNumbers:
        """The slot of each token."""
        return self._holder.slots

    def extend(self, newest: int) -> SlotNumbers:
        """Slots for the newest tokens, which are already counted; slots behind the kept ones are released."""
        known = len(self) - newest
        taken, left = self._arena.take(newest), self.numbers[known:]
        self._holder.slots = np.concatenate([self.numbers[:known], taken])
        self._arena.release(left)
        return taken

    def select(self, places: torch.Tensor) -> None:
        """See `Tree.select`."""
        chosen = np.zeros(len(self.numbers), np.bool_)
        chosen[places.numpy()] = True
        self._arena.release(self.numbers[~chosen])
        self._holder.slots = self.numbers[chosen]

    def beginning(self, tokens: int) -> Self:
        """See `Tree.beginning`; the slots are shared."""
        copied = type(self)(self._arena, self.numbers[:tokens])
        copied.positions_K = self.positions_K[:tokens].clone()
        return copied


@dataclass(slots=True)
class _Group:
    """Decoding requests that attend together, Q and K padded."""

    parts: list[Part]
    rows_N: torch.Tensor  # position in the step of each of the P * Q queries; padding repeats a request's first
    slots_PK: torch.Tensor
    own_N: torch.Tensor  # which of the P * Q are real queries
    step_N: torch.Tensor  # the positions of those in the step
    queries: int
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, parts: list[Part], device: torch.device) -> _Group:
        queries = max(part.queries for part in parts)
        keys = -(-max(len(part.kept) for part in parts) // _ALIGNED_KEYS) * _ALIGNED_KEYS
        rows_PQ = np.empty((len(parts), queries), np.int64)
        slots_PK = np.empty((len(parts), keys), np.int64)
        own_PQ = np.zeros((len(parts), queries), np.bool_)
        for place, part in enumerate(parts):
            rows_PQ[place] = part.first
            rows_PQ[place, : part.queries] += np.arange(part.queries)
            slots_PK[place] = part.kept.numbers[0]  # pad with the request's own: even masked, a NaN would spread
            slots_PK[place, : len(part.kept)] = part.kept.numbers
            own_PQ[place, : part.queries] = True
        own_N = np.flatnonzero(own_PQ)

        def placed(numbers: npt.NDArray[np.int64]) -> torch.Tensor:
            return torch.from_numpy(numbers).to(device)

        rows_N = rows_PQ.ravel()
        return cls(parts, placed(rows_N), placed(slots_PK), placed(own_N), placed(rows_N[own_N]), queries)

    def mask(self, window: int | None, shared: int, like: torch.Tensor) -> torch.Tensor:
        """What is added to the scores, [P, 1, shared * Q, K]: 0 or -inf."""
        if window not in self.masks:
            seen_PQK = torch.zeros(len(self.parts), self.queries, self.slots_PK.shape[1], dtype=torch.bool)
            seen_PQK[:, :, 0] = True  # a padded query must see something
            for place, part in enumerate(self.parts):
                mask_QK = part.find_mask(window)
                seen_PQK[place, : part.queries, : len(part.kept)] = True if mask_QK is None else mask_QK
            hidden_PQK = like.new_zeros(seen_PQK.shape).masked_fill_(~seen_PQK.to(like.device), float("-inf"))
            self.masks[window] = hidden_PQK.repeat(1, shared, 1)[:, None]
        return self.masks[window]

    def attend(
        self, query_HSD: torch.Tensor, kept_C2GD: torch.Tensor, scale: float | None, window: int | None
    ) -> torch.Tensor:
        """Attention of the group's queries, [H, N, D]."""
        (heads, _, size), groups = query_HSD.shape, kept_C2GD.shape[2]
        shared, requests = heads // groups, len(self.parts)
        query_HND = query_HSD.index_select(1, self.rows_N)
        folded = query_HND.reshape(groups, shared, requests, self.queries, size).permute(2, 0, 1, 3, 4)
        folded = folded.reshape(requests, groups, shared * self.queries, size)
        kept_PK2GD = kept_C2GD[self.slots_PK]
        key_PGKD, value_PGKD = kept_PK2GD[:, :, 0].transpose(1, 2), kept_PK2GD[:, :, 1].transpose(1, 2)
        mask = self.mask(window, shared, query_HSD)
        attended = scaled_dot_product_attention(folded, key_PGKD, value_PGKD, attn_mask=mask, scale=scale)
        attended = attended.reshape(requests, groups, shared, self.queries, size).permute(1, 2, 0, 3, 4)
        return attended.reshape(heads, requests * self.queries, size).index_select(1, self.own_N)


class GatheredStep:
    """A `packed_attention.Step` over `Slots`."""

    def __init__(self, parts: Sequence[Part], arena: Arena, device: torch.device) -> None:
        self._arena = arena
        taken = [part.kept.extend(part.queries) for part in parts]
        self._newest_S = torch.from_numpy(np.concatenate(taken)).to(device)
        self._prompts = [part for part in parts if part.prompt]
        self._prompt_slots = [torch.from_numpy(part.kept.numbers).to(device) for part in self._prompts]
        self._groups = [_Group.of(group, device) for group in _alike([part for part in parts if not part.prompt])]

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
        kept_C2GD = self._arena.layer(layer, key_GSD)
        kept_C2GD[self._newest_S] = torch.stack([key_GSD, value_GSD]).permute(2, 0, 1, 3)
        attended_HSD = torch.empty_like(query_HSD)
        for part, slots_K in zip(self._prompts, self._prompt_slots, strict=True):
            own = slice(part.first, part.first + part.queries)
            key_GKD, value_GKD = kept_C2GD[slots_K].permute(1, 2, 0, 3)
            attended_HSD[:, own] = attend_one(part, query_HSD[:, own], key_GKD, value_GKD, scale, window)
        for group in self._groups:
            attended_HSD[:, group.step_N] = group.attend(query_HSD, kept_C2GD, scale, window)
        return attended_HSD


def _alike(parts: Sequence[Part]) -> list[list[Part]]:
    """Groups small enough to gather, in which padding at most quadruples a request's queries and doubles its keys."""
    groups: dict[tuple[int, int], list[Part]] = {}
    for part in parts:
        groups.setdefault(((part.queries - 1).bit_length() // 2, len(part.kept).bit_length()), []).append(part)
    found: list[list[Part]] = []
    for (_, key_bits), group in groups.items():
        most = max(1, _MOST_GATHERED >> key_bits)
        found += [group[first : first + most] for first in range(0, len(group), most)]
    return found
