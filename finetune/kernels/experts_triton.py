"""Triton kernels around the experts' grouped products: dequantise-and-augment, gather, SwiGLU both ways, combine.

`finetune.kernels.experts_launch` calls them; the products themselves are `finetune.kernels.grouped`'s. All of these are
limited by memory bandwidth. Arithmetic is float32, only loads and stores have the tensors' dtype: the interpreter
(TRITON_INTERPRET=1), which computes on the raw bits of bfloat16, then gives the right numbers on a CPU. No atomics: the
same inputs give the same bits. Importing this needs triton; `finetune.kernels.experts_choice` says whether it happens.

An augmented row is [values | LoRA columns (L) | one | zeros], P columns longer than the values. Rows of weights carry B
and the bias where rows of activations carry s·xA^T and 1, so that one product gives base, update and bias.

Shape legend: as in `finetune.kernels.experts`, and P columns of padding, G blocks of 32 in a row of weights.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _write_values(words, scales, out, num_words, width, program, groups: tl.constexpr, W: tl.constexpr):
    """Dequantise words (8 codes, a quarter of a block) number `program` · W and on; row r begins at out[r · width].

    A thread takes one word, because its 8 values in bfloat16 are one 16-byte store and its neighbour's follow them.
    Seen as float32, a code's bits in place give its value times 2^-126, subnormal 0.5 included. The factors put 2^126
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
