"""The chunked loss head against torch's own cross-entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from allocation import AllocationTracker

from finetune.kernels import loss_head
from finetune.kernels.loss_head import answer_scores, token_nll


def test_values_and_gradient_equal_cross_entropy() -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 16, generator=g, dtype=torch.float64).requires_grad_()
    head = torch.randn(301, 16, generator=g, dtype=torch.float64)
    targets = torch.randint(301, (23,), generator=g)
    weights = torch.rand(23, generator=g, dtype=torch.float64)
    ours = token_nll(hidden, head, targets, tokens_per_chunk=5)
    exact = F.cross_entropy(hidden @ head.T, targets, reduction="none")
    assert (ours - exact).abs().max() < 1e-12
    grads = [torch.autograd.grad((nll * weights).sum(), hidden)[0] for nll in (ours, exact)]
    assert (grads[0] - grads[1]).abs().max() < 1e-12
    assert (grads[0] - torch.autograd.grad(token_nll(hidden, head, targets).sum(), hidden)[0]).abs().max() > 1e-3


def test_no_tokens_give_an_empty_result() -> None:
    hidden = torch.randn(0, 8).requires_grad_()
    nll = token_nll(hidden, torch.randn(11, 8), torch.zeros(0, dtype=torch.long))
    nll.sum().backward()
    assert nll.shape == (0,) and hidden.grad is not None


def test_bfloat16_logits_are_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of about 20: rounding them to bfloat16 changes a loss by some hundredths; there is a control."""
    monkeypatch.setattr(loss_head, "_WORDS_PER_SLICE", 100)
    g = torch.Generator().manual_seed(1)
    hidden = (5 * torch.randn(30, 16, generator=g)).bfloat16().requires_grad_()
    head = torch.randn(301, 16, generator=g).bfloat16()
    targets = torch.randint(301, (30,), generator=g)
    ours = token_nll(hidden, head, targets, tokens_per_chunk=7)
    exact = F.cross_entropy(hidden.double() @ head.double().T, targets, reduction="none")
    rounded = F.cross_entropy((hidden @ head.T).double(), targets, reduction="none")
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() < 1e-5 and (rounded - exact).abs().max() > 1e-2
    grads = [torch.autograd.grad(nll.sum(), hidden)[0].double() for nll in (ours, exact)]
    assert (grads[0] - grads[1]).square().mean().sqrt() < 0.01 * grads[1].square().mean().sqrt()


def test_memory_is_one_chunk_and_the_frozen_head_costs_nothing() -> None:
    hidden = torch.randn(64, 16).requires_grad_()
    head = torch.randn(5000, 16)
    targets = torch.zeros(64, dtype=torch.long)
    chunk_bytes = 8 * 5000 * 4
    with AllocationTracker() as tracker:
        token_nll(hidden, head, targets, tokens_per_chunk=8).sum().backward()
    assert chunk_bytes <= tracker.largest_bytes < 1.1 * chunk_bytes
    assert tracker.peak_bytes < 1.2 * chunk_bytes


def test_answer_scores_equal_log_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_head, "TOKENS_PER_CHUNK", 7)
    g = torch.Generator().manual_seed(1)
    hidden = (5 * torch.randn(30, 16, generator=g)).bfloat16()
    head = torch.randn(301, 16, generator=g).bfloat16()
    exact = (hidden.double() @ head.double().T).log_softmax(-1)
    rows, targets = torch.randint(30, (80,), generator=g), torch.randint(301, (80,), generator=g)
    targets[:20] = exact.argmax(-1)[rows[:20]]
    likelihood, is_likeliest = answer_scores(hidden, head, rows, targets)
    assert (likelihood - exact[rows, targets]).abs().max() < 1e-5
    assert torch.equal(is_likeliest, targets == exact.argmax(-1)[rows]) and 20 <= is_likeliest.sum() < 40
