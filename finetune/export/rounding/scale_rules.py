"""Nearest rounding with the block scales that other tools choose anew, to measure ours against; never written."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from finetune.export.source import Factors
from finetune.mxfp4.constants import BLOCK, SCALE_BIAS
from finetune.mxfp4.format import dequantise, quantise


def nearest_by_rule(
    blocks: Tensor, scales: Tensor, factors: Factors, rule: Literal["floor", "ceil"]
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
