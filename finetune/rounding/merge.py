"""The arithmetic of a merge: float32, one cast at the end, a few matrix rows at a time; and sums over the result.

Shape legend: E experts, r rank, N out features, K in features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.adapters.lora import dense_update, squared_norm
from finetune.kernels.experts import LoraFactors
from finetune.mxfp4.format import BLOCK, dequantise

# Scratch is a few float32 copies of this many values, so that it stays in cache. One core made 1.3 GB of bf16 experts
# a second from slices of 2^20 (2026-11-22, AMD EPYC, [5760, 2880] rank 16).
_SLICE_VALUES = 1 << 20
CHECKSUM_RANGE = 1 << 64
_PLACES = 1_000_003  # more than a row has columns


@dataclass
class Tally:
    """Sums over a tensor that measure how much of its update was written, float64.

    Attributes:
        wanted: sum of the squared update.
        kept: sum of (what was written - base) x update.
        missed: sum of (what was written - base - update) squared.
        weights: sum of the squared base.
        changed: values that differ from the base's.
        values: how many there are.
        checksum: of rounded experts, see `checksum`; None: the tensor has none.
    """

    wanted: float = 0.0
    kept: float = 0.0
    missed: float = 0.0
    weights: float = 0.0
    changed: int = 0
    values: int = 0
    checksum: int | None = None

    def add(self, other: Tally) -> None:
        """Add another part of the tensor."""
        self.wanted += other.wanted
        self.kept += other.kept
        self.missed += other.missed
        self.weights += other.weights
        self.changed += other.changed
        self.values += other.values
        if other.checksum is not None:
            self.checksum = ((self.checksum or 0) + other.checksum) % CHECKSUM_RANGE

    @property
    def update_size(self) -> float:
        """Norm of the update relative to the base's."""
        return (self.wanted / self.weights) ** 0.5 if self.weights else float("inf")

    @property
    def survival(self) -> float:
        """Projection of the written change on the update: 1 if all of it was written, 0 if none."""
        return self.kept / self.wanted if self.wanted else 1.0

    @property
    def error(self) -> float:
        """Norm of the written change minus the update, relative to the update's: 1 if nothing was written."""
        return (self.missed / self.wanted) ** 0.5 if self.wanted else 0.0


def checksum(values: Tensor, first_expert: int, rows: Tensor | None = None) -> int:
    """A sum over the bits of values and their places, which one wrong code in a whole model changes.

    Parts of a tensor add up (modulo 2^64), in any order. Each place has an odd factor: no single change keeps the sum.

    Args:
        values: float32 [E, N, K].
        first_expert: number of the first of these experts.
        rows: int64 [N], the rows' own numbers; None: 0 to N - 1.
    """
    experts, num_rows, columns = values.shape
    rows = torch.arange(num_rows) if rows is None else rows
    total = 0
    for expert in range(experts):
        bits = (values[expert].cpu() + 0.0).view(torch.int32).long()  # adding 0.0 gives zeros one sign
        weights = 2 * torch.arange(columns) + 1 + 2 * _PLACES * rows[:, None]
        total += int((bits * weights).sum()) * (2 * (first_expert + expert) + 1)
    return total % CHECKSUM_RANGE


def merge_weight(weight: Tensor, factors: LoraFactors) -> tuple[Tensor, Tally]:
    """Add an update to a bfloat16 weight.

    Args:
        weight: bfloat16 [N, K].
        factors: a [r, K], b [N, r].

    Returns:
        bfloat16 [N, K], rounded once, and the sums over it.
    """
    before = weight.float()
    merged = torch.addmm(before, factors.b, factors.a, alpha=factors.scale).to(torch.bfloat16)
    return merged, tally_of(before, merged.float(), dense_update(factors))


def add_to_experts(
    blocks: Tensor, scales: Tensor, factors: LoraFactors | None, *, transposed: bool = False
) -> tuple[Tensor, Tally]:
    """Dequantise experts and add their update.

    Args:
        blocks, scales: uint8 [E, N, K / 32, 16] and [E, N, K / 32].
        factors: of these experts: a [E, r, K], b [E, N, r]; None: no update.
        transposed: write transformers' orientation, [E, K, N].

    Returns:
        bfloat16 [E, N, K] or [E, K, N], rounded once; and the size of the update (`wanted` alone).
    """
    num_experts, out_size = blocks.shape[:2]
    in_size = blocks.shape[2] * BLOCK
    dense = torch.empty(
        (num_experts, in_size, out_size) if transposed else (num_experts, out_size, in_size), dtype=torch.bfloat16
    )
    tally = Tally() if factors is None else Tally(wanted=float(squared_norm(factors).sum()))
    for expert in range(num_experts):
        for rows in row_slices(out_size, in_size):
            dtype = torch.bfloat16 if factors is None else torch.float32
            values = dequantise(blocks[expert, rows], scales[expert, rows], dtype)
            if factors is not None:
                values.addmm_(factors.b[expert, rows], factors.a[expert], alpha=factors.scale)
                values = values.to(torch.bfloat16)
            if transposed:
                dense[expert, :, rows].copy_(values.t())  # torch transposes fast in two dimensions only
            else:
                dense[expert, rows] = values
    return dense, tally


def row_slices(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Ranges of matrix rows that are worked on at a time."""
    step = max(1, _SLICE_VALUES // num_columns)
    for start in range(0, num_rows, step):
        yield slice(start, min(num_rows, start + step))


def tally_of(before: Tensor, after: Tensor, update: Tensor) -> Tally:
    """Sums over a tensor, or a part of it, that was written."""
    change = after - before
    return Tally(
        wanted=_squares(update),
        kept=dot(change, update),
        missed=_squares(change - update),
        weights=_squares(before),
        changed=int(change.count_nonzero()),
        values=change.numel(),
    )


def _squares(values: Tensor) -> float:
    return dot(values, values)


def dot(left: Tensor, right: Tensor) -> float:
    """Sum of products, float32 inside a row and float64 over the rows: one pass without a float64 copy."""
    return float((left * right).sum(dim=-1).double().sum())
