"""The expert block over packed weights with LoRA: its autograd frame, and the reference kernel in plain PyTorch.

The reference kernel is the specification that faster ones must equal. Only one chunk of experts is dequantised at a
time: the forward pass saves the block's inputs and nothing of the experts' width, and the backward pass replays chunk
after chunk, so the scratch memory of one chunk is freed before the next is taken. The LoRA update is two thin products
beside the base product; W + BA is never formed.

Shape legend: T tokens, D hidden, E experts, K active experts per token, R routed tokens (T·K, sorted by expert), F
expert width, L rank, C experts in a chunk, S experts with LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm

from finetune.kernels.dispatch import Chunk, Dispatch, LoraChunk, LoraExperts, is_recomputing, lora_chunks
from finetune.kernels.grouped import padded_rank
from finetune.mxfp4.format import dequantise


class FrozenExperts(Protocol):
    """E frozen linear maps out -> in, in any storage format."""

    @property
    def bias(self) -> Tensor:
        """[E, out], in the compute dtype."""

    def dequantised(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Weights of experts `first` to `last` (exclusive) as [C, out, in]. Must not be written to."""


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
    """LoRA of S experts, all E or some: update of expert e = scale · b[e] @ a[e].

    Attributes:
        a: [S, L, in]; where ranks differ (`finetune.kernels.dispatch.LoraRanks`) [N, in].
        b: [S, out, L]; where ranks differ [N, out]. Both are float32 or in the compute dtype.
        scale: alpha / rank; 1 where ranks differ, since each expert then has its own scale.
    """

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class ExpertWeights:
    """The frozen part of one layer's experts.

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


ExpertBlock = Callable[
    [Tensor, Tensor, Tensor, ExpertWeights, LoraFactors | None, LoraFactors | None, LoraExperts | None], Tensor
]
"""The signature of `expert_block`, which every kernel offers."""


def expert_block(
    x: Tensor,
    expert_ids: Tensor,
    router_weights: Tensor,
    weights: ExpertWeights,
    gate_up_lora: LoraFactors | None,
    down_lora: LoraFactors | None,
    lora_experts: LoraExperts | None = None,
) -> Tensor:
    """Sum over each token's experts of router weight · down(swiglu(gate_up(x))), with LoRA on both projections.

    Args:
        x: [T, D], float32 or bfloat16.
        expert_ids: int64 [T, K], different within a token.
        router_weights: [T, K], any floating dtype.
        weights: the layer's frozen experts, on x's device.
        gate_up_lora, down_lora: LoRA of the projections, or None; cast to x's dtype chunk by chunk.
        lora_experts: the experts that have LoRA. None: all.

    Returns:
        [T, D] in x's dtype. Gradients reach x, router_weights and the factors, and nothing else is saved for them.
        Every reduction runs in a fixed order, so equal inputs give equal bits.
    """
    return apply_block(ReferenceKernel(), x, expert_ids, router_weights, weights, gate_up_lora, down_lora, lora_experts)


def clamped_swiglu(gate_up: Tensor, limit: float, gain: float) -> Tensor:
    """gpt-oss's activation on interleaved pairs: [..., 2F] -> [..., F].

    gate = min(gate, limit); up = clamp(up, -limit, limit); (up + 1) · gate · sigmoid(gain · gate).
    """
    gate = gate_up[..., ::2].clamp(max=limit)
    up = gate_up[..., 1::2].clamp(min=-limit, max=limit)
    return (up + 1) * gate * torch.sigmoid(gain * gate)


# The autograd frame that all kernels share


@dataclass(frozen=True)
class BlockCall:
    """The constants of one call of the block: what its forward and backward pass share beside tensors with gradients.

    Attributes:
        weights: the layer's frozen experts.
        scales: of gate_up's and of down's LoRA.
        lora_experts: the experts that have LoRA. None: all.
        dispatch: the routed tokens in expert order.
        lora_chunks: for each chunk the part with LoRA, or None.
    """

    weights: ExpertWeights
    scales: tuple[float, float]
    lora_experts: LoraExperts | None
    dispatch: Dispatch
    lora_chunks: Sequence[LoraChunk | None]

    def chunks(self) -> Iterator[tuple[Chunk, LoraChunk | None]]:
        """Chunks that have routed tokens, each with its part with LoRA."""
        return zip(self.dispatch.chunks(), self.lora_chunks, strict=True)


class BlockKernel(Protocol):
    """One way to compute the block. Factors are gate_up's A and B and down's A and B, each None without LoRA."""

    def forward(self, x: Tensor, router_weights: Tensor, factors: Sequence[Tensor | None], call: BlockCall) -> Tensor:
        """[T, D] -> [T, D]."""

    def backward(
        self,
        grad_out: Tensor,
        x: Tensor,
        router_weights: Tensor,
        factors: Sequence[Tensor | None],
        call: BlockCall,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x, the router weights and the four factors. `needs` says, in this order, which are wanted."""


