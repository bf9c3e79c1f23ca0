"""Random numbers of stochastic rounding: the same for a tensor's expert whatever else is rounded, and in what order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from finetune.export.plan import MergePlan, Operation
from finetune.mxfp4.constants import BLOCK

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
        digest = hashlib.sha256(f"{_SEED} {operation.base} {first + place}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        return torch.rand(out, groups * BLOCK, generator=generator)[rows]

    return noise
