"""Add an update to packed experts and round to the nearest MXFP4 value, or stochastically to either neighbour.

Shape legend: E experts, r rank, N out features, K in features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from finetune.files import seeded_generator
from finetune.kernels.experts import LoraFactors
from finetune.model.checkpoint import Checkpoint
from finetune.mxfp4.format import BLOCK, BYTES_PER_BLOCK, SCALE_BIAS, dequantise, pack, quantise, unpack
from finetune.rounding import grid
from finetune.rounding.merge import Tally, checksum, row_slices, tally_of

_LARGEST_FITTING = 7.0  # steps of a block's scale: up to here `quantise` would choose the same one
_SEED = "stochastic rounding 0"


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
        first_expert, row_numbers: their place in the whole tensor, for the checksum.

    Returns:
        New blocks and scales, and the sums over them.
    """
    new_blocks, new_scales = torch.empty_like(blocks), torch.empty_like(scales)
    tally = Tally()
    row_numbers = torch.arange(blocks.shape[1]) if row_numbers is None else row_numbers
    for expert in range(len(blocks)):
        drawn = noise(expert) if noise else None
        for rows in row_slices(blocks.shape[1], blocks.shape[2] * BLOCK):
            update = (factors.b[expert, rows] @ factors.a[expert]).mul_(factors.scale)
            old_blocks, old_scales = blocks[expert, rows], scales[expert, rows]
            before = dequantise(old_blocks, old_scales, torch.float32)
            part_blocks, part_scales = _nearest(before + update, old_blocks, old_scales)
            if drawn is not None:
                part_blocks = _either(before + update, drawn[rows], part_scales, old_blocks, old_scales)
            after = dequantise(part_blocks, part_scales, torch.float32)
            made = tally_of(before, after, update)
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


def seeded_noise(checkpoint: Checkpoint, name: str, first: int, rows: slice = slice(None)) -> Callable[[int], Tensor]:
    """Uniform numbers for `round_experts`, the same for an expert whatever else is rounded, and in what order.

    Args:
        checkpoint: the base, which gives the sizes.
        name: of the blocks in it.
        first: number of the first expert.
        rows: out features that are wanted; they get the numbers that they have when all are rounded.
    """
    _, out, groups, _ = checkpoint.tensor_shape(name)

    def noise(place: int) -> Tensor:
        return torch.rand(out, groups * BLOCK, generator=seeded_generator(_SEED, name, first + place))[rows]

    return noise


def nearest_by_rule(
    blocks: Tensor, scales: Tensor, factors: LoraFactors, rule: Literal["floor", "ceil"]
) -> tuple[Tensor, Tensor]:
    """Add an update and round to nearest, with the block scales that other tools choose anew.

    For comparison only: no export writes this.

    Args:
        blocks, scales: uint8 [E, N, G, 16] and [E, N, G].
        factors: of these experts.
        rule: `floor` takes 2^(floor(log2 amax) - 2) (OCP MX v1.0, ggml), `ceil` 2^ceil(log2(amax / 6)) (ModelOpt and
            others).

    Returns:
        New blocks and scales.
    """
    found = []
    for expert in range(len(blocks)):
        values = dequantise(blocks[expert], scales[expert], torch.float32)
        values.addmm_(factors.b[expert].to(values.device), factors.a[expert].to(values.device), alpha=factors.scale)
        largest = values.unflatten(-1, (-1, BLOCK)).abs().amax(-1).clamp_min(2.0**-120)
        exponent = torch.floor(torch.log2(largest)) - 2 if rule == "floor" else torch.ceil(torch.log2(largest / 6))
        found.append(quantise(values, scales=(exponent + SCALE_BIAS).clamp(0, 254).to(torch.uint8)))
    return torch.stack([part for part, _ in found]), torch.stack([part for _, part in found])