def apply_block(
    kernel: BlockKernel,
    x: Tensor,
    expert_ids: Tensor,
    router_weights: Tensor,
    weights: ExpertWeights,
    gate_up_lora: LoraFactors | None,
    down_lora: LoraFactors | None,
    lora_experts: LoraExperts | None,
) -> Tensor:
    """`expert_block` with a kernel of choice."""
    factors = [t for lora in (gate_up_lora, down_lora) for t in ((lora.a, lora.b) if lora else (None, None))]
    scales = tuple(lora.scale if lora else 0.0 for lora in (gate_up_lora, down_lora))
    return _ExpertBlock.apply(x, router_weights, *factors, expert_ids, weights, scales, lora_experts, kernel)


class _ExpertBlock(torch.autograd.Function):
    """Saves the block's inputs and its dispatch only."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x, router_weights, gate_up_a, gate_up_b, down_a, down_b, expert_ids, weights, scales, lora_experts, kernel
    ):
        factors = (gate_up_a, gate_up_b, down_a, down_b)
        ctx.save_for_backward(x, router_weights, *factors)
        if is_recomputing():
            return torch.full_like(x, torch.nan)
        # Kept beside the saved tensors: a layer computed again cannot route differently from its first output.
        dispatch = Dispatch.of(expert_ids, len(weights.gate_up.bias), weights.experts_per_chunk)
        ctx.call = BlockCall(weights, scales, lora_experts, dispatch, lora_chunks(dispatch, lora_experts))
        ctx.kernel = kernel
        return kernel.forward(x, router_weights, factors, ctx.call)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        x, router_weights, *factors = ctx.saved_tensors
        grads = ctx.kernel.backward(grad_out, x, router_weights, factors, ctx.call, ctx.needs_input_grad[:6])
        return *grads, None, None, None, None, None


# The reference kernel


class ReferenceKernel:
    """The block in plain PyTorch; the backward pass replays each chunk under autograd."""

    def forward(self, x: Tensor, router_weights: Tensor, factors: Sequence[Tensor | None], call: BlockCall) -> Tensor:
        """See `BlockKernel`."""
        token, weight = call.dispatch.token, router_weights.reshape(-1)[call.dispatch.order]
        out = x.new_empty(len(token), x.shape[1])
        for chunk, lora in call.chunks():
            inputs = [x[token[chunk.routed]], weight[chunk.routed], *_gather_factors(factors, lora)]
            out[chunk.routed] = _chunk_forward(inputs, chunk, lora, call)
        return _combine(out, call.dispatch)

    def backward(
        self,
        grad_out: Tensor,
        x: Tensor,
        router_weights: Tensor,
        factors: Sequence[Tensor | None],
        call: BlockCall,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """See `BlockKernel`."""
        dispatch = call.dispatch
        token, weight = dispatch.token, router_weights.reshape(-1)[dispatch.order]
        grad_routed = x.new_empty(len(token), x.shape[1]) if needs[0] else None
        grad_weight = torch.empty_like(weight) if needs[1] else None
        # Experts of a chunk without routed tokens are never visited: their gradient is zero.
        grad_factors = [
            torch.zeros_like(factor) if factor is not None and need else None
            for factor, need in zip(factors, needs[2:], strict=True)
        ]
        for chunk, lora in call.chunks():
            here = token[chunk.routed]
            inputs = [x[here], weight[chunk.routed], *_gather_factors(factors, lora)]
            gradients = _chunk_backward(inputs, needs, grad_out[here], chunk, lora, call)
            for target, gradient in zip((grad_routed, grad_weight), gradients[:2], strict=True):
                if target is not None and gradient is not None:
                    target[chunk.routed] = gradient
            _scatter_factor_grads(grad_factors, gradients[2:], lora)
        grad_x = None if grad_routed is None else _combine(grad_routed, dispatch)
        grad_router_weights = None
        if grad_weight is not None:
            grad_router_weights = torch.empty_like(grad_weight).index_copy_(0, dispatch.order, grad_weight)
            grad_router_weights = grad_router_weights.view_as(router_weights)
        return grad_x, grad_router_weights, *grad_factors


def _gather_factors(stored: Sequence[Tensor | None], lora: LoraChunk | None) -> list[Tensor | None]:
    """The factors of a chunk's experts, out of those of all."""
    if lora is None:
        return [None] * 4
    gather = (lora.gather_a, lora.gather_b, lora.gather_a, lora.gather_b)
    return [None if factor is None else take(factor) for take, factor in zip(gather, stored, strict=True)]


