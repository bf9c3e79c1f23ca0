"""Which experts of a layer have an update, which rows go through it, and how its factors lie in memory.

Rows of experts without an update take no part in the thin products, and nothing is stored for those experts. Adapted
experts are numbered 0 to S here; their rows, in expert order, are a subsequence of the layer's.

Shape legend: E experts, S adapted ones, R routed rows, R' those of a chunk, R'' those of a chunk's adapted experts, S'
adapted experts of a chunk, L rank, N sum of ranks.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from finetune.kernels.routing import Chunk, Routing


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
class Adapted:
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
        ranks: see `Adapted`.
    """

    chunk: Chunk
    rows: Tensor | None = None
    local: Tensor | None = None
    ranks: Ranks | None = None

    def pick(self, tensor: Tensor) -> Tensor:
        """Of a tensor with a chunk's R' rows those that go through updates."""
        return tensor if self.rows is None else tensor.index_select(0, self.rows)

    def a_of(self, stored: Tensor) -> Tensor:
        """A of this part's experts, [S', L, in]; with its scale in it where ranks differ."""
        experts = self.chunk.experts
        if self.ranks is None:
            return stored[experts]
        rows = self.ranks.rows(experts)
        return self.ranks.expand(stored[rows] * self.ranks.scales[rows, None], experts)

    def b_of(self, stored: Tensor) -> Tensor:
        """B of this part's experts, [S', out, L]."""
        experts = self.chunk.experts
        if self.ranks is None:
            return stored[experts]
        return self.ranks.expand(stored[self.ranks.rows(experts)], experts).transpose(1, 2)

    def put_a(self, target: Tensor, gradient: Tensor) -> None:
        """Write the gradient of what `a_of` gave into that of the stored factor."""
        experts = self.chunk.experts
        if self.ranks is None:
            target[experts] = gradient
        else:
            rows = self.ranks.rows(experts)
            target[rows] = self.ranks.collapse(gradient, experts) * self.ranks.scales[rows, None]

    def put_b(self, target: Tensor, gradient: Tensor) -> None:
        """Write the gradient of what `b_of` gave into that of the stored factor."""
        experts = self.chunk.experts
        if self.ranks is None:
            target[experts] = gradient
        else:
            target[self.ranks.rows(experts)] = self.ranks.collapse(gradient.transpose(1, 2), experts)


def parts_of(routing: Routing, adapted: Adapted | None) -> list[Part | None]:
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
