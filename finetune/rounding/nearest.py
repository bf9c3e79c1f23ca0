"""Random numbers of stochastic rounding: the same for a tensor's expert whatever else is rounded, and in what order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from finetune.export.plan import MergePlan, Operation
from finetune.files import seeded_generator
from finetune.kernels.experts import LoraFactors
from finetune.mxfp4.format import BLOCK, SCALE_BIAS, dequantise, quantise

_SEED = "stochastic rounding 0"


def seeded_noise(
    plan: MergePlan, operation: Operation, first: int, rows: slice = slice(None)
) -> Callable[[int], Tensor]:
    """Uniform numbers for `round_experts`.

    Args:
        plan: whose base gives the sizes.
        operation: whose tensor.
        first: number of the first expert.
        rows: which out features are wanted; they get the numbers that they have when all are rounded.
    """
    _, out, groups, _ = plan.checkpoint.tensor_shape(operation.base)

    def noise(place: int) -> Tensor:
        generator = seeded_generator(_SEED, operation.base, first + place)
        return torch.rand(out, groups * BLOCK, generator=generator)[rows]

    return noise


# Nearest rounding with the block scales that other tools choose anew, to measure ours against; never written.


def nearest_by_rule(
    blocks: Tensor, scales: Tensor, factors: LoraFactors, rule: Literal["floor", "ceil"]
) -> tuple[Tensor, Tensor]:
    """Add an update and round to nearest, every block under a new scale.

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