def _scatter_factor_grads(
    targets: Sequence[Tensor | None], gradients: Sequence[Tensor | None], lora: LoraChunk | None
) -> None:
    """Write the gradients of a chunk's factors into those of all."""
    if lora is None:
        return
    scatter = (lora.scatter_grad_a, lora.scatter_grad_b, lora.scatter_grad_a, lora.scatter_grad_b)
    for put, target, gradient in zip(scatter, targets, gradients, strict=True):
        if target is not None and gradient is not None:
            put(target, gradient)


def _combine(routed: Tensor, dispatch: Dispatch) -> Tensor:
    """Put routed tokens [R, D] back in token order and add each token's K: [T, D]."""
    return routed[dispatch.inverse_order()].view(-1, dispatch.top_k, routed.shape[1]).sum(1)


def _chunk_forward(inputs: Sequence[Tensor | None], chunk: Chunk, lora: LoraChunk | None, call: BlockCall) -> Tensor:
    """One chunk's routed tokens through its experts, times their router weights. Differentiable.

    Args:
        inputs: routed tokens [R', D] and their router weights [R'], then the factors of the chunk's experts or None.
        chunk: the experts and their routed tokens.
        lora: the part with LoRA. None: nothing has.
        call: constants of the layer.

    Returns:
        [R', D].
    """
    x, weight, gate_up_a, gate_up_b, down_a, down_b = inputs
    assert x is not None and weight is not None
    weights, (gate_up_scale, down_scale) = call.weights, call.scales
    hidden = _lora_linear(x, weights.gate_up, gate_up_a, gate_up_b, gate_up_scale, chunk, lora)
    activated = clamped_swiglu(hidden, weights.limit, weights.gain)
    out = _lora_linear(activated, weights.down, down_a, down_b, down_scale, chunk, lora)
    return out * weight[:, None].to(out.dtype)


def _lora_linear(
    x: Tensor,
    base: FrozenExperts,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    chunk: Chunk,
    lora: LoraChunk | None,
) -> Tensor:
    """x W^T + bias + scale · x A^T B^T, each routed token with its expert's matrices: [R', in] -> [R', out]."""
    out = _grouped(x, base.dequantised(chunk.first, chunk.last, x.dtype), chunk.offsets)
    out = out + base.bias[chunk.experts][chunk.expert_of_routed()]
    if a is None or b is None or lora is None:
        return out
    a, b = padded_rank(a.to(x.dtype), 1), padded_rank(b.to(x.dtype), 2)
    update = _grouped(_grouped(lora.select(x), a, lora.chunk.offsets) * scale, b, lora.chunk.offsets)
    return out + update if lora.routed is None else out.index_add(0, lora.routed, update)


def _chunk_backward(
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    grad_out: Tensor,
    chunk: Chunk,
    lora: LoraChunk | None,
    call: BlockCall,
) -> list[Tensor | None]:
    """Replay one chunk and return the gradients of its inputs, None where none is needed."""
    leaves = [None if t is None else t.detach().requires_grad_(need) for t, need in zip(inputs, needs, strict=True)]
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    if not wanted:
        return [None] * len(leaves)
    with torch.enable_grad():
        out = _chunk_forward(leaves, chunk, lora, call)
        gradients = iter(torch.autograd.grad(out, wanted, grad_out))
    return [next(gradients) if leaf is not None and leaf.requires_grad else None for leaf in leaves]


def _grouped(rows: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    """Rows of expert c times matrices[c] transposed: [R', in] x [C, out, in] -> [R', out]."""
    return grouped_mm(rows.contiguous(), matrices.transpose(1, 2), offs=offsets)
