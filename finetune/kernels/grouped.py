"""Grouped matrix products: routed tokens sorted by expert, those of each expert times its own matrix.

torch's `grouped_mm` runs without synchronising with the host on compute capability 9 and 10 (CUTLASS) and on a CPU.
Elsewhere it copies the offsets to the host in every call; there a loop over experts uses the counts that the host
already has. Source: `_grouped_mm_cuda` and `_grouped_mm_fallback` in pytorch 2.13.

Shape legend: R' routed tokens of a chunk, C experts in it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.kernels.dispatch import Chunk

STRIDE_BYTES = 16  # grouped_mm requires every stride to be a multiple of this
FAST_MAJORS = (9, 10)  # compute capabilities whose grouped product does not synchronise with the host


@lru_cache
def runs_in_one_launch(device: torch.device) -> bool:
    """Whether `grouped_mm` computes all experts at once on this device, without synchronising with the host."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in FAST_MAJORS


def grouped(rows: Tensor, matrices: Tensor, chunk: Chunk, *, loop: bool = False) -> Tensor:
    """Rows of expert c times matrices[c]: [R', in] x [C, in, out] -> [R', out].

    Args:
        rows: with unit stride along either axis.
        matrices: likewise; pass a transposed view as it is.
        chunk: of these rows.
        loop: compute the experts one by one, as on devices without a fast `grouped_mm`.
    """
    if runs_in_one_launch(rows.device) and not loop:
        return F.grouped_mm(rows, matrices, offs=chunk.offsets)
    out = rows.new_empty(len(rows), matrices.shape[2])
    for matrix, (start, stop) in zip(matrices, chunk.spans(), strict=True):
        torch.mm(rows[start:stop], matrix, out=out[start:stop])
    return out


def grouped_outer(left: Tensor, right: Tensor, chunk: Chunk, *, loop: bool = False) -> Tensor:
    """left[of c] transposed times right[of c]: [R', M], [R', N] -> [C, M, N]; zero for experts without tokens."""
    if not runs_in_one_launch(left.device) or loop:
        out = left.new_empty(len(chunk.counts), left.shape[1], right.shape[1])
        for here, (start, stop) in zip(out, chunk.spans(), strict=True):
            torch.mm(left[start:stop].t(), right[start:stop], out=here)
        return out
    out = F.grouped_mm(left.t(), right, offs=chunk.offsets)
    for number, count in enumerate(chunk.counts):
        if count == 0:
            out[number].zero_()  # CUTLASS leaves a product over no rows undefined
    return out


def padded_rank(factor: Tensor, dim: int) -> Tensor:
    """Pad a LoRA factor with zeros along its rank until rows of that length are aligned; the product stays the same."""
    missing = -factor.shape[dim] % (STRIDE_BYTES // factor.element_size())
    if not missing:
        return factor
    shape = list(factor.shape)
    shape[dim] = missing
    return torch.cat([factor, factor.new_zeros(shape)], dim)
