"""Triton kernels around the experts' grouped products, and the functions that launch them.

Dequantise-and-augment, gather, SwiGLU both ways, combine; the products themselves are in `finetune.kernels.grouped`.
All of these are limited by memory bandwidth. Arithmetic is float32, only loads and stores have the tensors' dtype: the
interpreter (TRITON_INTERPRET=1), which computes on the raw bits of bfloat16, then gives the right numbers on a CPU. No
atomics: the same inputs give the same bits. Importing this module needs triton; `finetune.kernels.choice` decides
whether that happens.

An augmented row is [values | LoRA columns (L) | one | zeros], P columns longer than the values. Rows of weights carry B
and the bias where rows of activations carry s·xA^T and 1, so that one product gives base, update and bias.

Shape legend: as in `finetune.kernels.experts`, and P columns of padding, N rows of an expert's weights, G blocks of 32
in a row of weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 4, 512  # a program's tile of activations: 16 elements per thread
PAIR_COLUMNS = 256  # the same where each column is a pair of gate and up
WORDS, UNROLL = 128, 4  # 4-byte words of MXFP4 (8 values) at a time, one per thread, and repeats per program
TAIL_ELEMENTS = 2048  # elements of padding per program
PAD_ALIGNMENT = 32  # padding is a multiple of this, so that every row starts aligned for tensor memory access


# Launches


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
    augment_kernel[grid](
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
    gather_kernel[grid](
        source, order, out, len(order), width, pad, top_k=top_k, rank=rank or 0, R=ROWS, C=COLUMNS
    )  # fmt: skip
    return out


def swiglu(hidden: Tensor, limit: float, gain: float, rank: int) -> Tensor:
    """K4: interleaved pairs [R', 2F] -> augmented activations [R', F + padding(L)], LoRA columns left at zero."""
    rows, width, pad = len(hidden), hidden.shape[1] // 2, padding(rank)
    out = hidden.new_empty(rows, width + pad)
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(width + pad, PAIR_COLUMNS))
    swiglu_kernel[grid](hidden, out, rows, width, pad, limit, gain, rank=rank, R=ROWS, C=PAIR_COLUMNS)
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
    swiglu_backward_kernel[(triton.cdiv(rows, ROWS),)](
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
    combine_kernel[grid](
        rows, position, rows if weights is None else weights, out, num_tokens, width,
        top_k=top_k, weighted=weights is not None, R=ROWS, C=COLUMNS,
    )  # fmt: skip
    return out


# Kernels


@triton.jit
def _write_values(words, scales, out, num_words, width, program, groups: tl.constexpr, W: tl.constexpr):
    """Dequantise words (8 codes, a quarter of a block) number `program` · W and on; row r begins at out[r · width].

    A thread takes one word, because its 8 values in bfloat16 are one 16-byte store and its neighbour's follow them.
    Read as float32, a code's bits in place give its value times 2^-126, subnormal 0.5 included. The factors put 2^126
    and the block's scale back in two steps, neither of which overflows on its own; so infinities and zeros come out as
    in `finetune.mxfp4.format.dequantise`.
    """
    word = program * W + tl.arange(0, W)
    inside = word < num_words
    block = word // 4
    exponent = tl.load(scales + block, mask=inside, other=127).to(tl.int32) - 1  # of 2^126 · 2^(scale - 127)
    first = ((tl.minimum(exponent, 127) + 127) << 23).to(tl.float32, bitcast=True)
    second = ((tl.maximum(exponent - 127, 0) + 127) << 23).to(tl.float32, bitcast=True)
    codes = tl.load(words + word, mask=inside, other=0)[:, None] >> (tl.arange(0, 8) * 4)[None, :]
    bits = ((codes & 7) << 22) | ((codes & 8) << 28)
    values = bits.to(tl.float32, bitcast=True) * first[:, None] * second[:, None]
    start = (block // groups).to(tl.int64) * width + (word % (groups * 4)) * 8
    target = out + start[:, None] + tl.arange(0, 8)[None, :]
    tl.store(target, values.to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _write_padding(
    bias, lora_b, out, num_rows, first_column, pad, program, rank: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    """Write [B | bias | 0] at the end of rows number `program` · R and on."""
    row = program.to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, C)
    inside = row < num_rows
    of_lora = inside[:, None] & (column < rank)[None, :]
    factor = tl.load(lora_b + row[:, None] * rank + column[None, :], mask=of_lora, other=0.0).to(tl.float32)
    constant = tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
    values = tl.where((column == rank)[None, :], constant[:, None], factor)
    target = out + row[:, None] * (first_column + pad) + first_column + column[None, :]
    tl.store(target, values.to(out.dtype.element_ty), mask=inside[:, None] & (column < pad)[None, :])


@triton.jit(do_not_specialize=["num_words", "num_rows", "body_programs"])
def augment_kernel(
    words, scales, bias, lora_b, out, num_words, num_rows, body_programs, pad,
    groups: tl.constexpr, rank: tl.constexpr,
    W: tl.constexpr, UNROLL: tl.constexpr, TAIL_ROWS: tl.constexpr, TAIL_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows [W | B | bias | 0]. The first `body_programs` programs write W, the others the padding."""
    program = tl.program_id(0)
    if program < body_programs:
        for step in tl.static_range(UNROLL):
            _write_values(words, scales, out, num_words, groups * 32 + pad, program * UNROLL + step, groups, W)
    else:
        _write_padding(
            bias, lora_b, out, num_rows, groups * 32, pad, program - body_programs, rank, TAIL_ROWS, TAIL_COLUMNS
        )


