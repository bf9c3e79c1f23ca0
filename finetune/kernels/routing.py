"""Which routed rows belong to which experts, and what a checkpointed layer may skip when it is computed again.

Shape legend: T tokens, K active experts a token, R routed rows (T·K, sorted by expert), R' those of a chunk, E experts,
C experts in a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from dataclasses import dataclass

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


def output_not_wanted() -> bool:
    """Whether a checkpointed layer is being computed again, just for the tensors that its operations save."""
    return _RECOMPUTING.get()
