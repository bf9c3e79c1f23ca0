"""The fused expert block: base product, LoRA and bias of a chunk in one augmented grouped product, Triton around it.

Equal to `finetune.kernels.experts` (the specification) up to rounding. A chunk of experts is dequantised once in the
forward and once in the backward pass, into rows [W | B | bias | 0] that multiply rows [x | s·xA^T | 1 | 0]. The same
rows, not transposed, carry the gradient back; the extra columns then hold the update's inner gradient and <bias, dY>.
The backward pass computes gate_up again and never the down product. A chunk without LoRA has no columns for it, and no
product runs for it.

Shape legend: as in `finetune.kernels.experts` and `finetune.kernels.dispatch`, and P columns of padding beyond an
augmented row's values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.kernels import experts_triton as launch
from finetune.kernels.dispatch import Chunk, Dispatch, LoraChunk, LoraExperts
from finetune.kernels.experts import (
    BlockCall,
    ExpertWeights,
    FrozenExperts,
    LoraFactors,
    Mxfp4Experts,
    apply_block,
)
from finetune.kernels.grouped import grouped, grouped_outer, padded_rank

_SCRATCH: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}


def fused_expert_block(
    x: Tensor,
    expert_ids: Tensor,
    router_weights: Tensor,
    weights: ExpertWeights,
    gate_up_lora: LoraFactors | None,
    down_lora: LoraFactors | None,
    lora_experts: LoraExperts | None = None,
) -> Tensor:
    """`finetune.kernels.experts.expert_block` by the fused kernel, with the same arguments.

    Args:
        x: [T, D], bfloat16 on a GPU (float32 only in Triton's interpreter).
        expert_ids: int64 [T, K].
        router_weights: [T, K], any floating dtype.
        weights: the layer's frozen experts, on x's device.
        gate_up_lora, down_lora: LoRA of the projections, or None; any floating dtype.
        lora_experts: the experts that have LoRA. None: all.

    Returns:
        [T, D] in x's dtype, the same bits for the same inputs.
    """
    return apply_block(FusedKernel(), x, expert_ids, router_weights, weights, gate_up_lora, down_lora, lora_experts)


class FusedKernel:
    """The block out of two augmented grouped products per chunk, which is dequantised once per pass."""

    def forward(self, x: Tensor, router_weights: Tensor, factors: Sequence[Tensor | None], call: BlockCall) -> Tensor:
        """See `finetune.kernels.experts.BlockKernel`."""
        x, router_weights, weights = x.contiguous(), router_weights.contiguous(), call.weights
        gate_up, down = _projections(x, factors, call)
        (scratch,) = _scratch(x, max(_sizes((gate_up, down), weights.experts_per_chunk)))
        out = x.new_empty(len(call.dispatch.order), x.shape[1])
        for chunk, lora in call.chunks():
            _, hidden, _ = _gate_up(x, chunk, call.dispatch, gate_up, gate_up.update_of(lora), scratch)
            update = down.update_of(lora)
            activated = launch.swiglu(hidden, weights.limit, weights.gain, rank_of(update))
            del hidden
            down.append_inner(activated, update)
            matrices = down.dequantise(chunk, update, scratch)
            out[chunk.routed] = grouped(activated, matrices.transpose(1, 2), chunk)
        return launch.combine(out, call.dispatch.inverse_order(), router_weights, call.dispatch.top_k)

    def backward(
        self,
        grad_out: Tensor,
        x: Tensor,
        router_weights: Tensor,
        factors: Sequence[Tensor | None],
        call: BlockCall,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """See `finetune.kernels.experts.BlockKernel`."""
        x, grad_out, dispatch = x.contiguous(), grad_out.contiguous(), call.dispatch
        projections = _projections(x, factors, call)
        scratch = _scratch(x, *_sizes(projections, call.weights.experts_per_chunk))
        grads = _Gradients.empty(x, router_weights, factors, dispatch, needs)
        for chunk, lora in call.chunks():
            _chunk_backward(x, grad_out, chunk, lora, call, projections, scratch, grads)
        return *grads.of_inputs(dispatch, router_weights), *grads.factors


# Frozen maps with LoRA in extra columns


@dataclass(frozen=True)
class Update:
    """The LoRA of one chunk beside one of the frozen maps.

    Attributes:
        lora: the experts with LoRA and their routed tokens.
        a: [S', L', in] in the compute dtype, L' being the rank L padded to whole 16 bytes.
        b: [S', out, L] as trained.
        scale: alpha / rank.
    """

    lora: LoraChunk
    a: Tensor
    b: Tensor
    scale: float

    def inner(self, rows: Tensor) -> Tensor:
        """xA^T of the routed tokens that have LoRA: [R', in or more] -> [R'', L']."""
        return grouped(self.lora.select(rows)[:, : self.a.shape[2]], self.a.transpose(1, 2), self.lora.chunk)

    def columns_of(self, rows: Tensor) -> Tensor:
        """The columns of [R', in + P] that belong to the update: [R'', L'], a view unless the chunk has other tokens.

        Columns past L hold values that must not count: A is zero there, and gradients of A and B are cut to L.
        """
        inputs = self.a.shape[2]
        return self.lora.select(rows[:, inputs : inputs + self.a.shape[1]])

    def b_of_chunk(self, num_experts: int) -> Tensor:
        """B of every expert of the chunk, [C, out, L]: zeros where there is none, since 0 x NaN is not 0."""
        if self.lora.local_experts is None:
            return self.b
        return self.b.new_zeros(num_experts, *self.b.shape[1:]).index_copy_(0, self.lora.local_experts, self.b)


@dataclass(frozen=True)
class Projection:
    """One of the two linear maps of a layer's experts with its LoRA.

    Attributes:
        base: frozen weights and bias.
        a: in the compute dtype, [S, L', in]; as stored where ranks differ. None: no LoRA.
        b: as stored. None: no LoRA.
        scale: alpha / rank.
        inputs: width of its inputs.
        rank: the highest of all experts.
        dtype: compute dtype.
    """

    base: FrozenExperts
    a: Tensor | None
    b: Tensor | None
    scale: float
    inputs: int
    rank: int
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        base: FrozenExperts,
        a: Tensor | None,
        b: Tensor | None,
        scale: float,
        inputs: int,
        dtype: torch.dtype,
        lora_experts: LoraExperts | None,
    ) -> Projection:
        """Cast a projection's factors to the compute dtype, all at once where they have one rank."""
        if a is None or b is None:
            return cls(base, None, None, scale, inputs, 0, dtype)
        if lora_experts is not None and lora_experts.ranks is not None:
            return cls(base, a, b, scale, inputs, lora_experts.ranks.highest, dtype)
        return cls(base, padded_rank(a.to(dtype), 1), b.contiguous(), scale, inputs, b.shape[2], dtype)

    def update_of(self, lora: LoraChunk | None) -> Update | None:
        """The LoRA of a chunk; None where there is none."""
        if lora is None or self.a is None or self.b is None:
            return None
        a, b = lora.gather_a(self.a), lora.gather_b(self.b)
        return Update(lora, padded_rank(a.to(self.dtype), 1), b.contiguous(), self.scale)

    def scratch_shape(self, num_experts: int, rank: int) -> tuple[int, int, int]:
        """[C, out, in + P] of that many experts."""
        return num_experts, self.base.bias.shape[1], self.inputs + launch.padding(rank)

    def dequantise(self, chunk: Chunk, update: Update | None, scratch: Tensor) -> Tensor:
        """[C, out, in + P], written over the flat scratch."""
        here, rank = chunk.experts, rank_of(update)
        shape = self.scratch_shape(chunk.last - chunk.first, rank)
        out = scratch[: math.prod(shape)].view(shape)
        bias, b = self.base.bias[here], None if update is None else update.b_of_chunk(len(out))
        if isinstance(self.base, Mxfp4Experts):
            return launch.dequantise_augment(self.base.blocks[here], self.base.scales[here], bias, b, out)
        out[..., : self.inputs] = self.base.dequantised(chunk.first, chunk.last, out.dtype)
        if b is not None:
            out[..., self.inputs : self.inputs + rank] = b
        out[..., self.inputs + rank] = bias
        out[..., self.inputs + rank + 1 :] = 0
        return out

    def append_inner(self, rows: Tensor, update: Update | None) -> None:
        """Write s·xA^T into the columns for it of rows [R', in + P]; where there is no LoRA they hold 0."""
        if update is None:
            return
        inner, rank = update.inner(rows), rank_of(update)
        into = rows[:, self.inputs : self.inputs + rank]
        if update.lora.routed is None:
            torch.mul(inner[:, :rank], self.scale, out=into)
        else:
            into.index_copy_(0, update.lora.routed, inner[:, :rank] * self.scale)


def rank_of(update: Update | None) -> int:
    """L; 0 without LoRA."""
    return 0 if update is None else update.b.shape[2]


def _projections(x: Tensor, factors: Sequence[Tensor | None], call: BlockCall) -> tuple[Projection, Projection]:
    gate_up_a, gate_up_b, down_a, down_b = factors
    weights, scales, experts = call.weights, call.scales, call.lora_experts
    width = weights.gate_up.bias.shape[1] // 2
    return (
        Projection.of(weights.gate_up, gate_up_a, gate_up_b, scales[0], x.shape[1], x.dtype, experts),
        Projection.of(weights.down, down_a, down_b, scales[1], width, x.dtype, experts),
    )


def _gate_up(
    x: Tensor, chunk: Chunk, dispatch: Dispatch, gate_up: Projection, update: Update | None, scratch: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gather a chunk's routed tokens and apply gate_up to them.

    Returns:
        Augmented rows [R', D + P], their products [R', 2F], and the augmented weights [C, 2F, D + P] in the scratch.
    """
    rows = launch.gather(x, dispatch.order[chunk.routed], dispatch.top_k, rank_of(update))
    gate_up.append_inner(rows, update)
    matrices = gate_up.dequantise(chunk, update, scratch)
    return rows, grouped(rows, matrices.transpose(1, 2), chunk), matrices


# Backward pass


@dataclass(frozen=True)
class _Gradients:
    """Gradients that the backward pass fills, chunk after chunk.

    Attributes:
        weight: [R], the router weights in expert order.
        grad_weight: [R], float32.
        routed: [R, D], or None if x needs no gradient.
        factors: gradients of gate_up's A and B and down's A and B, each None if not needed. Experts of a chunk without
            routed tokens are never visited: their gradient is zero.
    """

    weight: Tensor
    grad_weight: Tensor
    routed: Tensor | None
    factors: list[Tensor | None]

    @classmethod
    def empty(
        cls,
        x: Tensor,
        router_weights: Tensor,
        factors: Sequence[Tensor | None],
        dispatch: Dispatch,
        needs: Sequence[bool],
    ) -> _Gradients:
        weight = router_weights.reshape(-1)[dispatch.order]
        routed = x.new_empty(len(dispatch.order), x.shape[1]) if needs[0] else None
        wanted = zip(factors, needs[2:6], strict=True)
        grads = [torch.zeros_like(f) if f is not None and need else None for f, need in wanted]
        return cls(weight, weight.new_empty(weight.shape, dtype=torch.float32), routed, grads)

    def of_inputs(self, dispatch: Dispatch, router_weights: Tensor) -> tuple[Tensor | None, Tensor]:
        """Gradients of x [T, D] and of the router weights [T, K]."""
        inverse = dispatch.inverse_order()
        grad_x = None if self.routed is None else launch.combine(self.routed, inverse, None, dispatch.top_k)
        return grad_x, self.grad_weight[inverse].view_as(router_weights).to(router_weights.dtype)


def _chunk_backward(
    x: Tensor,
    grad_out: Tensor,
    chunk: Chunk,
    lora: LoraChunk | None,
    call: BlockCall,
    projections: tuple[Projection, Projection],
    scratch: Sequence[Tensor],
    grads: _Gradients,
) -> None:
    """Fill in the gradients that one chunk contributes."""
    (gate_up, down), dispatch, weights = projections, call.dispatch, call.weights
    of_gate_up, of_down = gate_up.update_of(lora), down.update_of(lora)
    rows, hidden, matrices = _gate_up(x, chunk, dispatch, gate_up, of_gate_up, scratch[0])
    grad_rows = launch.gather(grad_out, dispatch.order[chunk.routed], dispatch.top_k, None)
    grad_activated = grouped(grad_rows, down.dequantise(chunk, of_down, scratch[1]), chunk)
    inner = through_update = None
    if of_down is not None:
        inner = of_down.columns_of(grad_activated) * down.scale
        through_update = grouped(inner, of_down.a, of_down.lora.chunk)
        if of_down.lora.routed is not None:
            grad_activated[:, : down.inputs].index_add_(0, of_down.lora.routed, through_update)
            through_update = None
    weight = grads.weight[chunk.routed]
    activated = launch.swiglu_backward(
        hidden, grad_activated, through_update, weight, grads.grad_weight[chunk.routed],
        weights.limit, weights.gain, rank_of(of_down),
    )  # fmt: skip
    del grad_activated, through_update
    if of_down is not None and inner is not None:
        _down_factors(of_down, activated, grad_rows, inner, weight, grads)
    del activated, grad_rows
    _gate_up_gradients(chunk, gate_up.inputs, of_gate_up, rows, hidden, matrices, grads)


def _down_factors(
    down: Update, activated: Tensor, grad_rows: Tensor, inner: Tensor, router_weight: Tensor, grads: _Gradients
) -> None:
    """Gradients of down's A and B. The router weight multiplies the thin sides, [R'', L']."""
    lora, rank = down.lora, rank_of(down)
    weight = lora.select(router_weight)[:, None].to(inner.dtype)
    _, _, grad_a, grad_b = grads.factors
    inputs = lora.select(activated)
    if grad_a is not None:
        lora.scatter_grad_a(grad_a, grouped_outer(inner * weight, inputs, lora.chunk)[:, :rank])
    if grad_b is not None:
        thin = grouped(inputs, down.a.transpose(1, 2), lora.chunk) * (weight * down.scale)
        lora.scatter_grad_b(grad_b, grouped_outer(lora.select(grad_rows), thin, lora.chunk)[..., :rank])


def _gate_up_gradients(
    chunk: Chunk,
    inputs: int,
    update: Update | None,
    rows: Tensor,
    grad_hidden: Tensor,
    matrices: Tensor,
    grads: _Gradients,
) -> None:
    """Gradients of the routed tokens and of gate_up's A and B, from the gradient of its output [R', 2F]."""
    grad_a, grad_b, _, _ = grads.factors
    if update is not None and grad_b is not None:  # of these columns the first L hold s·xA^T
        outer = grouped_outer(update.lora.select(grad_hidden), update.columns_of(rows), update.lora.chunk)
        update.lora.scatter_grad_b(grad_b, outer[..., : rank_of(update)])
    if grads.routed is None and (update is None or grad_a is None):
        return
    augmented = grouped(grad_hidden, matrices, chunk)
    values = augmented[:, :inputs]
    if update is None:
        if grads.routed is not None:
            grads.routed[chunk.routed] = values
        return
    lora, inner = update.lora, update.columns_of(augmented) * update.scale
    if grads.routed is not None:
        _add_through(grads.routed[chunk.routed], values, grouped(inner, update.a, lora.chunk), lora)
    if grad_a is not None:
        outer = grouped_outer(inner, lora.select(rows)[:, :inputs], lora.chunk)
        lora.scatter_grad_a(grad_a, outer[:, : rank_of(update)])


def _add_through(out: Tensor, values: Tensor, through_update: Tensor, lora: LoraChunk) -> None:
    """Write values [R', D] plus the gradient that runs through LoRA [R'', D]."""
    if lora.routed is None:
        torch.add(values, through_update, out=out)
    else:
        out.copy_(values).index_add_(0, lora.routed, through_update)


# Scratch memory


def _sizes(projections: Sequence[Projection], num_experts: int) -> list[int]:
    """Elements of each projection's augmented weights of a chunk."""
    return [math.prod(projection.scratch_shape(num_experts, projection.rank)) for projection in projections]


def _scratch(like: Tensor, *sizes: int) -> list[Tensor]:
    """Flat buffers of that many elements, the same memory in every call: layers and passes follow one another.

    One per stream, so that work on a second stream does not write over the first's.
    """
    stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
    key = (like.device, like.dtype, stream)
    if key not in _SCRATCH or len(_SCRATCH[key]) < sum(sizes):
        _SCRATCH.pop(key, None)
        _SCRATCH[key] = like.new_empty(sum(sizes))
    return list(_SCRATCH[key][: sum(sizes)].split(list(sizes)))
