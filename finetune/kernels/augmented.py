"""The frozen maps of the experts with their updates in extra columns: what the fused block multiplies.

Rows of weights are [W | B | bias | 0], rows of activations [x | s·xA^T | 1 | 0]. A chunk without adapted experts has no
columns for updates, and neither does any product run for them.

Shape legend: as in `finetune.kernels.experts` and `finetune.kernels.adapted`, and P columns beyond a row's values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.kernels import experts_launch as launch
from finetune.kernels.adapted import Adapted, Part
from finetune.kernels.experts import FrozenExperts, PackedLinear
from finetune.kernels.grouped import grouped, padded_rank
from finetune.kernels.routing import Chunk


@dataclass(frozen=True)
class Update:
    """What a chunk's rows get beside one of the frozen maps.

    Attributes:
        part: whose rows.
        a: [S', L', in] in the compute dtype, L' being the rank L padded to whole 16 bytes. b: [S', out, L] as trained.
        scale: alpha / rank.
    """

    part: Part
    a: Tensor
    b: Tensor
    scale: float

    def inner(self, rows: Tensor) -> Tensor:
        """xA^T of the part's rows: [R', in or more] -> [R'', L']."""
        return grouped(self.part.pick(rows)[:, : self.a.shape[2]], self.a.transpose(1, 2), self.part.chunk)

    def columns_of(self, rows: Tensor) -> Tensor:
        """The columns of [R', in + P] that belong to the update: [R'', L'], a view unless other rows lie between.

        Past L they hold what must not count: A is zero there, and gradients of A and B are cut to L.
        """
        inputs = self.a.shape[2]
        return self.part.pick(rows[:, inputs : inputs + self.a.shape[1]])

    def b_of_chunk(self, num_experts: int) -> Tensor:
        """B of every expert of the chunk, [C, out, L]: zeros where there is none, for 0 x rubbish is not 0."""
        if self.part.local is None:
            return self.b
        return self.b.new_zeros(num_experts, *self.b.shape[1:]).index_copy_(0, self.part.local, self.b)


@dataclass(frozen=True)
class Projection:
    """One of the two linear maps of a layer's experts with its update.

    Attributes:
        base: frozen weights and bias.
        a: in the compute dtype, [S, L', in]; as stored where ranks differ. None: no update.
        b: as stored. None: no update.
        scale: alpha / rank.
        inputs: width of the rows it takes.
        rank: the highest of all experts.
        dtype: of the computation.
    """

    base: FrozenExperts
    a: Tensor | None
    b: Tensor | None
    scale: float
    inputs: int
    rank: int
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        base: FrozenExperts,
        a: Tensor | None,
        b: Tensor | None,
        scale: float,
        inputs: int,
        dtype: torch.dtype,
        adapted: Adapted | None,
    ) -> Projection:
        """Take a projection's factors into the compute dtype, all at once where they have one rank."""
        if a is None or b is None:
            return cls(base, None, None, scale, inputs, 0, dtype)
        if adapted is not None and adapted.ranks is not None:
            return cls(base, a, b, scale, inputs, adapted.ranks.highest, dtype)
        return cls(base, padded_rank(a.to(dtype), 1), b.contiguous(), scale, inputs, b.shape[2], dtype)

    def update_of(self, part: Part | None) -> Update | None:
        """What a chunk's adapted experts add; None where there are none."""
        if part is None or self.a is None or self.b is None:
            return None
        a, b = part.a_of(self.a), part.b_of(self.b)
        return Update(part, padded_rank(a.to(self.dtype), 1), b.contiguous(), self.scale)

    def scratch_shape(self, num_experts: int, rank: int) -> tuple[int, int, int]:
        """[C, out, in + P] of so many experts."""
        return num_experts, self.base.bias.shape[1], self.inputs + launch.padding(rank)

    def dequantise(self, chunk: Chunk, update: Update | None, scratch: Tensor) -> Tensor:
        """[C, out, in + P], over whatever the flat scratch held."""
        here, rank = chunk.experts, rank_of(update)
        shape = self.scratch_shape(chunk.last - chunk.first, rank)
        out = scratch[: math.prod(shape)].view(shape)
        bias, b = self.base.bias[here], None if update is None else update.b_of_chunk(len(out))
        if isinstance(self.base, PackedLinear):
            return launch.dequantise_augment(self.base.blocks[here], self.base.scales[here], bias, b, out)
        out[..., : self.inputs] = self.base.dequantised(chunk.first, chunk.last, out.dtype)
        if b is not None:
            out[..., self.inputs : self.inputs + rank] = b
        out[..., self.inputs + rank] = bias
        out[..., self.inputs + rank + 1 :] = 0
        return out

    def append_inner(self, rows: Tensor, update: Update | None) -> None:
        """Write s·xA^T into the columns that rows [R', in + P] have for it; where there is no update they hold 0."""
        if update is None:
            return
        inner, rank = update.inner(rows), rank_of(update)
        into = rows[:, self.inputs : self.inputs + rank]
        if update.part.rows is None:
            torch.mul(inner[:, :rank], self.scale, out=into)
        else:
            into.index_copy_(0, update.part.rows, inner[:, :rank] * self.scale)


def rank_of(update: Update | None) -> int:
    """L, 0 without an update."""
    return 0 if update is None else update.b.shape[2]
