"""Which routed rows belong to which experts, and what a checkpointed layer may skip when it is computed again.

Shape legend: T tokens, K active experts a token, R routed rows (T·K, sorted by expert), R' those of a chunk, E experts,
C experts in a chunk.
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
    """Experts `first` to `last` (exclusive) and the routed rows `start` to `stop` that they serve.

    Attributes:
        counts: rows of each of these experts.
        offsets: int32 [C] on the device, where each expert's rows end, counted from `start`.
    """

    first: int
    last: int
    start: int
    stop: int
    counts: list[int]
    offsets: Tensor

    @property
    def experts(self) -> slice:
        """Of tensors with E along the first axis."""
        return slice(self.first, self.last)

    @property
    def rows(self) -> slice:
        """Of tensors with R along the first axis."""
        return slice(self.start, self.stop)

    def spans(self) -> Iterator[tuple[int, int]]:
        """First row and end of each expert, counted from `start`."""
        end = 0
        for count in self.counts:
            yield end, end + count
            end += count

    def expert_of_row(self) -> Tensor:
        """int64 [R'], counted from `first`."""
        rows = torch.arange(self.stop - self.start, device=self.offsets.device, dtype=torch.int32)
        return torch.searchsorted(self.offsets, rows, right=True)


@dataclass(frozen=True)
class Routing:
    """The rows of one layer in expert order.

    Attributes:
        order: int64 [R], each row's place among the T·K choices (token · K + slot).
        counts: rows per expert, on the host.
        offsets: int32 [E] on the device, each expert's end within its chunk.
        ends: int64 [E] on the device, each expert's end among all rows.
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
    def of(cls, expert_ids: Tensor, num_experts: int, experts_per_chunk: int) -> Routing:
        """Sort int64 [T, K] choices by expert, stably: ties keep token order.

        The one copy from device to host of a layer: chunks without rows can then be skipped, and nothing later waits.
        (`bincount` would wait too, for the largest id.)
        """
        ids, order = expert_ids.reshape(-1).sort(stable=True)
        ends = torch.searchsorted(ids, torch.arange(num_experts, device=ids.device), right=True)
        counts = ends.diff(prepend=ends.new_zeros(1))
        missing = -num_experts % experts_per_chunk
        by_chunk = F.pad(counts, (0, missing)).view(-1, experts_per_chunk)
        offsets = by_chunk.cumsum(1).reshape(-1)[:num_experts].to(torch.int32)
        return cls(order, counts.tolist(), offsets, ends, experts_per_chunk, expert_ids.shape[1])

    def chunks(self) -> Iterator[Chunk]:
        """Consecutive runs of experts with at least one row between them."""
        start = 0
        for first in range(0, len(self.counts), self.experts_per_chunk):
            here = self.counts[first : first + self.experts_per_chunk]
            last, stop = first + len(here), start + sum(here)
            if stop > start:
                yield Chunk(first, last, start, stop, here, self.offsets[first:last])
            start = stop

    def position(self) -> Tensor:
        """int64 [R], the row of each choice: the inverse of `order`."""
        position = torch.empty_like(self.order)
        position[self.order] = torch.arange(len(self.order), device=self.order.device)
        return position


_RECOMPUTING: ContextVar[bool] = ContextVar("recomputing", default=False)


class _Recomputing(AbstractContextManager[None]):
    """Marks what runs inside it as computed a second time, for its saved tensors only. May be entered again."""

    def __enter__(self) -> None:
        self._token: Token[bool] = _RECOMPUTING.set(True)

    def __exit__(self, *_: object) -> None:
        _RECOMPUTING.reset(self._token)


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The `context_fn` of `torch.utils.checkpoint` for layers with an expert block.

    The block keeps its inputs and replays itself in its backward pass, so when its layer is computed again only those
    inputs are wanted; the block then returns NaN in place of its output. The layer must end with the block and a sum.
    """
    return nullcontext(), _Recomputing()


def is_recomputing() -> bool:
    """Whether a checkpointed layer is being computed again, just for the tensors that its operations save."""
    return _RECOMPUTING.get()


# Which experts of a layer have an update, which rows go through it, and how its factors lie in memory.
#
# Rows of experts without an update take no part in the thin products, and nothing is stored for those experts.
# LoraExperts experts are numbered 0 to S here; their rows, in expert order, are a subsequence of the layer's.
#
# Shape legend: E experts, S adapted ones, R routed rows, R' those of a chunk, R'' those of a chunk's adapted experts,
# S' adapted experts of a chunk, L rank, N sum of ranks.


@dataclass(frozen=True, eq=False)
class Ranks:
    """Ranks that differ from expert to expert: factors are then stored as a [N, in] and b [N, out], expert by expert.

    Attributes:
        of_expert: rank of each adapted expert, at least 1.
        expert: int64 [N], whose each stored row is; place: int64 [N], which of that expert's.
        scales: float32 [N], what each row's part of the update is multiplied by.
    """

    of_expert: tuple[int, ...]
    expert: Tensor
    place: Tensor
    scales: Tensor

    @classmethod
    def of(cls, of_expert: tuple[int, ...], scales: tuple[float, ...], device: torch.device) -> Ranks:
        """Lay out experts with these ranks, and these factors of their updates, one after another."""
        counts = torch.tensor(of_expert)
        expert = torch.repeat_interleave(torch.arange(len(of_expert)), counts)
        place = torch.arange(sum(of_expert)) - (counts.cumsum(0) - counts)[expert]
        by_row = torch.tensor(scales)[expert]
        return cls(of_expert, expert.to(device), place.to(device), by_row.to(device))

    @property
    def highest(self) -> int:
        """Of all ranks."""
        return max(self.of_expert)

    def rows(self, experts: slice) -> slice:
        """Where factors of these experts are stored."""
        starts = [0, *accumulate(self.of_expert)]
        return slice(starts[experts.start], starts[experts.stop])

    def expand(self, stored: Tensor, experts: slice) -> Tensor:
        """Rows of a stored factor [n, width] of these experts as [S', L, width], L being their highest rank."""
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
    """The experts of a layer that have an update.

    Attributes:
        numbers: of the layer's E, ascending.
        index: the same as int64 [S] on the device.
        ranks: None: one rank, and factors are a [S, L, in] and b [S, out, L].
    """

    numbers: tuple[int, ...]
    index: Tensor
    ranks: Ranks | None = None


@dataclass(frozen=True, eq=False)
class Part:
    """What of a chunk goes through updates.

    Attributes:
        chunk: its adapted experts, as numbered among the S, and their rows, as numbered among rows of such experts.
        rows: int64 [R''], these rows' places in the larger chunk. None: it has no others.
        local: int64 [S'], these experts' places in the larger chunk. None: it has no others.
        ranks: see `LoraExperts`.
    """

    chunk: Chunk
    rows: Tensor | None = None
    local: Tensor | None = None
    ranks: Ranks | None = None

    def pick(self, tensor: Tensor) -> Tensor:
        """Of a tensor with a chunk's R' rows those that go through updates."""
        return tensor if self.rows is None else tensor.index_select(0, self.rows)

    def gather_a(self, stored: Tensor) -> Tensor:
        """A of this part's experts, [S', L, in]; with its scale in it where ranks differ."""
        experts = self.chunk.experts
        if self.ranks is None:
            return stored[experts]
        rows = self.ranks.rows(experts)
        return self.ranks.expand(stored[rows] * self.ranks.scales[rows, None], experts)

    def gather_b(self, stored: Tensor) -> Tensor:
        """B of this part's experts, [S', out, L]."""
        experts = self.chunk.experts
        if self.ranks is None:
            return stored[experts]
        return self.ranks.expand(stored[self.ranks.rows(experts)], experts).transpose(1, 2)

    def scatter_grad_a(self, target: Tensor, gradient: Tensor) -> None:
        """Write the gradient of what `gather_a` gave into that of the stored factor."""
        experts = self.chunk.experts
        if self.ranks is None:
            target[experts] = gradient
        else:
            rows = self.ranks.rows(experts)
            target[rows] = self.ranks.collapse(gradient, experts) * self.ranks.scales[rows, None]

    def scatter_grad_b(self, target: Tensor, gradient: Tensor) -> None:
        """Write the gradient of what `gather_b` gave into that of the stored factor."""
        experts = self.chunk.experts
        if self.ranks is None:
            target[experts] = gradient
        else:
            target[self.ranks.rows(experts)] = self.ranks.collapse(gradient.transpose(1, 2), experts)


def lora_chunks(routing: Routing, adapted: LoraExperts | None) -> list[Part | None]:
    """For each of `routing.chunks()` what goes through updates; None where no row does.

    Sizes come from the counts that the host has already, places from the device: nothing waits.

    Args:
        routing: of the layer.
        adapted: None: all experts.
    """
    chunks = list(routing.chunks())
    if adapted is None:
        return [Part(chunk) for chunk in chunks]
    counts = routing.ends.diff(prepend=routing.ends.new_zeros(1))[adapted.index]
    ends = counts.cumsum(0)
    num_rows = sum(routing.counts[number] for number in adapted.numbers)
    row = torch.arange(num_rows, device=ends.device)
    expert = torch.searchsorted(ends, row, right=True)
    place = row + (routing.ends[adapted.index] - ends)[expert]  # among all of the layer's rows
    parts: list[Part | None] = []
    start = 0
    for chunk in chunks:
        first, last = (bisect_left(adapted.numbers, edge) for edge in (chunk.first, chunk.last))
        here = [routing.counts[number] for number in adapted.numbers[first:last]]
        stop = start + sum(here)
        if stop == start:
            parts.append(None)
            continue
        offsets = (ends[first:last] - start).to(torch.int32)
        rows = None if stop - start == chunk.stop - chunk.start else place[start:stop] - chunk.start
        local = None if last - first == chunk.last - chunk.first else adapted.index[first:last] - chunk.first
        parts.append(Part(Chunk(first, last, start, stop, here, offsets), rows, local, adapted.ranks))
        start = stop
    return parts