@triton.jit(do_not_specialize=["num_rows"])
def gather_kernel(
    source, order, out, num_rows, width, pad,
    top_k: tl.constexpr, rank: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """out[r] = [source[order[r] // top_k] | 0 (L) | 1 | 0], without padding if `pad` is 0."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    inside = row < num_rows
    token = tl.load(order + row, mask=inside, other=0) // top_k
    of_source = inside[:, None] & (column < width)[None, :]
    values = tl.load(source + token[:, None] * width + column[None, :], mask=of_source, other=0.0).to(tl.float32)
    values = tl.where((column == width + rank)[None, :], 1.0, values)
    target = out + row[:, None] * (width + pad) + column[None, :]
    tl.store(target, values.to(out.dtype.element_ty), mask=inside[:, None] & (column < width + pad)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def swiglu_kernel(
    hidden, out, num_rows, width, pad, limit, gain,
    rank: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Interleaved pairs hidden [R', 2F] -> out [R', F + P] = [activation | 0 (L) | 1 | 0]."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    pair_column = tl.program_id(1) * 2 * C + tl.arange(0, 2 * C)
    column = tl.program_id(1) * C + tl.arange(0, C)
    inside = row < num_rows
    of_pairs = inside[:, None] & (pair_column < 2 * width)[None, :]
    pairs = tl.load(hidden + row[:, None] * 2 * width + pair_column[None, :], mask=of_pairs, other=0.0).to(tl.float32)
    gate, up = tl.split(tl.reshape(pairs, (R, C, 2)))
    gate = tl.minimum(gate, limit)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    values = (up + 1) * gate * tl.sigmoid(gain * gate)
    values = tl.where((column < width)[None, :], values, 0.0)
    values = tl.where((column == width + rank)[None, :], 1.0, values)
    target = out + row[:, None] * (width + pad) + column[None, :]
    tl.store(target, values.to(out.dtype.element_ty), mask=inside[:, None] & (column < width + pad)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def swiglu_backward_kernel(
    hidden, grad_out, grad_lora, row_weights, activated, grad_row_weights,
    num_rows, pad, limit, gain,
    width: tl.constexpr, rank: tl.constexpr, has_lora: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Overwrites hidden [R', 2F] with its gradient; writes activations [R', F] and the router weights' gradients [R'].

    grad_out [R', F + P] is the unweighted output gradient times [W | B | bias | 0], grad_lora [R', F] the part of the
    activation's gradient that runs through the update. A router weight's gradient is <y, dY>, which without forming y
    is <activation, its unweighted gradient> + <bias, dY>. A program keeps its rows, so that sum has one order.
    """
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    inside = row < num_rows
    weight = tl.load(row_weights + row, mask=inside, other=0.0).to(tl.float32)
    tail = tl.load(grad_out + row * (width + pad) + width + rank, mask=inside, other=0.0).to(tl.float32)
    partial = tl.zeros((R, C), dtype=tl.float32)
    for start in range(0, width, C):
        column = start + tl.arange(0, C)
        pair_column = 2 * start + tl.arange(0, 2 * C)
        here = inside[:, None] & (column < width)[None, :]
        pairs_here = inside[:, None] & (pair_column < 2 * width)[None, :]
        place = hidden + row[:, None] * 2 * width + pair_column[None, :]
        raw_gate, raw_up = tl.split(tl.reshape(tl.load(place, mask=pairs_here, other=0.0).to(tl.float32), (R, C, 2)))
        gate = tl.minimum(raw_gate, limit)
        up = tl.minimum(tl.maximum(raw_up, -limit), limit)
        gated = tl.sigmoid(gain * gate)
        value = (up + 1) * gate * gated
        grad = tl.load(grad_out + row[:, None] * (width + pad) + column[None, :], mask=here, other=0.0).to(tl.float32)
        if has_lora:
            grad += tl.load(grad_lora + row[:, None] * width + column[None, :], mask=here, other=0.0).to(tl.float32)
        partial += value * grad
        grad = grad * weight[:, None]
        grad_gate = grad * (up + 1) * gated * (1 + gain * gate * (1 - gated))
        grad_gate = tl.where(raw_gate <= limit, grad_gate, 0.0)
        grad_up = tl.where((raw_up >= -limit) & (raw_up <= limit), grad * gate * gated, 0.0)
        grads = tl.reshape(tl.join(grad_gate, grad_up), (R, 2 * C))
        tl.store(place, grads.to(hidden.dtype.element_ty), mask=pairs_here)
        target = activated + row[:, None] * width + column[None, :]
        tl.store(target, value.to(activated.dtype.element_ty), mask=here)
    tl.store(grad_row_weights + row, tl.sum(partial, axis=1) + tail, mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def combine_kernel(
    rows, position, weights, out, num_tokens, width,
    top_k: tl.constexpr, weighted: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over k, in order, of weights[t, k] · rows[position[t, k]]."""
    token = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    inside = token < num_tokens
    here = inside[:, None] & (column < width)[None, :]
    total = tl.zeros((R, C), dtype=tl.float32)
    for slot in range(top_k):
        row = tl.load(position + token * top_k + slot, mask=inside, other=0)
        values = tl.load(rows + row[:, None] * width + column[None, :], mask=here, other=0.0).to(tl.float32)
        if weighted:
            values *= tl.load(weights + token * top_k + slot, mask=inside, other=0.0).to(tl.float32)[:, None]
        total += values
    tl.store(out + token[:, None] * width + column[None, :], total.to(out.dtype.element_ty), mask=here)
