"""The expert block against a loop over experts in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from finetune.kernels.experts import ExpertWeights, LoraFactors, Mxfp4Experts, expert_block
from finetune.mxfp4.format import dequantise, quantise

LIMIT, GAIN = 7.0, 1.702


def packed_linear(experts: int, out: int, inputs: int, generator: torch.Generator) -> Mxfp4Experts:
    blocks, scales = quantise(torch.randn(experts, out, inputs, generator=generator) * 0.3)
    return Mxfp4Experts(blocks, scales, torch.randn(experts, out, generator=generator) * 0.3)


class Case:
    """A random expert layer: E experts, hidden D, width F, rank L, T tokens, K active."""

    def __init__(
        self, E: int, D: int, F: int, L: int, T: int, K: int, *, chunk: int = 3, used: int | None = None
    ) -> None:
        g = torch.Generator().manual_seed(E * 1000 + D + F)
        self.weights = ExpertWeights(
            packed_linear(E, 2 * F, D, g), packed_linear(E, D, F, g), LIMIT, GAIN, experts_per_chunk=chunk
        )
        rand = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
        self.x = rand(T, D)
        self.ids = torch.stack([torch.randperm(used or E, generator=g)[:K] for _ in range(T)])
        self.mix = rand(T, K).softmax(-1)
        self.factors = [rand(E, L, D) * 0.3, rand(E, 2 * F, L) * 0.3, rand(E, L, F) * 0.3, rand(E, D, L) * 0.3]
        self.grad_out = rand(T, D)
        self.scale = 2.0

    def ours(self, *, lora: bool = True) -> tuple[Tensor, list[Tensor]]:
        leaves = [t.clone().requires_grad_() for t in (self.x, self.mix, *self.factors)]
        x, mix, ga, gb, da, db = leaves
        updates = (LoraFactors(ga, gb, self.scale), LoraFactors(da, db, self.scale)) if lora else (None, None)
        out = expert_block(x, self.ids, mix, self.weights, *updates)
        return out.detach(), list(torch.autograd.grad(out, leaves if lora else leaves[:2], self.grad_out))

    def oracle(self) -> tuple[Tensor, list[Tensor]]:
        """The definition, expert by expert, with autograd in float64."""
        leaves = [t.double().requires_grad_() for t in (self.x, self.mix, *self.factors)]
        x, mix, ga, gb, da, db = leaves
        out = torch.zeros_like(x)
        gate_up, down = self.weights.gate_up, self.weights.down
        W1 = dequantise(gate_up.blocks, gate_up.scales, dtype=torch.float32).double()
        W2 = dequantise(down.blocks, down.scales, dtype=torch.float32).double()
        for e in range(len(W1)):
            token, slot = torch.where(self.ids == e)
            h = x[token] @ (W1[e] + self.scale * gb[e] @ ga[e]).T + gate_up.bias[e].double()
            gate, up = h[:, ::2].clamp(max=LIMIT), h[:, 1::2].clamp(-LIMIT, LIMIT)
            a = (up + 1) * gate / (1 + torch.exp(-GAIN * gate))
            y = a @ (W2[e] + self.scale * db[e] @ da[e]).T + down.bias[e].double()
            out = out.index_add(0, token, y * mix[token, slot, None])
        return out.detach(), list(torch.autograd.grad(out, leaves, self.grad_out.double()))


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact).abs().max() / exact.abs().max()).item()


CASES = {
    "hidden != width": dict(E=6, D=64, F=96, L=4, T=37, K=3),
    "square": dict(E=5, D=64, F=64, L=8, T=50, K=2),
    "empty experts": dict(E=8, D=32, F=64, L=3, T=20, K=2, used=3),
    "empty experts in a visited chunk": dict(E=8, D=32, F=64, L=4, T=20, K=2, used=3, chunk=4),
    "one token": dict(E=4, D=32, F=32, L=1, T=1, K=2),
    "one chunk": dict(E=6, D=64, F=32, L=5, T=33, K=4, chunk=64),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_and_every_gradient_equal_the_float64_loop(name: str) -> None:
    case = Case(**CASES[name])
    (out, grads), (exact, exact_grads) = case.ours(), case.oracle()
    assert relative_error(out, exact) < 1e-5
    for label, ours, wanted in zip(("x", "mix", "gu_a", "gu_b", "d_a", "d_b"), grads, exact_grads, strict=True):
        assert relative_error(ours, wanted) < 1e-5, label
        assert (ours.double() - wanted).mean().abs() < 1e-6 * wanted.abs().max(), f"{label} drifts to one side"


def test_swapped_gate_and_up_are_detected() -> None:
    """Negative control: the comparison above detects half of the interleaving being wrong."""
    case = Case(**CASES["square"])
    exact, _ = case.oracle()
    bias = case.weights.gate_up.bias
    bias.copy_(torch.stack([bias[:, 1::2], bias[:, ::2]], -1).flatten(1))
    assert relative_error(case.ours()[0], exact) > 1e-2


def test_experts_without_tokens_get_no_gradient() -> None:
    case = Case(**CASES["empty experts"])
    _, grads = case.ours()
    for grad in grads[2:]:
        assert grad[:3].flatten(1).abs().sum(1).min() > 0
        assert grad[3:].count_nonzero() == 0


def test_chunk_size_does_not_change_the_result() -> None:
    outs = [Case(E=6, D=64, F=96, L=4, T=37, K=3, chunk=chunk).ours() for chunk in (1, 4, 6)]
    for out, grads in outs[1:]:
        assert torch.equal(out, outs[0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, outs[0][1], strict=True))


def test_without_lora_the_block_equals_the_base() -> None:
    case = Case(**CASES["hidden != width"])
    without, _ = case.ours(lora=False)
    for factor in (case.factors[1], case.factors[3]):
        factor.zero_()
    torch.testing.assert_close(case.ours()[0], without, rtol=0, atol=0)


def test_bfloat16_with_a_rank_that_needs_padding() -> None:
    case = Case(E=4, D=64, F=64, L=3, T=40, K=2)
    exact, _ = case.oracle()
    case.x, case.mix = case.x.bfloat16(), case.mix.bfloat16()
    case.weights = ExpertWeights(
        *(Mxfp4Experts(p.blocks, p.scales, p.bias.bfloat16()) for p in (case.weights.gate_up, case.weights.down)),
        LIMIT, GAIN, 2,
    )  # fmt: skip
    leaves = [t.clone().requires_grad_() for t in case.factors]
    updates = LoraFactors(leaves[0], leaves[1], 2.0), LoraFactors(leaves[2], leaves[3], 2.0)
    out = expert_block(case.x, case.ids, case.mix, case.weights, *updates)
    out.float().sum().backward()
    assert relative_error(out, exact) < 0.05
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in leaves)
