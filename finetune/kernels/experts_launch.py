"""Calls of the Triton kernels: sizes, tiles and outputs. Each function is one launch.

Shape legend: as in `finetune.kernels.experts_triton`.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from finetune.kernels import experts_triton as kernels

ROWS, COLUMNS = 4, 512  # a program's tile of activations: 16 elements a thread
PAIR_COLUMNS = 256  # the same where each column is a pair of gate and up
WORDS, UNROLL = 128, 4  # 4-byte words of MXFP4 (8 values) at a time, one a thread, and how often a program does that
TAIL_ELEMENTS = 2048  # elements of padding a program
PAD_ALIGNMENT = 32  # padding is a multiple of this, so that every row starts aligned for tensor memory access


def padding(rank: int) -> int:
    """P: columns that an augmented row has beyond its values: rank + 1 for the bias, rounded up to 32."""
    return -(-(rank + 1) // PAD_ALIGNMENT) * PAD_ALIGNMENT


def dequantise_augment(blocks: Tensor, scales: Tensor, bias: Tensor, lora_b: Tensor | None, out: Tensor) -> Tensor:
    """K1: write [W | B | bias | 0] of a chunk of experts.

    Args:
        blocks: uint8 [C, N, G, 16], contiguous. scales: uint8 [C, N, G], contiguous.
        bias: [C, N]. lora_b: [C, N, L], of any floating dtype, contiguous; None for L = 0.
        out: [C, N, 32 G + padding(L)], contiguous; its dtype decides the rounding of B and bias (W is exact).

    Returns:
        `out`.
    """
    num_rows, groups = scales.shape[0] * scales.shape[1], scales.shape[2]
    rank = 0 if lora_b is None else lora_b.shape[2]
    pad = padding(rank)
    tail_columns = triton.next_power_of_2(pad)
    tail_rows = max(1, TAIL_ELEMENTS // tail_columns)
    words = blocks.view(torch.int32)
    body = triton.cdiv(words.numel(), WORDS * UNROLL)
    grid = (body + triton.cdiv(num_rows, tail_rows),)
    kernels.augment_kernel[grid](
        words, scales, bias, bias if lora_b is None else lora_b, out, words.numel(), num_rows, body, pad,
        groups=groups, rank=rank, W=WORDS, UNROLL=UNROLL, TAIL_ROWS=tail_rows, TAIL_COLUMNS=tail_columns,
    )  # fmt: skip
    return out


def gather(source: Tensor, order: Tensor, top_k: int, rank: int | None) -> Tensor:
    """K2 (and the output gradient's gather): rows of tokens in expert order.

    Args:
        source: [T, D], contiguous.
        order: int64 [R'], position of each row among the T·K choices.
        top_k: K.
        rank: L; the row is augmented with L columns left at zero. None: no padding.

    Returns:
        [R', D + padding(L)], or [R', D].
    """
    pad = 0 if rank is None else padding(rank)
    width = source.shape[1]
    out = source.new_empty(len(order), width + pad)
    grid = (triton.cdiv(len(order), ROWS), triton.cdiv(width + pad, COLUMNS))
    kernels.gather_kernel[grid](
        source, order, out, len(order), width, pad, top_k=top_k, rank=rank or 0, R=ROWS, C=COLUMNS
    )  # fmt: skip
    return out


def swiglu(hidden: Tensor, limit: float, gain: float, rank: int) -> Tensor:
    """K4: interleaved pairs [R', 2F] -> augmented activations [R', F + padding(L)], LoRA columns left at zero."""
    rows, width, pad = len(hidden), hidden.shape[1] // 2, padding(rank)
    out = hidden.new_empty(rows, width + pad)
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(width + pad, PAIR_COLUMNS))
    kernels.swiglu_kernel[grid](hidden, out, rows, width, pad, limit, gain, rank=rank, R=ROWS, C=PAIR_COLUMNS)
    return out


def swiglu_backward(
    hidden: Tensor,
    grad_out: Tensor,
    grad_lora: Tensor | None,
    row_weights: Tensor,
    grad_row_weights: Tensor,
    limit: float,
    gain: float,
    rank: int,
) -> Tensor:
    """The activation's gradient and the router weights'.

    Args:
        hidden: [R', 2F]; overwritten with its gradient.
        grad_out: [R', F + padding(L)], the unweighted dY · [W | B | bias | 0].
        grad_lora: [R', F], the unweighted s · dY · B A. None: no update.
        row_weights: [R'], router weights.
        grad_row_weights: [R'], written.
        limit, gain: of the activation.
        rank: L.

    Returns:
        Activations [R', F], which the update's gradients need.
    """
    rows, width = len(hidden), hidden.shape[1] // 2
    activated = hidden.new_empty(rows, width)
    kernels.swiglu_backward_kernel[(triton.cdiv(rows, ROWS),)](
        hidden, grad_out, grad_out if grad_lora is None else grad_lora, row_weights, activated, grad_row_weights,
        rows, padding(rank), limit, gain,
        width=width, rank=rank, has_lora=grad_lora is not None, R=ROWS, C=PAIR_COLUMNS,
    )  # fmt: skip
    return activated


def combine(rows: Tensor, position: Tensor, weights: Tensor | None, top_k: int) -> Tensor:
    """K6: add each token's K rows in float32 and in a fixed order.

    Args:
        rows: [T·K, D], contiguous, in expert order.
        position: int64 [T·K], row of each choice.
        weights: [T, K], factors of the rows. None: ones.
        top_k: K.

    Returns:
        [T, D] in the rows' dtype.
    """
    num_tokens, width = len(position) // top_k, rows.shape[1]
    out = rows.new_empty(num_tokens, width)
    grid = (triton.cdiv(num_tokens, ROWS), triton.cdiv(width, COLUMNS))
    kernels.combine_kernel[grid](
        rows, position, rows if weights is None else weights, out, num_tokens, width,
        top_k=top_k, weighted=weights is not None, R=ROWS, C=COLUMNS,
    )  # fmt: skip
    return out
