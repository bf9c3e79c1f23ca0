"""Flash attention with sinks, exact forward and backward, on torch's own kernels, which have no sinks.

A flash kernel gives, beside its output O, the log of each query's softmax denominator, lse. The sink adds one term to
that denominator, so lse' = log(exp(lse) + exp(sink)) and O' = O · sigmoid(lse - sink). The kernel's own backward pass
recomputes probabilities as exp(score - lse) and subtracts <dO, O>: given O' and lse' it returns the exact gradients of
queries, keys and values with the sink. The sink's own gradient is -sum exp(sink - lse') · <dO, O'>.

Packed sequences are passed as segments of different lengths, so no pair of tokens of two examples is ever computed.

Shape legend: N tokens of all sequences joined, M keys (N, or more where segments share a prefix), H query heads, J key
heads, d head width.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from finetune.kernels.attention import AttentionPlan, PackedSegments, sink_attention

_CPU_QUERIES = 256  # queries in one call of the CPU kernel where a window needs a mask


class FlashKernel(Protocol):
    """A flash kernel without sinks over packed segments: q [N, H, d], k and v [M, J, d]."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: FlashPlan) -> tuple[Tensor, Tensor]:
        """Output [N, H, d] and lse [H, N]."""

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: FlashPlan
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v."""


class FlashPlan(NamedTuple):
    """The keys that queries attend to, as a flash kernel takes them, and the factor on the scores."""

    packed: PackedSegments
    window: int | None
    scaling: float


def flash_sink_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, plan: AttentionPlan, scaling: float) -> Tensor:
    """`finetune.kernels.attention.sink_attention` on a flash kernel: same arguments, equal up to rounding.

    Plans that such a kernel cannot express (`plan.packed` is None) are computed by the reference.

    Args:
        q: [N, H, d]; bfloat16 or float16 on a GPU, any floating dtype on a CPU. k, v: [N, J, d].
        sinks: [H] logits.
        plan: the keys that each query attends to, on q's device.
        scaling: factor on the scores.

    Returns:
        [N, H, d] in q's dtype. The output is rounded to it twice, once by the kernel and once with the sink.
    """
    if plan.packed is None:
        return sink_attention(q, k, v, sinks, plan, scaling)
    flash_plan = FlashPlan(plan.packed, plan.window, scaling)
    return _FlashSinkAttention.apply(q, k, v, sinks, flash_plan, CudaFlash() if q.is_cuda else CpuFlash())


class _FlashSinkAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, plan, kernel):  # type: ignore[no-untyped-def]
        out, lse = kernel.forward(q, _keys(k, plan), _keys(v, plan), plan)
        out, lse = with_sinks(out, lse, sinks)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.plan, ctx.kernel = plan, kernel
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        q, k, v, sinks, out, lse = ctx.saved_tensors
        plan, grad_out = ctx.plan, grad_out.contiguous()
        grad_q, grad_k, grad_v = ctx.kernel.backward(grad_out, q, _keys(k, plan), _keys(v, plan), out, lse, plan)
        grad_sinks = None
        if ctx.needs_input_grad[3]:
            delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1).T  # [H, N]
            grad_sinks = -(torch.exp(sinks.to(lse.dtype)[:, None] - lse) * delta).sum(1).to(sinks.dtype)
        return grad_q, _grad_of_tokens(grad_k, k, plan), _grad_of_tokens(grad_v, v, plan), grad_sinks, None, None


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Correct attention without sinks for one more logit per head in the softmax; overwrites `out`.

    Args:
        out: [N, H, d], attention without sinks.
        lse: [H, N], log of its softmax denominators.
        sinks: [H].

    Returns:
        Output and lse with the sinks.
    """
    sinks = sinks.to(lse.dtype)[:, None]
    return out.mul_(torch.sigmoid(lse - sinks).T[..., None]), torch.logaddexp(lse, sinks)


def _keys(x: Tensor, plan: FlashPlan) -> Tensor:
    """Keys or values [M, J, d] from those of the tokens [N, J, d]."""
    return x if plan.packed.key_index is None else x[plan.packed.key_index]


def _grad_of_tokens(grad: Tensor, x: Tensor, plan: FlashPlan) -> Tensor:
    """Sum the gradients of a token's copies, in at least float32."""
    if plan.packed.key_index is None:
        return grad
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.zeros_like(x, dtype=exact).index_add_(0, plan.packed.key_index, grad.to(exact)).to(x.dtype)


