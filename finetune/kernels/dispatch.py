"""Dispatch of tokens to experts: routed tokens sorted by expert, in chunks of experts, and those that have LoRA.

A routed token is a token copied to one of its experts. Experts without LoRA store no factors, and their routed tokens
take no part in the thin products. The experts with LoRA are numbered 0 to S here; their routed tokens, in expert order,
are a subsequence of the layer's.

Shape legend: T tokens, K active experts per token, R routed tokens (T·K, sorted by expert), R' those of a chunk, R''
those of a chunk's experts with LoRA, E experts, C experts in a chunk, S experts with LoRA, S' those of a chunk, L rank,
N sum of ranks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """Experts `first` to `last` (exclusive) and their routed tokens `start` to `stop` (exclusive).

    Attributes:
        counts: routed tokens of each of these experts.
        offsets: int32 [C] on the device, the end of each expert's routed tokens, counted from `start`.
    """

    first: int
    last: int
    start: int
    stop: int
    counts: list[int]
    offsets: Tensor

    @property
    def experts(self) -> slice:
        """The chunk's part of a tensor with E along the first axis."""
        return slice(self.first, self.last)

    @property
    def routed(self) -> slice:
        """The chunk's part of a tensor with R along the first axis."""
        return slice(self.start, self.stop)

    def spans(self) -> Iterator[tuple[int, int]]:
        """Start and end of each expert's routed tokens, counted from `start`."""
        end = 0
        for count in self.counts:
            yield end, end + count
            end += count

    def expert_of_routed(self) -> Tensor:
        """int64 [R'], the expert of each routed token, counted from `first`."""
        index = torch.arange(self.stop - self.start, device=self.offsets.device, dtype=torch.int32)
        return torch.searchsorted(self.offsets, index, right=True)


@dataclass(frozen=True)
class Dispatch:
    """The routed tokens of one layer in expert order.

    Attributes:
        order: int64 [R], the place of each routed token among the T·K choices (token · K + slot).
        counts: routed tokens per expert, on the host.
        offsets: int32 [E] on the device, the end of each expert's routed tokens within its chunk.
        ends: int64 [E] on the device, the same among all routed tokens.
        experts_per_chunk: C.
        top_k: K.
    """

    order: Tensor
    counts: list[int]
    offsets: Tensor
    ends: Tensor
    experts_per_chunk: int
    top_k: int

    @classmethod
    def of(cls, expert_ids: Tensor, num_experts: int, experts_per_chunk: int) -> Dispatch:
        """Sort int64 [T, K] choices by expert, stably: ties keep token order.

        This is the only copy from device to host in a layer: chunks without routed tokens can then be skipped, and
        nothing later waits. (`bincount` would wait too, for the largest id.)
        """
        ids, order = expert_ids.reshape(-1).sort(stable=True)
        ends = torch.searchsorted(ids, torch.arange(num_experts, device=ids.device), right=True)
        counts = ends.diff(prepend=ends.new_zeros(1))
        missing = -num_experts % experts_per_chunk
        by_chunk = F.pad(counts, (0, missing)).view(-1, experts_per_chunk)
        offsets = by_chunk.cumsum(1).reshape(-1)[:num_experts].to(torch.int32)
        return cls(order, counts.tolist(), offsets, ends, experts_per_chunk, expert_ids.shape[1])

    def chunks(self) -> Iterator[Chunk]:
        """Consecutive groups of C experts that have at least one routed token together."""
        start = 0
        for first in range(0, len(self.counts), self.experts_per_chunk):
            counts = self.counts[first : first + self.experts_per_chunk]
            last, stop = first + len(counts), start + sum(counts)
            if stop > start:
                yield Chunk(first, last, start, stop, counts, self.offsets[first:last])
            start = stop

    @property
    def token(self) -> Tensor:
        """int64 [R], the token that each routed token is a copy of."""
        return self.order // self.top_k

    def inverse_order(self) -> Tensor:
        """int64 [R], the routed token of each choice: the inverse of `order`."""
        inverse = torch.empty_like(self.order)
        inverse[self.order] = torch.arange(len(self.order), device=self.order.device)
        return inverse


