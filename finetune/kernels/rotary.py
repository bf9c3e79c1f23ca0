"""Rotary positions: pairs of a head's numbers turned by an angle that grows with the token's position.

Turning is linear and its inverse is turning back, so the gradient is turned by the opposite angle; nothing else is
saved. On a GPU one Triton kernel reads and writes each number once, in float32 arithmetic; eager operations would move
five times as many bytes and round four times (`bench/cost_model.py` counts them).

Shape legend: N tokens of all sequences joined, H heads, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, fused: bool = False) -> Tensor:
    """Turn the pairs (x[i], x[i + d/2]) of every head.

    Args:
        x: [N, H, d], contiguous; any floating dtype.
        cos, sin: [N, d/2], of each token's angles.
        fused: by the Triton kernel, which needs a GPU (or Triton's interpreter).

    Returns:
        [N, H, d] in x's dtype.
    """
    return _Rotate.apply(x, cos, sin, fused)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, fused: bool) -> Tensor:
    if fused:
        from finetune.kernels.rotary_triton import turned

        return turned(x, cos, sin)
    first, second = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, fused):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin)
        ctx.fused = fused
        return _turned(x, cos, sin, fused)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        cos, sin = ctx.saved_tensors
        return _turned(grad_out.contiguous(), cos, -sin, ctx.fused), None, None, None
