"""The frozen maps of the experts with their updates in extra columns: what the fused block multiplies.

Rows of weights are [W | B | bias | 0], rows of activations [x | s·xA^T | 1 | 0]. A chunk without adapted experts has no
columns for updates, and neither does any product run for them.

Shape legend: as in `finetune.kernels.experts` and `finetune.kernels.dispatch`, and P columns beyond a row's values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from finetune.kernels import experts_launch as launch
from finetune.kernels.dispatch import Chunk, LoraExperts, Part, Routing, is_recomputing, lora_chunks
from finetune.kernels.experts import ExpertWeights, FrozenExperts, LoraFactors, Mxfp4Experts
from finetune.kernels.grouped import grouped, grouped_outer, padded_rank


@dataclass(frozen=True)
class Update:
    """What a chunk's rows get beside one of the frozen maps.

    Attributes:
        part: whose rows.
        a: [S', L', in] in the compute dtype, L' being the rank L padded to whole 16 bytes. b: [S', out, L] as trained.
        scale: alpha / rank.
    """

    part: Part
    a: Tensor
    b: Tensor
    scale: float

    def inner(self, rows: Tensor) -> Tensor:
        """xA^T of the part's rows: [R', in or more] -> [R'', L']."""
        return grouped(self.part.pick(rows)[:, : self.a.shape[2]], self.a.transpose(1, 2), self.part.chunk)

    def columns_of(self, rows: Tensor) -> Tensor:
        """The columns of [R', in + P] that belong to the update: [R'', L'], a view unless other rows lie between.

        Past L they hold what must not count: A is zero there, and gradients of A and B are cut to L.
        """
        inputs = self.a.shape[2]
        return self.part.pick(rows[:, inputs : inputs + self.a.shape[1]])

    def b_of_chunk(self, num_experts: int) -> Tensor:
        """B of every expert of the chunk, [C, out, L]: zeros where there is none, for 0 x rubbish is not 0."""
        if self.part.local is None:
            return self.b
        return self.b.new_zeros(num_experts, *self.b.shape[1:]).index_copy_(0, self.part.local, self.b)


@dataclass(frozen=True)
class Projection:
    """One of the two linear maps of a layer's experts with its update.

    Attributes:
        base: frozen weights and bias.
        a: in the compute dtype, [S, L', in]; as stored where ranks differ. None: no update.
        b: as stored. None: no update.
        scale: alpha / rank.
        inputs: width of the rows it takes.
        rank: the highest of all experts.
        dtype: of the computation.
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
        adapted: LoraExperts | None,
    ) -> Projection:
        """Take a projection's factors into the compute dtype, all at once where they have one rank."""
        if a is None or b is None:
            return cls(base, None, None, scale, inputs, 0, dtype)
        if adapted is not None and adapted.ranks is not None:
            return cls(base, a, b, scale, inputs, adapted.ranks.highest, dtype)
        return cls(base, padded_rank(a.to(dtype), 1), b.contiguous(), scale, inputs, b.shape[2], dtype)

    def update_of(self, part: Part | None) -> Update | None:
        """What a chunk's adapted experts add; None where there are none."""
        if part is None or self.a is None or self.b is None:
            return None
        a, b = part.gather_a(self.a), part.gather_b(self.b)
        return Update(part, padded_rank(a.to(self.dtype), 1), b.contiguous(), self.scale)

    def scratch_shape(self, num_experts: int, rank: int) -> tuple[int, int, int]:
        """[C, out, in + P] of so many experts."""
        return num_experts, self.base.bias.shape[1], self.inputs + launch.padding(rank)

    def dequantise(self, chunk: Chunk, update: Update | None, scratch: Tensor) -> Tensor:
        """[C, out, in + P], over whatever the flat scratch held."""
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
        """Write s·xA^T into the columns that rows [R', in + P] have for it; where there is no update they hold 0."""
        if update is None:
            return
        inner, rank = update.inner(rows), rank_of(update)
        into = rows[:, self.inputs : self.inputs + rank]
        if update.part.rows is None:
            torch.mul(inner[:, :rank], self.scale, out=into)
        else:
            into.index_copy_(0, update.part.rows, inner[:, :rank] * self.scale)


def rank_of(update: Update | None) -> int:
    """L, 0 without an update."""
    return 0 if update is None else update.b.shape[2]


# The routed experts' forward and backward out of two augmented grouped products a chunk, with Triton around them.
#
# Equal to `finetune.kernels.experts` (the specification) up to rounding. A chunk of experts is dequantised once for the
# forward and once for the backward pass, into rows [W | B | bias | 0] that multiply rows [x | s·xA^T | 1 | 0]: base,
# update and bias in one product. The same rows, not transposed, carry the gradient back; the extra columns then hold
# the update's inner gradient and <bias, dY>. The backward pass computes gate_up again and never the down product.
#
# Shape legend: as in `finetune.kernels.experts`, and P columns of padding beyond an augmented row's values.

_SCRATCH: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}


