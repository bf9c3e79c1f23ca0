"""Attention with sinks against a dense softmax in float64, over packed sequences, windows and shared prefixes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from finetune.kernels import attention
from finetune.kernels.attention import plan_attention, sink_attention

HEADS, KEY_HEADS, WIDTH = 4, 2, 8


def dense(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, allowed: Tensor) -> Tensor:
    """The definition: one softmax over visible keys and the sink, [N, H, d]."""
    group = HEADS // KEY_HEADS
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * WIDTH**-0.5
    scores = scores.masked_fill(~allowed, float("-inf"))
    with_sink = torch.cat([scores, sinks[:, None, None].expand(-1, len(q), 1)], -1)
    return torch.einsum("hqk,khd->qhd", with_sink.softmax(-1)[..., :-1], v)


def allowed_pairs(segments: list[int], positions: list[int], window: int | None, prefixes: list[int]) -> Tensor:
    """Visibility by a plain double loop, one sequence."""
    n = len(segments)
    table = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        for j in range(i + 1):
            related = segments[j] in (segments[i], prefixes[i])
            table[i, j] = related and (window is None or positions[i] - positions[j] < window)
    return table


PACKED = ([0] * 7 + [1] * 15 + [2] * 6 + [-1] * 4, [*range(7), *range(15), *range(6), *range(4)])
# one prompt of 9 tokens and three answers that continue it, then another prompt with one answer
TREE = ([0] * 9 + [1] * 3 + [2] * 4 + [3] * 2 + [4] * 5 + [5] * 3,
        [*range(9), *range(9, 12), *range(9, 13), *range(9, 11), *range(5), *range(5, 8)],
        [0] * 18 + [4] * 8)  # fmt: skip


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("layout", ["packed", "tree"])
def test_output_and_gradients_equal_the_dense_softmax(
    layout: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "QUERIES_PER_BLOCK", 5)
    segments, positions = (PACKED if layout == "packed" else TREE)[:2]
    prefixes = TREE[2] if layout == "tree" else segments
    n = len(segments)
    g = torch.Generator().manual_seed(n)
    q, k, v = (
        torch.randn(n, heads, WIDTH, generator=g, dtype=torch.float64) for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    sinks = torch.randn(HEADS, generator=g, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (q, k, v, sinks)]
    plan = plan_attention(
        torch.tensor([segments]), torch.tensor([positions]), window, prefixes=torch.tensor([prefixes])
    )
    out = sink_attention(*leaves, plan, WIDTH**-0.5)
    exact = dense(*leaves, allowed_pairs(segments, positions, window, prefixes))
    assert (out - exact).abs().max() < 1e-12
    grad = torch.randn(out.shape, generator=g, dtype=torch.float64)
    for ours, wanted in zip(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(exact, leaves, grad), strict=True
    ):
        assert (ours - wanted).abs().max() < 1e-12


def test_two_sequences_equal_each_alone() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 20, heads, WIDTH, generator=g) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    sinks = torch.randn(HEADS, generator=g)
    segments = torch.tensor([[0] * 12 + [1] * 8, [0] * 20])
    positions = torch.tensor([[*range(12), *range(8)], [*range(20)]])
    both = sink_attention(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), sinks, plan_attention(segments, positions, 6), 0.3
    )
    for row in range(2):
        plan = plan_attention(segments[row : row + 1], positions[row : row + 1], 6)
        alone = sink_attention(q[row], k[row], v[row], sinks, plan, 0.3)
        torch.testing.assert_close(both.view(2, 20, HEADS, WIDTH)[row], alone)


def test_frozen_sinks_get_no_gradient_and_change_no_other() -> None:
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(10, heads, WIDTH, generator=g).requires_grad_() for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    plan = plan_attention(torch.zeros(1, 10, dtype=torch.long), torch.arange(10)[None], None)
    grads = []
    for trained in (False, True):
        sinks = torch.ones(HEADS).requires_grad_(trained)
        out = sink_attention(q, k, v, sinks, plan, 0.3)
        grads.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_key_ranges_skip_masked_keys() -> None:
    """Packed sequences and windows skip masked keys: the last block starts at its segment, or at its window."""
    segments = torch.tensor([[0] * 1000 + [1] * 1000])
    positions = torch.cat([torch.arange(1000), torch.arange(1000)])[None]
    assert plan_attention(segments, positions, None).blocks[-1].first_key == 1000
    assert plan_attention(segments, positions, 128).blocks[-1].first_key == 1792 - 127


def test_long_sequences_take_fewer_queries_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded by pairs of query and key; sequences that fit are split as before, with the same results."""
    short = plan_attention(torch.zeros(1, 4096, dtype=torch.long), torch.arange(4096)[None], None)
    assert {block.last - block.first for block in short.blocks} == {attention.QUERIES_PER_BLOCK}
    layout = torch.zeros(1, 700, dtype=torch.long), torch.arange(700)[None]
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(700, heads, WIDTH, generator=g) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    sinks = torch.randn(HEADS, generator=g)
    whole = sink_attention(q, k, v, sinks, plan_attention(*layout, None), 0.3)
    monkeypatch.setattr(attention, "PAIRS_PER_BLOCK", 3000)
    plan = plan_attention(*layout, None)
    assert max((block.last - block.first) * (block.last - block.first_key) for block in plan.blocks) <= 3000
    assert [block.first for block in plan.blocks[1:]] == [block.last for block in plan.blocks[:-1]]
    torch.testing.assert_close(sink_attention(q, k, v, sinks, plan, 0.3), whole)
