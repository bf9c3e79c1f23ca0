"""The Triton kernel behind `finetune.kernels.rotary`; importing this module needs triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32  # heads of tokens per program: with 32 pairs each a thread writes 16 bytes at a time


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [N, H, d] turned by the angles whose cosines and sines are [N, d/2]; in x's dtype."""
    tokens, heads, width = x.shape
    out = torch.empty_like(x)
    rows, half = tokens * heads, width // 2
    grid = (triton.cdiv(rows, ROWS),)
    rotary_kernel[grid](x, cos, sin, out, rows, heads, half=half, R=ROWS, C=triton.next_power_of_2(half))
    return out


@triton.jit(do_not_specialize=["num_rows"])
def rotary_kernel(x, cos, sin, out, num_rows, heads, half: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """A row is a head of a token; its first and second half are turned against each other."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, C)
    inside = (row < num_rows)[:, None] & (column < half)[None, :]
    angle = (row // heads)[:, None] * half + column[None, :]
    place = row[:, None] * (2 * half) + column[None, :]
    c = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    first = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + place + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(out + place + half, (second * c + first * s).to(out.dtype.element_ty), mask=inside)
