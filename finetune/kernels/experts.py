"""The routed experts' forward and backward over packed MXFP4 weights with LoRA inside, in plain PyTorch.

This is the specification that faster kernels must equal. Only a chunk of experts is ever dequantised at a time: the
forward pass keeps the block's inputs and nothing of the experts' width, and the backward pass replays chunk by chunk,
so the scratch of one chunk is freed before the next one is taken. The update is applied as two thin products beside
the base product; W + BA is never formed.

Shape legend: T tokens, D hidden, E experts, K active experts a token, R routed rows (T·K, sorted by expert), F expert
width, L rank, C experts in a chunk, S adapted experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm

from finetune.kernels.dispatch import Chunk, LoraExperts, Part, Routing, is_recomputing, lora_chunks
from finetune.kernels.grouped import padded_rank
from finetune.mxfp4.format import dequantise


class FrozenExperts(Protocol):
    """E frozen linear maps out -> in, however they are held."""

    @property
    def bias(self) -> Tensor:
        """[E, out], in the compute dtype."""

    def dequantised(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Weights of experts `first` to `last` (exclusive) as [C, out, in]. Not to be written to."""


@dataclass(frozen=True)
class Mxfp4Experts:
    """E frozen linear maps in MXFP4.

    Attributes:
        blocks: uint8 [E, out, in / 32, 16].
        scales: uint8 [E, out, in / 32].
        bias: [E, out], in the compute dtype.
    """

    blocks: Tensor
    scales: Tensor
    bias: Tensor

    def dequantised(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Weights of experts `first` to `last` (exclusive) as [C, out, in]."""
        return dequantise(self.blocks[first:last], self.scales[first:last], dtype=dtype)


@dataclass(frozen=True)
class LoraFactors:
    """S low-rank updates, of all E experts or of some: update of expert e = scale · b[e] @ a[e].

    Attributes:
        a: [S, L, in]. b: [S, out, L]. Where ranks differ (`finetune.kernels.dispatch`) [N, in] and [N, out]. Both
            float32 or the compute dtype.
        scale: alpha / rank; 1 where ranks differ, whose scales are their own.
    """

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class ExpertWeights:
    """Everything one layer's experts need beside their inputs.

    Attributes:
        gate_up: D -> 2F; even outputs are gates, odd ones ups.
        down: F -> D.
        limit: clamp of gate (from above) and up (from both sides).
        gain: factor inside the gate's sigmoid.
        experts_per_chunk: experts dequantised at a time.
    """

    gate_up: FrozenExperts
    down: FrozenExperts
    limit: float
    gain: float
    experts_per_chunk: int


def clamped_swiglu(gate_up: Tensor, limit: float, gain: float) -> Tensor:
    """gpt-oss's activation on interleaved pairs: [..., 2F] -> [..., F].

    gate = min(gate, limit); up = clamp(up, -limit, limit); (up + 1) · gate · sigmoid(gain · gate).
    """
    gate = gate_up[..., ::2].clamp(max=limit)
    up = gate_up[..., 1::2].clamp(min=-limit, max=limit)
    return (up + 1) * gate * torch.sigmoid(gain * gate)


def expert_block(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    weights: ExpertWeights,
    gate_up_lora: LoraFactors | None,
    down_lora: LoraFactors | None,
    adapted: LoraExperts | None = None,
) -> Tensor:
    """Send every token through its experts and sum their outputs with the router's weights.

    Gradients reach `x`, `expert_weights` and the LoRA factors; the packed weights are constants.

    Args:
        x: [T, D], float32 or bfloat16 (`grouped_mm` has no float64).
        expert_ids: int64 [T, K], each token's experts.
        expert_weights: [T, K], the router's softmax over those K.
        weights: the layer's packed experts.
        gate_up_lora, down_lora: updates, or None for none.
        adapted: whose updates these are; rows of other experts skip the thin products. None: of all experts.

    Returns:
        [T, D] in x's dtype. The sum over K runs in a fixed order, so equal inputs give equal bits.
    """
    factors = [t for lora in (gate_up_lora, down_lora) for t in ((lora.a, lora.b) if lora else (None, None))]
    scales = tuple(lora.scale if lora else 0.0 for lora in (gate_up_lora, down_lora))
    return _ExpertBlock.apply(x, expert_weights, *factors, expert_ids, weights, scales, adapted)


class _ExpertBlock(torch.autograd.Function):
    """Saves the inputs only; the backward pass replays each chunk under autograd."""

    @staticmethod
    def forward(ctx, x, expert_weights, gate_up_a, gate_up_b, down_a, down_b, expert_ids, weights, scales, adapted):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, expert_weights, gate_up_a, gate_up_b, down_a, down_b)
        if is_recomputing():
            return torch.full_like(x, torch.nan)
        # Kept beside the saved tensors: a layer computed again cannot route another way than its output was made.
        ctx.routing = routing = Routing.of(expert_ids, len(weights.gate_up.bias), weights.experts_per_chunk)
        ctx.parts = parts = lora_chunks(routing, adapted)
        ctx.weights, ctx.scales = weights, scales
        token_of_row = routing.order // routing.top_k
        row_weights = expert_weights.reshape(-1)[routing.order]
        rows = x.new_empty(len(routing.order), x.shape[1])
        for chunk, part in zip(routing.chunks(), parts, strict=True):
            factors = _factors((gate_up_a, gate_up_b, down_a, down_b), part)
            inputs = [x[token_of_row[chunk.rows]], row_weights[chunk.rows], *factors]
            rows[chunk.rows] = _chunk_forward(inputs, chunk, part, weights, scales)
        return _combine(rows, routing)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        x, expert_weights, *factors = ctx.saved_tensors
        routing, needs = ctx.routing, ctx.needs_input_grad[:6]
        token_of_row = routing.order // routing.top_k
        row_weights = expert_weights.reshape(-1)[routing.order]
        grad_rows = x.new_empty(len(routing.order), x.shape[1]) if needs[0] else None
        grad_row_weights = torch.empty_like(row_weights) if needs[1] else None
        # Experts of a chunk without rows are never visited: their gradient is zero.
        grad_factors = [torch.zeros_like(t) if need else None for t, need in zip(factors, needs[2:], strict=True)]
        for chunk, part in zip(routing.chunks(), ctx.parts, strict=True):
            tokens = token_of_row[chunk.rows]
            inputs = [x[tokens], row_weights[chunk.rows], *_factors(factors, part)]
            gradients = _chunk_backward(inputs, needs, grad_out[tokens], chunk, part, ctx.weights, ctx.scales)
            for target, gradient in zip((grad_rows, grad_row_weights), gradients[:2], strict=True):
                if target is not None and gradient is not None:
                    target[chunk.rows] = gradient
            _put_factors(grad_factors, gradients[2:], part)
        grad_x = None if grad_rows is None else _combine(grad_rows, routing)
        grad_expert_weights = None
        if grad_row_weights is not None:
            grad_expert_weights = torch.empty_like(grad_row_weights).index_copy_(0, routing.order, grad_row_weights)
            grad_expert_weights = grad_expert_weights.view_as(expert_weights)
        return grad_x, grad_expert_weights, *grad_factors, None, None, None, None


def _factors(stored: Sequence[Tensor | None], part: Part | None) -> list[Tensor | None]:
    """Of gate_up a and b, down a and b those of a part's experts."""
    if part is None:
        return [None] * 4
    takes = (part.gather_a, part.gather_b, part.gather_a, part.gather_b)
    return [None if factor is None else take(factor) for take, factor in zip(takes, stored, strict=True)]


def _put_factors(targets: Sequence[Tensor | None], gradients: Sequence[Tensor | None], part: Part | None) -> None:
    if part is None:
        return
    puts = (part.scatter_grad_a, part.scatter_grad_b, part.scatter_grad_a, part.scatter_grad_b)
    for put, target, gradient in zip(puts, targets, gradients, strict=True):
        if target is not None and gradient is not None:
            put(target, gradient)


def _combine(rows: Tensor, routing: Routing) -> Tensor:
    """Put [R, D] rows back in token order and add each token's K: [T, D]."""
    return rows[routing.position()].view(-1, routing.top_k, rows.shape[1]).sum(1)


def _chunk_forward(
    inputs: Sequence[Tensor | None],
    chunk: Chunk,
    part: Part | None,
    weights: ExpertWeights,
    scales: tuple[float, float],
) -> Tensor:
    """One chunk's rows through its experts, times the router's weight. Differentiable.

    Args:
        inputs: rows [R', D] and their router weights [R'], then the part's LoRA factors (gate_up a and b, down a and
            b) or None.
        chunk: which experts and rows.
        part: which of them have updates; None: none.
        weights, scales: of the layer.

    Returns:
        [R', D].
    """
    x_rows, row_weights, gate_up_a, gate_up_b, down_a, down_b = inputs
    assert x_rows is not None and row_weights is not None
    expert_of_row = chunk.expert_of_row()

    def linear(rows: Tensor, base: FrozenExperts, a: Tensor | None, b: Tensor | None, scale: float) -> Tensor:
        out = _grouped(rows, base.dequantised(chunk.first, chunk.last, rows.dtype), chunk.offsets)
        out = out + base.bias[chunk.experts][expert_of_row]
        if a is None or b is None or part is None:
            return out
        a, b = padded_rank(a.to(rows.dtype), 1), padded_rank(b.to(rows.dtype), 2)
        update = _grouped(_grouped(part.pick(rows), a, part.chunk.offsets) * scale, b, part.chunk.offsets)
        return out + update if part.rows is None else out.index_add(0, part.rows, update)

    hidden = linear(x_rows, weights.gate_up, gate_up_a, gate_up_b, scales[0])
    activated = clamped_swiglu(hidden, weights.limit, weights.gain)
    out = linear(activated, weights.down, down_a, down_b, scales[1])
    return out * row_weights[:, None].to(out.dtype)


def _chunk_backward(
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    grad_rows: Tensor,
    chunk: Chunk,
    part: Part | None,
    weights: ExpertWeights,
    scales: tuple[float, float],
) -> list[Tensor | None]:
    """Replay one chunk and return the gradients of its inputs, None where none is needed."""
    leaves = [None if t is None else t.detach().requires_grad_(need) for t, need in zip(inputs, needs, strict=True)]
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    if not wanted:
        return [None] * len(leaves)
    with torch.enable_grad():
        out = _chunk_forward(leaves, chunk, part, weights, scales)
        gradients = iter(torch.autograd.grad(out, wanted, grad_rows))
    return [next(gradients) if leaf is not None and leaf.requires_grad else None for leaf in leaves]


def _grouped(rows: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    """Rows of group c times matrices[c] transposed: [R', in] x [C, out, in] -> [R', out]."""
    return grouped_mm(rows.contiguous(), matrices.transpose(1, 2), offs=offsets)
