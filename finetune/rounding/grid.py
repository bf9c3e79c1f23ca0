"""MXFP4 as a grid of real numbers, for solvers of rounding problems, and the conversion back to bytes.

A value of a block with step s = 2^(scale byte - 127) is one of 0, .5, 1, 1.5, 2, 3, 4, 6 times ±s.

Solvers store matrices with the inputs first, [E, K, N], so that what is rounded at a time is contiguous.
Shape legend: E experts, N out features, K in features, G = K / 32 blocks along K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.mxfp4.format import BLOCK, MAGNITUDES, SCALE_BIAS, dequantise, pack, unpack

LARGEST = 6.0
_SMALLEST_STEP = 2.0**-126  # below, float32 has no reciprocal; such a block has nothing but zeros in practice


def steps(scales: Tensor) -> Tensor:
    """Steps of blocks, float32 [E, G, N], from scale bytes uint8 [E, N, G]."""
    return torch.exp2(scales.float() - SCALE_BIAS).clamp_min(_SMALLEST_STEP).transpose(-1, -2).contiguous()


def values(blocks: Tensor, scales: Tensor) -> Tensor:
    """Float32 [E, K, N] from uint8 [E, N, G, 16] and [E, N, G]."""
    return dequantise(blocks, scales, torch.float32).transpose(-1, -2).contiguous()


def nearest(target: Tensor, step: Tensor) -> Tensor:
    """The grid's nearest values, ties to the even code, saturating at ±6 steps.

    Args:
        target: float32.
        step: of each value, same shape or broadcast.
    """
    scaled = target / step
    size = scaled.abs()
    quantum = 0.5 + 0.5 * (size >= 2) + (size >= 4)  # distance of neighbours: .5 below 2, 1 below 4, 2 above
    return torch.round(scaled / quantum).mul_(quantum).clamp_(-LARGEST, LARGEST).mul_(step)


def neighbours(target: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """The grid's values on both sides of the target, towards zero and away from it; equal if it is on the grid."""
    scaled = target / step
    size = scaled.abs().clamp(max=LARGEST)
    quantum = 0.5 + 0.5 * (size >= 2) + (size >= 4)
    inner = torch.floor(size / quantum) * quantum
    outer = torch.ceil(size / quantum) * quantum
    sign = torch.sign(scaled) * step
    return inner * sign, outer * sign


def encode(rounded: Tensor, scales: Tensor, old_blocks: Tensor, old_scales: Tensor) -> Tensor:
    """Bytes of values on the grid. A value equal to the base's keeps the base's code, the sign of a zero included.

    Args:
        rounded: float32 [E, K, N] on the grid of `scales`.
        scales: uint8 [E, N, G].
        old_blocks, old_scales: the base's.

    Returns:
        uint8 [E, N, G, 16].
    """
    scaled = (rounded / steps(scales).repeat_interleave(BLOCK, dim=-2)).transpose(-1, -2)
    table = torch.zeros(2 * int(LARGEST) + 1, dtype=torch.uint8, device=rounded.device)
    table[[int(2 * magnitude) for magnitude in MAGNITUDES]] = torch.arange(8, dtype=torch.uint8, device=rounded.device)
    codes = table[(2 * scaled.abs()).round().long()] | ((scaled < 0).to(torch.uint8) << 3)
    old_codes = unpack(old_blocks)
    both_zero = (((codes | old_codes) & 7) == 0) & (scales == old_scales).repeat_interleave(BLOCK, dim=-1)
    return pack(torch.where(both_zero, old_codes, codes))