@dataclass(frozen=True, eq=False)
class LoraRanks:
    """Ranks that differ between experts: factors are stored as a [N, in] and b [N, out], expert after expert.

    Attributes:
        of_expert: rank of each expert with LoRA, at least 1.
        expert: int64 [N], the expert that each stored row belongs to.
        place: int64 [N], its number among the rows of that expert.
        scales: float32 [N], the factor on each row's part of the update.
    """

    of_expert: tuple[int, ...]
    expert: Tensor
    place: Tensor
    scales: Tensor

    @classmethod
    def of(cls, of_expert: tuple[int, ...], scales: tuple[float, ...], device: torch.device) -> LoraRanks:
        """Lay out the factors of experts with these ranks and scales."""
        counts = torch.tensor(of_expert)
        expert = torch.repeat_interleave(torch.arange(len(of_expert)), counts)
        place = torch.arange(sum(of_expert)) - (counts.cumsum(0) - counts)[expert]
        by_row = torch.tensor(scales)[expert]
        return cls(of_expert, expert.to(device), place.to(device), by_row.to(device))

    @property
    def highest(self) -> int:
        """The highest rank."""
        return max(self.of_expert)

    def rows(self, experts: slice) -> slice:
        """The rows in which the factors of these experts are stored."""
        starts = [0, *accumulate(self.of_expert)]
        return slice(starts[experts.start], starts[experts.stop])

    def expand(self, stored: Tensor, experts: slice) -> Tensor:
        """Stored rows [n, width] of these experts -> [S', L, width], where L is the highest rank among them."""
        count, rank = experts.stop - experts.start, max(self.of_expert[experts])
        whole = stored.new_zeros(count * rank, stored.shape[1])
        return whole.index_copy(0, self._places(experts, rank), stored).view(count, rank, -1)

    def collapse(self, expanded: Tensor, experts: slice) -> Tensor:
        """The inverse of `expand`: [S', L, width] -> [n, width]."""
        return expanded.flatten(0, 1)[self._places(experts, expanded.shape[1])]

    def _places(self, experts: slice, rank: int) -> Tensor:
        rows = self.rows(experts)
        return (self.expert[rows] - experts.start) * rank + self.place[rows]


@dataclass(frozen=True, eq=False)
class LoraExperts:
    """The experts of a layer that have LoRA.

    Attributes:
        numbers: their numbers among the layer's E, ascending.
        index: the same as int64 [S] on the device.
        ranks: None: all have one rank, and factors are a [S, L, in] and b [S, out, L].
    """

    numbers: tuple[int, ...]
    index: Tensor
    ranks: LoraRanks | None = None