def fused_expert_block(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    weights: ExpertWeights,
    gate_up_lora: LoraFactors | None,
    down_lora: LoraFactors | None,
    adapted: LoraExperts | None = None,
) -> Tensor:
    """What `finetune.kernels.experts.expert_block` computes, with the same arguments.

    Args:
        x: [T, D], bfloat16 on a GPU (float32 only in Triton's interpreter).
        expert_ids: int64 [T, K]. expert_weights: [T, K], any floating dtype.
        weights: the layer's packed experts, on x's device.
        gate_up_lora, down_lora: updates, or None for none; of any floating dtype.
        adapted: whose updates these are. None: of all experts.

    Returns:
        [T, D] in x's dtype, the same bits for the same inputs.
    """
    factors = [t for lora in (gate_up_lora, down_lora) for t in ((lora.a, lora.b) if lora else (None, None))]
    scales = tuple(lora.scale if lora else 0.0 for lora in (gate_up_lora, down_lora))
    return _FusedExpertBlock.apply(x, expert_weights, *factors, expert_ids, weights, scales, adapted)


class _FusedExpertBlock(torch.autograd.Function):
    """Saves the block's inputs and the routing; one dequantisation a chunk and pass."""

    @staticmethod
    def forward(ctx, x, expert_weights, gate_up_a, gate_up_b, down_a, down_b, expert_ids, weights, scales, adapted):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, expert_weights, gate_up_a, gate_up_b, down_a, down_b)
        if is_recomputing():
            return torch.full_like(x, torch.nan)
        # Kept beside the saved tensors: a layer computed again cannot route another way than its output was made.
        ctx.routing = routing = Routing.of(expert_ids, len(weights.gate_up.bias), weights.experts_per_chunk)
        ctx.parts = parts = lora_chunks(routing, adapted)
        ctx.weights, ctx.scales, ctx.adapted = weights, scales, adapted
        x, expert_weights = x.contiguous(), expert_weights.contiguous()
        gate_up, down = _projections(x, weights, (gate_up_a, gate_up_b, down_a, down_b), scales, adapted)
        (scratch,) = _scratch(x, max(_sizes((gate_up, down), weights.experts_per_chunk)))
        rows = x.new_empty(len(routing.order), x.shape[1])
        for chunk, part in zip(routing.chunks(), parts, strict=True):
            _, hidden, _ = _gate_up(x, chunk, routing, gate_up, gate_up.update_of(part), scratch)
            update = down.update_of(part)
            activated = launch.swiglu(hidden, weights.limit, weights.gain, rank_of(update))
            del hidden
            down.append_inner(activated, update)
            matrices = down.dequantise(chunk, update, scratch)
            rows[chunk.rows] = grouped(activated, matrices.transpose(1, 2), chunk)
        return launch.combine(rows, routing.position(), expert_weights, routing.top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        x, expert_weights, *factors = ctx.saved_tensors
        x, grad_out, routing = x.contiguous(), grad_out.contiguous(), ctx.routing
        projections = _projections(x, ctx.weights, factors, ctx.scales, ctx.adapted)
        scratch = _scratch(x, *_sizes(projections, ctx.weights.experts_per_chunk))
        grads = _Gradients.empty(x, expert_weights, factors, routing, ctx.needs_input_grad)
        for chunk, part in zip(routing.chunks(), ctx.parts, strict=True):
            _chunk_backward(x, grad_out, chunk, part, routing, ctx.weights, projections, scratch, grads)
        return *grads.of_inputs(routing, expert_weights), *grads.factors, None, None, None, None


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
    x: Tensor,
    weights: ExpertWeights,
    factors: Sequence[Tensor | None],
    scales: tuple[float, float],
    adapted: LoraExperts | None,
) -> tuple[Projection, Projection]:
    gate_up_a, gate_up_b, down_a, down_b = factors
    width = weights.gate_up.bias.shape[1] // 2
    return (
        Projection.of(weights.gate_up, gate_up_a, gate_up_b, scales[0], x.shape[1], x.dtype, adapted),
        Projection.of(weights.down, down_a, down_b, scales[1], width, x.dtype, adapted),
    )


