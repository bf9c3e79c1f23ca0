"""The routed experts' forward and backward out of two augmented grouped products a chunk, with Triton around them.

Equal to `finetune.kernels.experts` (the specification) up to rounding. A chunk of experts is dequantised once for the
forward and once for the backward pass, into rows [W | B | bias | 0] that multiply rows [x | s·xA^T | 1 | 0]: base,
update and bias in one product. The same rows, not transposed, carry the gradient back; the extra columns then hold the
update's inner gradient and <bias, dY>. The backward pass computes gate_up again and never the down product.

Shape legend: as in `finetune.kernels.experts`, and P columns of padding beyond an augmented row's values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from finetune.kernels import experts_launch as launch
from finetune.kernels.experts import ExpertWeights, FrozenExperts, LoraFactors, PackedLinear
from finetune.kernels.grouped import grouped, grouped_outer, padded_rank
from finetune.kernels.routing import Chunk, Routing, output_not_wanted

_SCRATCH: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}


def fused_expert_block(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    weights: ExpertWeights,
    gate_up_lora: LoraFactors | None,
    down_lora: LoraFactors | None,
) -> Tensor:
    """What `finetune.kernels.experts.expert_block` computes, with the same arguments.

    Args:
        x: [T, D], bfloat16 on a GPU (float32 only in Triton's interpreter).
        expert_ids: int64 [T, K]. expert_weights: [T, K], any floating dtype.
        weights: the layer's packed experts, on x's device.
        gate_up_lora, down_lora: updates, or None for none; of any floating dtype.

    Returns:
        [T, D] in x's dtype, the same bits for the same inputs.
    """
    factors = [t for lora in (gate_up_lora, down_lora) for t in ((lora.a, lora.b) if lora else (None, None))]
    scales = tuple(lora.scale if lora else 0.0 for lora in (gate_up_lora, down_lora))
    return _FusedExpertBlock.apply(x, expert_weights, *factors, expert_ids, weights, scales)


@dataclass(frozen=True)
class _Projection:
    """One of the two linear maps of a layer's experts with its update.

    Attributes:
        base: frozen weights and bias.
        a: [E, L', in] in the compute dtype, L' being the rank L padded to whole 16 bytes. None: no update.
        b: [E, out, L] as trained. None: no update.
        scale: alpha / rank.
        inputs: width of the rows it takes.
    """

    base: FrozenExperts
    a: Tensor | None
    b: Tensor | None
    scale: float
    inputs: int

    @classmethod
    def of(
        cls, base: FrozenExperts, a: Tensor | None, b: Tensor | None, scale: float, inputs: int, dtype: torch.dtype
    ) -> _Projection:
        padded = None if a is None else padded_rank(a.to(dtype), 1)
        return cls(base, padded, None if b is None else b.contiguous(), scale, inputs)

    @property
    def rank(self) -> int:
        return 0 if self.b is None else self.b.shape[2]

    @property
    def padding(self) -> int:
        return launch.padding(self.rank)

    def scratch_shape(self, num_experts: int) -> tuple[int, int, int]:
        return num_experts, self.base.bias.shape[1], self.inputs + self.padding

    def dequantise(self, chunk: Chunk, scratch: Tensor) -> Tensor:
        """[C, out, in + P], over whatever the scratch held."""
        here, out = chunk.experts, scratch[: chunk.last - chunk.first]
        bias, b = self.base.bias[here], None if self.b is None else self.b[here]
        if isinstance(self.base, PackedLinear):
            return launch.dequantise_augment(self.base.blocks[here], self.base.scales[here], bias, b, out)
        out[..., : self.inputs] = self.base.dequantised(chunk.first, chunk.last, out.dtype)
        if b is not None:
            out[..., self.inputs : self.inputs + self.rank] = b
        out[..., self.inputs + self.rank] = bias
        out[..., self.inputs + self.rank + 1 :] = 0
        return out

    def append_inner(self, rows: Tensor, chunk: Chunk) -> None:
        """Write s·xA^T into the columns that rows [R', in + P] have for it."""
        if self.a is None:
            return
        inner = grouped(rows[:, : self.inputs], self.a[chunk.experts].transpose(1, 2), chunk)
        torch.mul(inner[:, : self.rank], self.scale, out=rows[:, self.inputs : self.inputs + self.rank])

    def inner_of(self, rows: Tensor) -> Tensor:
        """The columns of [R', in + P] that belong to the update: [R', L'], a view.

        Past L they hold what must not count: A is zero there, and gradients of A and B are cut to L.
        """
        assert self.a is not None
        return rows[:, self.inputs : self.inputs + self.a.shape[1]]


class _FusedExpertBlock(torch.autograd.Function):
    """Saves the block's inputs and the routing; one dequantisation a chunk and pass."""

    @staticmethod
    def forward(ctx, x, expert_weights, gate_up_a, gate_up_b, down_a, down_b, expert_ids, weights, scales):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, expert_weights, gate_up_a, gate_up_b, down_a, down_b)
        if output_not_wanted():
            return torch.full_like(x, torch.nan)
        # Kept beside the saved tensors: a layer computed again cannot route another way than its output was made.
        ctx.routing = routing = Routing.of(expert_ids, len(weights.gate_up.bias), weights.experts_per_chunk)
        ctx.weights, ctx.scales = weights, scales
        x, expert_weights = x.contiguous(), expert_weights.contiguous()
        gate_up, down = _projections(x, weights, (gate_up_a, gate_up_b, down_a, down_b), scales)
        (scratch,) = _scratch(x, _larger(gate_up, down, weights.experts_per_chunk))
        rows = x.new_empty(len(routing.order), x.shape[1])
        for chunk in routing.chunks():
            _, hidden = _gate_up(x, chunk, routing, gate_up, _view(scratch, gate_up, weights))
            activated = launch.swiglu(hidden, weights.limit, weights.gain, down.rank)
            del hidden
            down.append_inner(activated, chunk)
            matrices = down.dequantise(chunk, _view(scratch, down, weights))
            rows[chunk.rows] = grouped(activated, matrices.transpose(1, 2), chunk)
        return launch.combine(rows, routing.position(), expert_weights, routing.top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        x, expert_weights, *factors = ctx.saved_tensors
        x, grad_out, routing = x.contiguous(), grad_out.contiguous(), ctx.routing
        projections = _projections(x, ctx.weights, factors, ctx.scales)
        scratch = _scratch(x, *(math.prod(p.scratch_shape(ctx.weights.experts_per_chunk)) for p in projections))
        grads = _Gradients.empty(x, expert_weights, factors, routing, ctx.needs_input_grad)
        for chunk in routing.chunks():
            _chunk_backward(x, grad_out, chunk, routing, ctx.weights, projections, scratch, grads)
        return *grads.of_inputs(routing, expert_weights), *grads.factors, None, None, None


@dataclass(frozen=True)
class _Gradients:
    """What the backward pass fills, chunk by chunk.

    Attributes:
        row_weights: [R], the router weights in expert order; grad_row_weights: [R], float32.
        rows: [R, D], or None if x needs no gradient.
        factors: gradients of gate_up a and b, down a and b, each None if not needed. Experts of a chunk without rows
            are never visited: their gradient is zero.
    """

    row_weights: Tensor
    grad_row_weights: Tensor
    rows: Tensor | None
    factors: list[Tensor | None]

    @classmethod
    def empty(
        cls,
        x: Tensor,
        expert_weights: Tensor,
        factors: Sequence[Tensor | None],
        routing: Routing,
        needs: Sequence[bool],
    ) -> _Gradients:
        row_weights = expert_weights.reshape(-1)[routing.order]
        rows = x.new_empty(len(routing.order), x.shape[1]) if needs[0] else None
        wanted = zip(factors, needs[2:6], strict=True)
        grads = [torch.zeros_like(f) if f is not None and need else None for f, need in wanted]
        return cls(row_weights, row_weights.new_empty(row_weights.shape, dtype=torch.float32), rows, grads)

    def of_inputs(self, routing: Routing, expert_weights: Tensor) -> tuple[Tensor | None, Tensor]:
        """Gradients of x [T, D] and of the router weights [T, K]."""
        position = routing.position()
        grad_x = None if self.rows is None else launch.combine(self.rows, position, None, routing.top_k)
        return grad_x, self.grad_row_weights[position].view_as(expert_weights).to(expert_weights.dtype)


def _projections(
    x: Tensor, weights: ExpertWeights, factors: Sequence[Tensor | None], scales: tuple[float, float]
) -> tuple[_Projection, _Projection]:
    gate_up_a, gate_up_b, down_a, down_b = factors
    return (
        _Projection.of(weights.gate_up, gate_up_a, gate_up_b, scales[0], x.shape[1], x.dtype),
        _Projection.of(weights.down, down_a, down_b, scales[1], weights.gate_up.bias.shape[1] // 2, x.dtype),
    )


def _gate_up(x: Tensor, chunk: Chunk, routing: Routing, gate_up: _Projection, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """Gather a chunk's rows and take them through gate_up: augmented rows [R', D + P] and their products [R', 2F]."""
    rows = launch.gather(x, routing.order[chunk.rows], routing.top_k, gate_up.rank)
    gate_up.append_inner(rows, chunk)
    return rows, grouped(rows, gate_up.dequantise(chunk, scratch).transpose(1, 2), chunk)


def _chunk_backward(
    x: Tensor,
    grad_out: Tensor,
    chunk: Chunk,
    routing: Routing,
    weights: ExpertWeights,
    projections: tuple[_Projection, _Projection],
    scratch: Sequence[Tensor],
    grads: _Gradients,
) -> None:
    """Fill in the gradients that one chunk contributes."""
    gate_up, down = projections
    into_gate_up, into_down = (_view(s, p, weights) for s, p in zip(scratch, projections, strict=True))
    rows, hidden = _gate_up(x, chunk, routing, gate_up, into_gate_up)
    matrices = into_gate_up[: chunk.last - chunk.first]
    grad_rows = launch.gather(grad_out, routing.order[chunk.rows], routing.top_k, None)
    grad_activated = grouped(grad_rows, down.dequantise(chunk, into_down), chunk)
    inner = through_update = None
    if down.a is not None:
        inner = down.inner_of(grad_activated) * down.scale
        through_update = grouped(inner, down.a[chunk.experts], chunk)
    row_weights = grads.row_weights[chunk.rows]
    activated = launch.swiglu_backward(
        hidden, grad_activated, through_update, row_weights, grads.grad_row_weights[chunk.rows],
        weights.limit, weights.gain, down.rank,
    )  # fmt: skip
    del grad_activated, through_update
    if inner is not None:
        _down_factors(chunk, down, activated, grad_rows, inner, row_weights, grads)
    del activated, grad_rows
    _gate_up_gradients(chunk, gate_up, rows, hidden, matrices, grads)


def _down_factors(
    chunk: Chunk,
    down: _Projection,
    activated: Tensor,
    grad_rows: Tensor,
    inner: Tensor,
    row_weights: Tensor,
    grads: _Gradients,
) -> None:
    """Gradients of down's A and B. The router weight goes onto the thin sides, [R', L']."""
    weight = row_weights[:, None].to(inner.dtype)
    _, _, grad_a, grad_b = grads.factors
    if grad_a is not None:
        grad_a[chunk.experts] = grouped_outer(inner * weight, activated, chunk)[:, : down.rank]
    if grad_b is not None:
        assert down.a is not None
        seen = grouped(activated, down.a[chunk.experts].transpose(1, 2), chunk)
        grad_b[chunk.experts] = grouped_outer(grad_rows, seen * (weight * down.scale), chunk)[..., : down.rank]


def _gate_up_gradients(
    chunk: Chunk, gate_up: _Projection, rows: Tensor, grad_hidden: Tensor, matrices: Tensor, grads: _Gradients
) -> None:
    """Gradients of x's rows and of gate_up's A and B, from the gradient of its output [R', 2F]."""
    grad_a, grad_b, _, _ = grads.factors
    if grad_b is not None:  # of these columns the first L hold s·xA^T
        grad_b[chunk.experts] = grouped_outer(grad_hidden, gate_up.inner_of(rows), chunk)[..., : gate_up.rank]
    if grads.rows is None and grad_a is None:
        return
    augmented = grouped(grad_hidden, matrices, chunk)
    values = augmented[:, : gate_up.inputs]
    if gate_up.a is None:
        if grads.rows is not None:
            grads.rows[chunk.rows] = values
        return
    inner = gate_up.inner_of(augmented) * gate_up.scale
    if grads.rows is not None:
        torch.add(values, grouped(inner, gate_up.a[chunk.experts], chunk), out=grads.rows[chunk.rows])
    if grad_a is not None:
        grad_a[chunk.experts] = grouped_outer(inner, rows[:, : gate_up.inputs], chunk)[:, : gate_up.rank]


def _larger(gate_up: _Projection, down: _Projection, num_experts: int) -> int:
    """Elements that hold either projection's augmented weights."""
    return max(math.prod(projection.scratch_shape(num_experts)) for projection in (gate_up, down))


def _view(scratch: Tensor, projection: _Projection, weights: ExpertWeights) -> Tensor:
    """The beginning of a flat buffer as [C, out, in + P]."""
    shape = projection.scratch_shape(weights.experts_per_chunk)
    return scratch[: math.prod(shape)].view(shape)


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