@dataclass(frozen=True, eq=False)
class LoraChunk:
    """The experts of a chunk that have LoRA, and their routed tokens.

    Attributes:
        chunk: these experts, numbered among the S, and their routed tokens, numbered among those of all S.
        routed: int64 [R''], the places of these routed tokens in the whole chunk. None: the chunk has no others.
        local_experts: int64 [S'], the places of these experts in the whole chunk. None: the chunk has no others.
        ranks: see `LoraExperts`.
    """

    chunk: Chunk
    routed: Tensor | None = None
    local_experts: Tensor | None = None
    ranks: LoraRanks | None = None

    def select(self, tensor: Tensor) -> Tensor:
        """[R', ...] -> [R'', ...]: the routed tokens whose expert has LoRA."""
        return tensor if self.routed is None else tensor.index_select(0, self.routed)

    def gather_a(self, stored: Tensor) -> Tensor:
        """A of this chunk's experts, [S', L, in]; where ranks differ, times its scale."""
        experts = self.chunk.experts
        if self.ranks is None:
            return stored[experts]
        rows = self.ranks.rows(experts)
        return self.ranks.expand(stored[rows] * self.ranks.scales[rows, None], experts)

    def gather_b(self, stored: Tensor) -> Tensor:
        """B of this chunk's experts, [S', out, L]."""
        experts = self.chunk.experts
        if self.ranks is None:
            return stored[experts]
        return self.ranks.expand(stored[self.ranks.rows(experts)], experts).transpose(1, 2)

    def scatter_grad_a(self, target: Tensor, gradient: Tensor) -> None:
        """Write the gradient of `gather_a`'s result into the gradient of the stored factor."""
        experts = self.chunk.experts
        if self.ranks is None:
            target[experts] = gradient
        else:
            rows = self.ranks.rows(experts)
            target[rows] = self.ranks.collapse(gradient, experts) * self.ranks.scales[rows, None]

    def scatter_grad_b(self, target: Tensor, gradient: Tensor) -> None:
        """Write the gradient of `gather_b`'s result into the gradient of the stored factor."""
        experts = self.chunk.experts
        if self.ranks is None:
            target[experts] = gradient
        else:
            target[self.ranks.rows(experts)] = self.ranks.collapse(gradient.transpose(1, 2), experts)


def lora_chunks(dispatch: Dispatch, lora_experts: LoraExperts | None) -> list[LoraChunk | None]:
    """For each of `dispatch.chunks()` the part with LoRA; None where no routed token has any.

    Sizes come from the counts on the host, places from the device, so nothing waits.

    Args:
        dispatch: of the layer.
        lora_experts: None: all experts have LoRA.
    """
    chunks = list(dispatch.chunks())
    if lora_experts is None:
        return [LoraChunk(chunk) for chunk in chunks]
    numbers, index = lora_experts.numbers, lora_experts.index
    counts = dispatch.ends.diff(prepend=dispatch.ends.new_zeros(1))[index]
    ends = counts.cumsum(0)
    num_routed = sum(dispatch.counts[number] for number in numbers)
    routed = torch.arange(num_routed, device=ends.device)
    expert = torch.searchsorted(ends, routed, right=True)
    place = routed + (dispatch.ends[index] - ends)[expert]  # among all of the layer's routed tokens
    found: list[LoraChunk | None] = []
    start = 0
    for chunk in chunks:
        first, last = (bisect_left(numbers, edge) for edge in (chunk.first, chunk.last))
        here = [dispatch.counts[number] for number in numbers[first:last]]
        stop = start + sum(here)
        if stop == start:
            found.append(None)
            continue
        offsets = (ends[first:last] - start).to(torch.int32)
        routed_here = None if stop - start == chunk.stop - chunk.start else place[start:stop] - chunk.start
        local = None if last - first == chunk.last - chunk.first else index[first:last] - chunk.first
        found.append(LoraChunk(Chunk(first, last, start, stop, here, offsets), routed_here, local, lora_experts.ranks))
        start = stop
    return found


_RECOMPUTING: ContextVar[bool] = ContextVar("recomputing", default=False)


class _Recomputing(AbstractContextManager[None]):
    """Marks the code inside as computed a second time, for its saved tensors only. May be entered again."""

    def __enter__(self) -> None:
        self._token: Token[bool] = _RECOMPUTING.set(True)

    def __exit__(self, *_: object) -> None:
        _RECOMPUTING.reset(self._token)


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The `context_fn` of `torch.utils.checkpoint` for layers with an expert block.

    The block saves its inputs and replays itself in its backward pass, so when its layer is computed again only those
    inputs are needed; the block then returns NaN instead of its output. The layer must end with the block and a sum.
    """
    return nullcontext(), _Recomputing()


def is_recomputing() -> bool:
    """Whether a checkpointed layer is being computed again, only for the tensors that its operations save."""
    return _RECOMPUTING.get()
