"""The arithmetic of a merge: float32, one cast at the end, a few rows at a time.

Shape legend: E experts, r rank, N out features, K in features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.adapters.lora import dense_update, squared_norm
from finetune.kernels.experts import LoraFactors
from finetune.mxfp4.format import BLOCK, BYTES_PER_BLOCK, SCALE_BIAS, dequantise, pack, quantise, unpack
from finetune.rounding import grid

# Scratch is a few float32 copies of this many values, so that it stays in cache. One core made 1.3 GB of bf16 experts
# a second from slices of 2^20 (2026-11-22, AMD EPYC, [5760, 2880] rank 16).
_SLICE_VALUES = 1 << 20
CHECKSUM_RANGE = 1 << 64
_PLACES = 1_000_003  # more than a row has columns
_LARGEST_FITTING = 7.0  # steps of a block's scale: up to there `quantise` would choose the same one


@dataclass
class Tally:
    """Sums over a tensor that say what became of its update, float64.

    Attributes:
        wanted: sum of the squared update.
        kept: sum of (what was written - base) x update.
        missed: sum of (what was written - base - update) squared.
        weights: sum of the squared base.
        changed: values that differ from the base's.
        values: how many there are.
        checksum: of rounded experts, see `checksum`; None: there are none among them.
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
        """Projection of the written change on the update: 1 if it is all there, 0 if nothing of it is."""
        return self.kept / self.wanted if self.wanted else 1.0

    @property
    def error(self) -> float:
        """Norm of the written change minus the update, relative to the update's: 1 if nothing was written."""
        return (self.missed / self.wanted) ** 0.5 if self.wanted else 0.0


def checksum(values: Tensor, first_expert: int, rows: Tensor | None = None) -> int:
    """A sum over the bits of values and their places, so that one wrong code of a whole model shows.

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
        bfloat16 [N, K], rounded once, and what became of the update.
    """
    before = weight.float()
    merged = torch.addmm(before, factors.b, factors.a, alpha=factors.scale).to(torch.bfloat16)
    return merged, _tally(before, merged.float(), dense_update(factors))


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
        for rows in _slices(out_size, in_size):
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


def round_experts(
    blocks: Tensor,
    scales: Tensor,
    factors: LoraFactors,
    noise: Callable[[int], Tensor] | None = None,
    *,
    first_expert: int = 0,
    row_numbers: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tally]:
    """Add an update to packed experts and round to the nearest value each block can hold, or to either neighbour.

    A block keeps its scale while its values fit. One that outgrew it takes the scale `quantise` would choose if that
    leaves a smaller error. A value that does not move keeps its code, the sign of a zero included.

    Args:
        blocks, scales: uint8 [E, N, K / 32, 16] and [E, N, K / 32].
        factors: of these experts: a [E, r, K], b [E, N, r].
        noise: gives each expert (by its place) uniform numbers [N, K] from 0 to 1: a value then goes to the neighbour
            away from zero with the probability that makes it right on average. None: to the nearest.
        first_expert, row_numbers: where these lie in the whole tensor, for the checksum.

    Returns:
        New blocks and scales, and what became of the update.
    """
    new_blocks, new_scales = torch.empty_like(blocks), torch.empty_like(scales)
    tally = Tally()
    row_numbers = torch.arange(blocks.shape[1]) if row_numbers is None else row_numbers
    for expert in range(len(blocks)):
        drawn = noise(expert) if noise else None
        for rows in _slices(blocks.shape[1], blocks.shape[2] * BLOCK):
            update = (factors.b[expert, rows] @ factors.a[expert]).mul_(factors.scale)
            old_blocks, old_scales = blocks[expert, rows], scales[expert, rows]
            before = dequantise(old_blocks, old_scales, torch.float32)
            part_blocks, part_scales = _nearest(before + update, old_blocks, old_scales)
            if drawn is not None:
                part_blocks = _either(before + update, drawn[rows], part_scales, old_blocks, old_scales)
            after = dequantise(part_blocks, part_scales, torch.float32)
            made = _tally(before, after, update)
            made.checksum = checksum(after[None], first_expert + expert, row_numbers[rows])
            tally.add(made)
            new_blocks[expert, rows], new_scales[expert, rows] = part_blocks, part_scales
    return new_blocks, new_scales, tally


def _nearest(target: Tensor, old_blocks: Tensor, old_scales: Tensor) -> tuple[Tensor, Tensor]:
    """Round float32 [N, K] under the old scales where they suffice."""
    blocks, scales = quantise(target, scales=old_scales)
    codes, old_codes = unpack(blocks), unpack(old_blocks)
    both_zero = ((codes | old_codes) & 7) == 0
    blocks = pack(torch.where(both_zero, old_codes, codes))
    grouped = target.view(-1, BLOCK)
    limit = torch.exp2(old_scales.view(-1).float() - SCALE_BIAS) * _LARGEST_FITTING
    outgrown = (grouped.abs().amax(dim=1) > limit).nonzero().squeeze(1)
    if len(outgrown):
        values = grouped[outgrown]
        wider_blocks, wider_scales = quantise(values)
        flat_blocks, flat_scales = blocks.view(-1, BYTES_PER_BLOCK), scales.clone().view(-1)
        as_is = dequantise(flat_blocks[outgrown].unsqueeze(1), flat_scales[outgrown].unsqueeze(1), torch.float32)
        wider = dequantise(wider_blocks, wider_scales, torch.float32)
        better = (wider - values).square().sum(1) < (as_is - values).square().sum(1)
        flat_blocks[outgrown[better]] = wider_blocks.view(-1, BYTES_PER_BLOCK)[better]
        flat_scales[outgrown[better]] = wider_scales.view(-1)[better]
        scales = flat_scales.view(old_scales.shape)
    return blocks, scales


def _either(target: Tensor, drawn: Tensor, scales: Tensor, old_blocks: Tensor, old_scales: Tensor) -> Tensor:
    """Blocks of float32 [N, K] rounded to one of both neighbours under given scales."""
    step = grid.steps(scales[None])[0].T.repeat_interleave(BLOCK, dim=1)
    inner, outer = grid.neighbours(target, step)
    share = ((target - inner) / (outer - inner)).nan_to_num(0.0)  # 0 / 0 on the grid itself
    values = torch.where(drawn < share, outer, inner)
    return grid.encode(values.T[None], scales[None], old_blocks[None], old_scales[None])[0]


def _slices(num_rows: int, num_columns: int) -> Iterator[slice]:
    step = max(1, _SLICE_VALUES // num_columns)
    for start in range(0, num_rows, step):
        yield slice(start, min(num_rows, start + step))


def _tally(before: Tensor, after: Tensor, update: Tensor) -> Tally:
    change = after - before
    return Tally(
        wanted=_squares(update),
        kept=_dot(change, update),
        missed=_squares(change - update),
        weights=_squares(before),
        changed=int(change.count_nonzero()),
        values=change.numel(),
    )


def _squares(values: Tensor) -> float:
    return _dot(values, values)


def _dot(left: Tensor, right: Tensor) -> float:
    # float32 inside a row, float64 over the rows: one pass without a float64 copy
    return float((left * right).sum(dim=-1).double().sum())