def _gate_up(
    x: Tensor, chunk: Chunk, routing: Routing, gate_up: Projection, update: Update | None, scratch: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gather a chunk's rows and take them through gate_up.

    Returns:
        Augmented rows [R', D + P], their products [R', 2F], and the augmented weights [C, 2F, D + P] in the scratch.
    """
    rows = launch.gather(x, routing.order[chunk.rows], routing.top_k, rank_of(update))
    gate_up.append_inner(rows, update)
    matrices = gate_up.dequantise(chunk, update, scratch)
    return rows, grouped(rows, matrices.transpose(1, 2), chunk), matrices


def _chunk_backward(
    x: Tensor,
    grad_out: Tensor,
    chunk: Chunk,
    part: Part | None,
    routing: Routing,
    weights: ExpertWeights,
    projections: tuple[Projection, Projection],
    scratch: Sequence[Tensor],
    grads: _Gradients,
) -> None:
    """Fill in the gradients that one chunk contributes."""
    gate_up, down = projections
    of_gate_up, of_down = gate_up.update_of(part), down.update_of(part)
    rows, hidden, matrices = _gate_up(x, chunk, routing, gate_up, of_gate_up, scratch[0])
    grad_rows = launch.gather(grad_out, routing.order[chunk.rows], routing.top_k, None)
    grad_activated = grouped(grad_rows, down.dequantise(chunk, of_down, scratch[1]), chunk)
    inner = through_update = None
    if of_down is not None:
        inner = of_down.columns_of(grad_activated) * down.scale
        through_update = grouped(inner, of_down.a, of_down.part.chunk)
        if of_down.part.rows is not None:
            grad_activated[:, : down.inputs].index_add_(0, of_down.part.rows, through_update)
            through_update = None
    row_weights = grads.row_weights[chunk.rows]
    activated = launch.swiglu_backward(
        hidden, grad_activated, through_update, row_weights, grads.grad_row_weights[chunk.rows],
        weights.limit, weights.gain, rank_of(of_down),
    )  # fmt: skip
    del grad_activated, through_update
    if of_down is not None and inner is not None:
        _down_factors(of_down, activated, grad_rows, inner, row_weights, grads)
    del activated, grad_rows
    _gate_up_gradients(chunk, gate_up.inputs, of_gate_up, rows, hidden, matrices, grads)


def _down_factors(
    down: Update, activated: Tensor, grad_rows: Tensor, inner: Tensor, row_weights: Tensor, grads: _Gradients
) -> None:
    """Gradients of down's A and B. The router weight goes onto the thin sides, [R'', L']."""
    part, rank = down.part, rank_of(down)
    weight = part.pick(row_weights)[:, None].to(inner.dtype)
    _, _, grad_a, grad_b = grads.factors
    seen = part.pick(activated)
    if grad_a is not None:
        part.scatter_grad_a(grad_a, grouped_outer(inner * weight, seen, part.chunk)[:, :rank])
    if grad_b is not None:
        thin = grouped(seen, down.a.transpose(1, 2), part.chunk) * (weight * down.scale)
        part.scatter_grad_b(grad_b, grouped_outer(part.pick(grad_rows), thin, part.chunk)[..., :rank])


def _gate_up_gradients(
    chunk: Chunk,
    inputs: int,
    update: Update | None,
    rows: Tensor,
    grad_hidden: Tensor,
    matrices: Tensor,
    grads: _Gradients,
) -> None:
    """Gradients of x's rows and of gate_up's A and B, from the gradient of its output [R', 2F]."""
    grad_a, grad_b, _, _ = grads.factors
    if update is not None and grad_b is not None:  # of these columns the first L hold s·xA^T
        outer = grouped_outer(update.part.pick(grad_hidden), update.columns_of(rows), update.part.chunk)
        update.part.scatter_grad_b(grad_b, outer[..., : rank_of(update)])
    if grads.rows is None and (update is None or grad_a is None):
        return
    augmented = grouped(grad_hidden, matrices, chunk)
    values = augmented[:, :inputs]
    if update is None:
        if grads.rows is not None:
            grads.rows[chunk.rows] = values
        return
    part, inner = update.part, update.columns_of(augmented) * update.scale
    if grads.rows is not None:
        _add_through(grads.rows[chunk.rows], values, grouped(inner, update.a, part.chunk), part)
    if grad_a is not None:
        outer = grouped_outer(inner, part.pick(rows)[:, :inputs], part.chunk)
        part.scatter_grad_a(grad_a, outer[:, : rank_of(update)])


def _add_through(out: Tensor, values: Tensor, through_update: Tensor, part: Part) -> None:
    """Write values [R', D] plus the part's [R'', D]."""
    if part.rows is None:
        torch.add(values, through_update, out=out)
    else:
        out.copy_(values).index_add_(0, part.rows, through_update)


def _sizes(projections: Sequence[Projection], num_experts: int) -> list[int]:
    """Elements that hold each projection's augmented weights of a chunk."""
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