class CudaFlash:
    """`aten::_flash_attention_forward` and its backward, as `torch.nn.attention.varlen` calls them in torch 2.13.

    That module's own autograd function does not return O and lse, so the operators are called here. Windows are given
    as (left, right) in FlashAttention's sense: `left` keys before a query's own. `right` is 0 even where `is_causal`
    says the same, or a batch of one-token segments takes a shortcut that returns lse in another shape.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: FlashPlan) -> tuple[Tensor, Tensor]:
        """See `FlashKernel`."""
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, *self._lengths(plan), 0.0, plan.window is None, False, **self._options(plan)
        )
        return out, lse

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: FlashPlan
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `FlashKernel`."""
        given = grad_out, q, k, v, out, lse, *self._lengths(plan), 0.0, plan.window is None
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        return torch.ops.aten._flash_attention_backward(*given, *no_dropout, **self._options(plan))

    @staticmethod
    def _lengths(plan: FlashPlan) -> tuple[Tensor, Tensor, int, int]:
        packed = plan.packed
        return packed.starts, packed.key_starts, max(packed.lengths), max(packed.key_lengths)

    @staticmethod
    def _options(plan: FlashPlan) -> dict[str, float | int]:
        left = -1 if plan.window is None else plan.window - 1
        return {"scale": plan.scaling, "window_size_left": left, "window_size_right": 0}


class _CpuCall(NamedTuple):
    """Queries and keys of one call of the CPU kernel; `offset` is the first query's own key minus the first key."""

    queries: slice
    keys: slice
    offset: int


class CpuFlash:
    """`aten::_scaled_dot_product_flash_attention_for_cpu`, segment by segment.

    With it the code around the kernel is the same on both devices, so a machine without a GPU can test all but the GPU
    kernel.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: FlashPlan) -> tuple[Tensor, Tensor]:
        """See `FlashKernel`."""
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
        for call in _cpu_calls(plan):
            some = _heads_first(q[call.queries]), _heads_first(k[call.keys]), _heads_first(v[call.keys])
            mask = _mask(call, plan.window, q)
            call_out, call_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *some, 0.0, mask is None, attn_mask=mask, scale=plan.scaling
            )
            out[call.queries], lse[:, call.queries] = call_out[0].transpose(0, 1), call_lse[0]
        return out, lse

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: FlashPlan
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `FlashKernel`."""
        grad_q = torch.empty_like(q)
        grad_k, grad_v = torch.zeros_like(k, dtype=lse.dtype), torch.zeros_like(v, dtype=lse.dtype)
        for call in _cpu_calls(plan):
            given = _heads_first(grad_out[call.queries]), _heads_first(q[call.queries])
            keys = _heads_first(k[call.keys]), _heads_first(v[call.keys])
            results = _heads_first(out[call.queries]), lse[None, :, call.queries]
            mask = _mask(call, plan.window, q)
            call_q, call_k, call_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *given, *keys, *results, 0.0, mask is None, attn_mask=mask, scale=plan.scaling
            )
            grad_q[call.queries] = call_q[0].transpose(0, 1)
            grad_k[call.keys] += call_k[0].transpose(0, 1)
            grad_v[call.keys] += call_v[0].transpose(0, 1)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _heads_first(x: Tensor) -> Tensor:
    """[Q, H, d] -> [1, H, Q, d]."""
    return x.transpose(0, 1)[None]


def _cpu_calls(plan: FlashPlan) -> list[_CpuCall]:
    """One call per segment; where a window cuts keys off, one per block of queries, so that masks stay small."""
    calls, first, first_key = [], 0, 0
    for length, keys in zip(plan.packed.lengths, plan.packed.key_lengths, strict=True):
        before = keys - length
        windowed = plan.window is not None and keys > plan.window
        step = _CPU_QUERIES if windowed else length
        for start in range(0, length, step):
            stop = min(start + step, length)
            # The first query's own key is the key number before + start of this segment.
            low = max(0, before + start - plan.window + 1) if plan.window is not None else 0
            calls.append(
                _CpuCall(
                    slice(first + start, first + stop),
                    slice(first_key + low, first_key + before + stop),
                    before + start - low,
                )
            )
        first, first_key = first + length, first_key + keys
    return calls


def _mask(call: _CpuCall, window: int | None, like: Tensor) -> Tensor | None:
    """[1, 1, Q, keys] in q's dtype, -inf where a key is masked; None where the kernel's own causal mask is enough."""
    num_queries, num_keys = call.queries.stop - call.queries.start, call.keys.stop - call.keys.start
    if call.offset == 0 and (window is None or num_keys <= window):
        return None
    distance = torch.arange(num_queries)[:, None] + call.offset - torch.arange(num_keys)[None]
    masked = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return torch.zeros(masked.shape, dtype=like.dtype).masked_fill_(masked, float("-inf"))[None, None]
