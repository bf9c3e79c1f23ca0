"""Attention with learned sinks over packed sequences, in plain PyTorch: the reference that faster kernels must equal.

A packed sequence has several examples. The keys that a query attends to follow from the batch's segments and are
computed once on the host (`AttentionPlan`); there is no T x T mask. A query attends to keys at or before its own index
that belong to its own segment, or to the one segment that it continues (its prefix), and that are within the layer's
window by position. The forward pass saves only the output and each query's log-sum-exp; the backward pass recomputes
probabilities block by block.

A sink is one logit per head that takes part in the softmax and has no value: it only takes probability away.

Shape legend: N tokens of all sequences joined, H query heads, J key heads, G = H / J, d head width, Q queries in a
block, S keys that a block attends to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, "AttentionPlan", float], Tensor]
"""(q, k, v, sinks, plan, scaling) -> output; the signature of `sink_attention`, which every kernel offers."""

QUERIES_PER_BLOCK = 256
PAIRS_PER_BLOCK = QUERIES_PER_BLOCK * 4096  # scores of a block for one head: 0.27 GB over 64 heads in float32


class _Block(NamedTuple):
    """Queries `first` to `last` (exclusive) and the earliest key that any of them attends to."""

    first: int
    last: int
    first_key: int


@dataclass(frozen=True)
class PackedSegments:
    """The segments as variable-length kernels take them: a segment's queries are aligned with the end of its keys.

    A segment that continues another has copies of that one's keys before its own (in a sliding layer only the last
    ones, as far as the window reaches); `key_index` lists them.

    Attributes:
        lengths, key_lengths: queries and keys of each of the S segments.
        starts, key_starts: int32 [S + 1], start of each segment among all queries or keys.
        key_index: int64, the token of each key; None when keys are the tokens themselves.
    """

    lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    starts: Tensor
    key_starts: Tensor
    key_index: Tensor | None

    def to(self, device: torch.device) -> PackedSegments:
        """The same segments with their tensors on `device`."""
        return replace(
            self,
            starts=self.starts.to(device),
            key_starts=self.key_starts.to(device),
            key_index=None if self.key_index is None else self.key_index.to(device),
        )


@dataclass(frozen=True)
class AttentionPlan:
    """The keys that each query attends to, for one kind of layer.

    Attributes:
        segments: int64 [N], the segment of each token, numbered across sequences.
        prefixes: int64 [N], the segment each token's own segment continues; itself when it continues none.
        positions: int64 [N], position in the (prefix and) segment, as the rotary embedding uses it.
        window: most keys that a query attends to, its own token included; None in full layers.
        blocks: query blocks with their key ranges, for the reference.
        packed: the segments, for variable-length kernels. None where such a kernel cannot express the plan: it counts a
            window in tokens, the plan in positions, and here positions have gaps. Training batches always have it.
    """

    segments: Tensor
    prefixes: Tensor
    positions: Tensor
    window: int | None
    blocks: tuple[_Block, ...]
    packed: PackedSegments | None

    def to(self, device: torch.device) -> AttentionPlan:
        """The same plan with its tensors on `device`."""
        return replace(
            self,
            segments=self.segments.to(device),
            prefixes=self.prefixes.to(device),
            positions=self.positions.to(device),
            packed=None if self.packed is None else self.packed.to(device),
        )

    def masked(self, block: _Block) -> Tensor:
        """bool [Q, S], whether each key is masked for each query of the block."""
        queries, keys = slice(block.first, block.last), slice(block.first_key, block.last)
        index = torch.arange(block.first_key, block.last, device=self.segments.device)
        allowed = index[None, :] <= index[block.first - block.first_key :, None]
        key_segments = self.segments[keys][None, :]
        same = (key_segments == self.segments[queries][:, None]) | (key_segments == self.prefixes[queries][:, None])
        allowed = allowed & same
        if self.window is not None:
            distance = self.positions[queries][:, None] - self.positions[keys][None, :]
            allowed = allowed & (distance < self.window)
        return ~allowed


def plan_attention(
    segments: Tensor, positions: Tensor, window: int | None, *, prefixes: Tensor | None = None
) -> AttentionPlan:
    """Compute query blocks and key ranges for a batch of packed sequences.

    Args:
        segments: int64 [B, T], number of the example within its sequence; padding has its own number (such as -1).
            Tokens of a segment are contiguous.
        positions: int64 [B, T], position of each token in its example.
        window: the layer's sliding window, or None.
        prefixes: int64 [B, T], the earlier segment of the same sequence that each token's segment continues. None: no
            segment continues another.

    Returns:
        The plan, its tensors on `segments`' device.
    """
    batch, length = segments.shape
    sequence_numbers = torch.arange(batch, device=segments.device)[:, None]
    stride = length + 2  # more than the segments a sequence can have, padding's -1 included
    joined = (segments + 1 + sequence_numbers * stride).reshape(-1)
    joined_prefixes = joined if prefixes is None else (prefixes + 1 + sequence_numbers * stride).reshape(-1)
    flat_positions = positions.reshape(-1)
    on_host = joined.cpu().numpy(), joined_prefixes.cpu().numpy()
    packed = _packed_segments(*on_host, flat_positions.cpu().numpy(), window)
    return AttentionPlan(
        joined,
        joined_prefixes,
        flat_positions,
        window,
        _blocks(_first_keys(*on_host, window)),
        None if packed is None else packed.to(segments.device),
    )


def _blocks(first_keys: np.ndarray) -> tuple[_Block, ...]:
    """Cut the queries into blocks, shorter ones where they attend to many keys: memory must not grow with length."""
    blocks = []
    first, length = 0, len(first_keys)
    while first < length:
        count = min(QUERIES_PER_BLOCK, length - first)
        while count > 1 and count * (first + count - first_keys[first : first + count].min()) > PAIRS_PER_BLOCK:
            count = (count + 1) // 2
        blocks.append(_Block(first, first + count, int(first_keys[first : first + count].min())))
        first += count
    return tuple(blocks)


def _packed_segments(
    segments: np.ndarray, prefixes: np.ndarray, positions: np.ndarray, window: int | None
) -> PackedSegments | None:
    """The segments of joined sequences ([N] each), or None where positions have gaps and a window counts them."""
    firsts = np.flatnonzero(np.diff(segments, prepend=np.nan))
    lasts = np.append(firsts[1:], len(segments))
    number_of = {segment: number for number, segment in enumerate(segments[firsts].tolist())}
    prefix = np.array([number_of[segment] for segment in prefixes[firsts].tolist()], dtype=np.int64)
    continues = prefix != np.arange(len(firsts))
    before = np.where(continues, (lasts - firsts)[prefix], 0)
    if window is not None:
        jumps = np.diff(positions) != 1
        jumps[firsts[1:] - 1] = False
        if jumps.any() or (positions[firsts] != positions[firsts[prefix]] + before)[continues].any():
            return None
        before = np.minimum(before, window - 1)
    lengths = lasts - firsts
    key_index = None
    if continues.any():
        pieces = []
        for number, (first, last) in enumerate(zip(firsts, lasts, strict=True)):
            end = lasts[prefix[number]]
            pieces += [np.arange(end - before[number], end), np.arange(first, last)]
        key_index = torch.from_numpy(np.concatenate(pieces))
    return PackedSegments(
        tuple(lengths.tolist()),
        tuple((lengths + before).tolist()),
        _starts(lengths),
        _starts(lengths + before),
        key_index,
    )


def _starts(lengths: np.ndarray) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))


def _first_keys(segments: np.ndarray, prefixes: np.ndarray, window: int | None) -> np.ndarray:
    """For each query an index [N] at or before the first key that it attends to."""
    index = np.arange(len(segments))
    _, first_of, inverse = np.unique(segments, return_index=True, return_inverse=True)
    own_start = first_of[inverse]
    start_of_segment = dict(zip(segments[first_of].tolist(), first_of.tolist(), strict=True))
    continues = prefixes != segments
    starts = own_start if window is None else np.maximum(own_start, index - window + 1)
    if continues.any():
        starts = starts.copy()
        starts[continues] = [start_of_segment[segment] for segment in prefixes[continues].tolist()]
    return starts


def sink_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, plan: AttentionPlan, scaling: float) -> Tensor:
    """Softmax attention with one sink per head.

    Args:
        q: [N, H, d]. k, v: [N, J, d], H a multiple of J; head h reads key head h // G.
        sinks: [H] logits.
        plan: the keys that each query attends to.
        scaling: factor on the scores.

    Returns:
        [N, H, d] in q's dtype. Scores and probabilities are float32 (float64 for float64 inputs).
    """
    return _SinkAttention.apply(q, k, v, sinks, plan, scaling)


class _SinkAttention(torch.autograd.Function):
    """Blockwise forward and backward; exact in the sinks too, whose gradient is only computed when needed.

    Scores are updated in place and exponentiated once per pass: on a CPU these passes are most of the cost.
    """

    @staticmethod
    def forward(ctx, q, k, v, sinks, plan, scaling):  # type: ignore[no-untyped-def]
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[0], q.shape[1], dtype=_accurate(q.dtype))
        for block in plan.blocks:
            scores = _scores(q, k, plan, block, scaling)  # [J, G, Q, S]
            sink = sinks.to(scores.dtype).view(*scores.shape[:2], 1)
            largest = torch.maximum(scores.amax(-1), sink)
            exponentials = scores.sub_(largest[..., None]).exp_()
            total = exponentials.sum(-1) + torch.exp(sink - largest)  # [J, G, Q]
            values = v[block.first_key : block.last].transpose(0, 1).to(scores.dtype)  # [J, S, d]
            mixed = exponentials.flatten(1, 2) @ values / total.flatten(1, 2)[..., None]  # [J, G·Q, d]
            out[block.first : block.last] = _heads_last(mixed, scores.shape)
            lse[block.first : block.last] = (total.log() + largest).flatten(0, 1).T
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.plan, ctx.scaling = plan, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        q, k, v, sinks, out, lse = ctx.saved_tensors
        exact = lse.dtype
        grad_q = torch.empty_like(q)
        grad_k, grad_v = torch.zeros_like(k, dtype=exact), torch.zeros_like(v, dtype=exact)
        delta = (grad_out.to(exact) * out.to(exact)).sum(-1)  # [N, H]
        for block in ctx.plan.blocks:
            queries, keys = slice(block.first, block.last), slice(block.first_key, block.last)
            scores = _scores(q, k, ctx.plan, block, ctx.scaling)
            grouped = scores.shape[:-1]  # [J, G, Q]
            probabilities = scores.sub_(lse[queries].T.reshape(grouped)[..., None]).exp_().flatten(1, 2)
            grad_block = _heads_first(grad_out[queries].to(exact), k.shape[1])  # [J, G·Q, d]
            grad_v[keys] += (probabilities.transpose(1, 2) @ grad_block).transpose(0, 1)
            grad_probabilities = grad_block @ v[keys].transpose(0, 1).to(exact).transpose(1, 2)
            block_delta = delta[queries].T.reshape(grouped).flatten(1, 2)[..., None]
            grad_scores = grad_probabilities.sub_(block_delta).mul_(probabilities)
            scaled_queries = _heads_first(q[queries].to(exact) * ctx.scaling, k.shape[1])
            grad_k[keys] += (grad_scores.transpose(1, 2) @ scaled_queries).transpose(0, 1)
            scaled_keys = k[keys].transpose(0, 1).to(exact) * ctx.scaling
            grad_q[queries] = _heads_last(grad_scores @ scaled_keys, scores.shape)
        grad_sinks = None
        if ctx.needs_input_grad[3]:
            grad_sinks = -(torch.exp(sinks.to(exact)[None] - lse) * delta).sum(0).to(sinks.dtype)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), grad_sinks, None, None


def _accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _heads_first(x: Tensor, key_heads: int) -> Tensor:
    """[Q, H, d] -> [J, G·Q, d], the query heads of one key head together."""
    queries, heads, width = x.shape
    return x.view(queries, key_heads, heads // key_heads, width).permute(1, 2, 0, 3).reshape(key_heads, -1, width)


def _heads_last(x: Tensor, grouped: torch.Size) -> Tensor:
    """[J, G·Q, d] -> [Q, H, d]; `grouped` is [J, G, Q, ...]."""
    key_heads, group, queries = grouped[:3]
    return x.view(key_heads, group, queries, -1).permute(2, 0, 1, 3).reshape(queries, key_heads * group, -1)


def _scores(q: Tensor, k: Tensor, plan: AttentionPlan, block: _Block, scaling: float) -> Tensor:
    """Scaled scores [J, G, Q, S], -inf where the plan masks the key."""
    exact = _accurate(q.dtype)
    keys = k[block.first_key : block.last].transpose(0, 1)  # [J, S, d]
    queries = _heads_first(q[block.first : block.last].to(exact) * scaling, k.shape[1])
    scores = queries @ keys.to(exact).transpose(1, 2)
    scores = scores.view(k.shape[1], -1, block.last - block.first, block.last - block.first_key)
    return scores.masked_fill_(plan.masked(block), float("-inf"))
