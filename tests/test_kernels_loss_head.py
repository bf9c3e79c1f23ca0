"""The chunked loss head against torch's own cross-entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from finetune.kernels.loss_head import token_nll


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
