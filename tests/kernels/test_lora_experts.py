"""The expert block with LoRA on some experts only, and of differing ranks, against a float64 loop over experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_expert_block import GAIN, LIMIT, Case, relative_error
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from finetune.kernels.dispatch import Dispatch, LoraExperts, LoraRanks, lora_chunks
from finetune.kernels.experts import ExpertWeights, LoraFactors, expert_block
from finetune.mxfp4.format import dequantise

CPU = torch.device("cpu")
LABELS = ("x", "mix", "gate_up_a", "gate_up_b", "down_a", "down_b")
Block = Callable[..., Tensor]


class SomeCase(Case):
    """A layer of which `chosen` experts are adapted, with one rank L or with `ranks` and a scale for each of them."""

    def __init__(self, chosen: tuple[int, ...], ranks: tuple[int, ...] | None = None, **shape: Any) -> None:
        super().__init__(**shape)
        self.chosen, self.ranks = chosen, ranks
        self.scales = tuple(1.0 if ranks is None else 6.0 / rank for rank in ranks or chosen)
        hidden, width = self.x.shape[1], self.factors[2].shape[2]
        if ranks is None:
            self.factors = [factor[list(chosen)] for factor in self.factors]
        else:
            g = torch.Generator().manual_seed(sum(ranks))
            sizes = (hidden, 2 * width, width, hidden)
            self.factors = [torch.randn(sum(ranks), size, generator=g) * 0.3 for size in sizes]
            self.scale = 1.0

    def adapted(self, device: torch.device = CPU) -> LoraExperts:
        ranks = None if self.ranks is None else LoraRanks.of(self.ranks, self.scales, device)
        return LoraExperts(self.chosen, torch.tensor(self.chosen, device=device), ranks)

    def run(self, block: Block, needed: tuple[str, ...] = LABELS) -> tuple[Tensor, dict[str, Tensor]]:
        tensors = dict(zip(LABELS, (self.x, self.mix, *self.factors), strict=True))
        leaves = {label: t.clone().requires_grad_(label in needed) for label, t in tensors.items()}
        x, mix, ga, gb, da, db = leaves.values()
        updates = LoraFactors(ga, gb, self.scale), LoraFactors(da, db, self.scale)
        out = block(x, self.ids, mix, self.weights, *updates, self.adapted())
        grads = torch.autograd.grad(out, [leaves[label] for label in needed], self.grad_out)
        return out.detach(), dict(zip(needed, grads, strict=True))

    def of_expert(self, a: Tensor, b: Tensor, number: int) -> Tensor:
        """scale · B A of the number-th adapted expert, [out, in]."""
        if self.ranks is None:
            return self.scale * b[number] @ a[number]
        rows = slice(sum(self.ranks[:number]), sum(self.ranks[: number + 1]))
        return self.scales[number] * b[rows].T @ a[rows]

    def oracle(self) -> tuple[Tensor, list[Tensor]]:
        leaves = [t.double().requires_grad_() for t in (self.x, self.mix, *self.factors)]
        x, mix, ga, gb, da, db = leaves
        out = torch.zeros_like(x)
        gate_up, down = self.weights.gate_up, self.weights.down
        for e in range(len(gate_up.bias)):
            token, slot = torch.where(self.ids == e)
            W1, W2 = (dequantise(p.blocks[e], p.scales[e], dtype=torch.float32).double() for p in (gate_up, down))
            if e in self.chosen:
                number = self.chosen.index(e)
                W1, W2 = W1 + self.of_expert(ga, gb, number), W2 + self.of_expert(da, db, number)
            h = x[token] @ W1.T + gate_up.bias[e].double()
            gate, up = h[:, ::2].clamp(max=LIMIT), h[:, 1::2].clamp(-LIMIT, LIMIT)
            y = ((up + 1) * gate / (1 + torch.exp(-GAIN * gate))) @ W2.T + down.bias[e].double()
            out = out.index_add(0, token, y * mix[token, slot, None])
        return out.detach(), list(torch.autograd.grad(out, leaves, self.grad_out.double()))


SHAPE = dict(E=8, D=64, F=96, L=3, T=37, K=3)
SOME: dict[str, dict[str, Any]] = {
    "mixed chunks": dict(chosen=(0, 2, 5), **SHAPE),
    "a chunk without, a chunk of nothing else": dict(chosen=(0, 1, 2, 7), **SHAPE),
    "all, by name": dict(chosen=tuple(range(8)), **SHAPE),
    "one": dict(chosen=(4,), **SHAPE, chunk=8),
    "adapted ones without rows": dict(chosen=(1, 6, 7), **SHAPE, used=5),
    "only adapted ones have rows": dict(chosen=(0, 1, 2), E=8, D=32, F=32, L=2, T=9, K=2, used=3, chunk=8),
    "ranks": dict(chosen=(0, 2, 3, 5), ranks=(5, 1, 9, 2), **SHAPE),
    "ranks of all, empty experts": dict(chosen=tuple(range(8)), ranks=(1, 2, 3, 4, 40, 4, 3, 2), **SHAPE, used=5),
    "one rank, said as ranks": dict(chosen=(1, 2, 6), ranks=(4, 4, 4), **SHAPE, chunk=4),
}


def assert_equal_to_the_oracle(case: SomeCase, ours: tuple[Tensor, dict[str, Tensor]]) -> None:
    (out, grads), (exact, exact_grads) = ours, case.oracle()
    assert relative_error(out, exact) < 1e-5
    for label, wanted in zip(LABELS, exact_grads, strict=True):
        assert relative_error(grads[label], wanted) < 1e-5, label
        assert (grads[label].double() - wanted).mean().abs() < 1e-6 * wanted.abs().max(), f"{label} drifts"


@pytest.mark.parametrize("name", SOME)
def test_forward_and_every_gradient_equal_the_float64_loop(name: str) -> None:
    case = SomeCase(**SOME[name])
    assert_equal_to_the_oracle(case, case.run(expert_block))


@pytest.mark.parametrize("name", ["mixed chunks", "ranks"])
def test_another_choice_of_experts_is_detected(name: str) -> None:
    """Negative control: as many experts, one of them different; and one rank swapped with its neighbour's."""
    case = SomeCase(**SOME[name])
    exact, _ = case.oracle()
    case.chosen = (*case.chosen[:-1], 6)
    assert relative_error(case.run(expert_block)[0], exact) > 1e-2
    case = SomeCase(**SOME[name])
    if case.ranks is not None:
        case.ranks = (case.ranks[1], case.ranks[0], *case.ranks[2:])
        assert relative_error(case.run(expert_block)[0], exact) > 1e-2


def padded_with_zeros(case: SomeCase) -> tuple[LoraFactors, LoraFactors]:
    """The same updates on all experts: zeros where there are none."""
    whole = []
    for factor in case.factors:
        zeros = torch.zeros(len(case.weights.gate_up.bias), *factor.shape[1:])
        zeros[list(case.chosen)] = factor
        whole.append(zeros)
    return LoraFactors(whole[0], whole[1], case.scale), LoraFactors(whole[2], whole[3], case.scale)


@pytest.mark.parametrize(
    "name", ["mixed chunks", "a chunk without, a chunk of nothing else", "adapted ones without rows"]
)
def test_other_experts_are_equal_to_zero_factors(name: str) -> None:
    case = SomeCase(**SOME[name])
    out, _ = case.run(expert_block)
    whole = expert_block(case.x, case.ids, case.mix, case.weights, *padded_with_zeros(case))
    torch.testing.assert_close(out, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("needed", ["x", "mix", "gate_up_a", "down_b"])
def test_only_tensors_that_need_one_get_a_gradient(needed: str) -> None:
    """With only experts adapted the first layer's input needs no gradient, and chunks without them do no work."""
    case = SomeCase(**SOME["a chunk without, a chunk of nothing else"])
    _, grads = case.run(expert_block, (needed,))
    assert relative_error(grads[needed], case.oracle()[1][LABELS.index(needed)]) < 1e-5


def grouped_flops(rows: Any, matrices: Any, *_: Any, **__: Any) -> int:
    """Of `grouped_mm`: 2-D times 3-D (tokens by expert), or 2-D times 2-D (sums over an expert's tokens)."""
    return 2 * rows[0] * rows[1] * matrices[-1]


def flops_of(work: Callable[[], object]) -> int:
    """torch counts everything except grouped products, which it does not support."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_flops})
    with counter:
        work()
    return counter.get_total_flops()


def thin_flops(case: SomeCase, *, adapted_rows: int) -> int:
    """Forward: two products of rank L (padded to whole 16 bytes, 4 floats) per projection and routed token."""
    hidden, width, rank = case.x.shape[1], case.factors[2].shape[-1], 4
    return 2 * adapted_rows * rank * (hidden + 2 * width + width + hidden)


def test_tokens_of_experts_without_lora_skip_the_thin_products() -> None:
    case = SomeCase(**SOME["mixed chunks"])
    updates = padded_with_zeros(case)
    factors = case.factors
    some = LoraFactors(factors[0], factors[1], 2.0), LoraFactors(factors[2], factors[3], 2.0)
    arguments = (case.x, case.ids, case.mix, case.weights)
    base = flops_of(lambda: expert_block(*arguments, None, None))
    whole = flops_of(lambda: expert_block(*arguments, *updates))
    ours = flops_of(lambda: expert_block(*arguments, *some, case.adapted()))
    rows = int(torch.isin(case.ids, torch.tensor(case.chosen)).sum())
    assert 0 < rows < case.ids.numel()
    assert whole - base == thin_flops(case, adapted_rows=case.ids.numel())
    assert ours - base == thin_flops(case, adapted_rows=rows)

    def back(*lora: Any) -> int:
        leaves = [t.clone().requires_grad_() for t in (case.x, case.mix)]
        out = expert_block(leaves[0], case.ids, leaves[1], case.weights, *lora)
        return flops_of(lambda: out.backward(case.grad_out))

    of_rows = lambda some, none: (some - none) / thin_flops(case, adapted_rows=1)  # noqa: E731
    none = back(None, None)
    assert of_rows(back(*updates), none) == 2 * case.ids.numel(), "each thin product again, and its input's gradient"
    assert of_rows(back(*some, case.adapted()), none) == 2 * rows


def test_adapted_experts_of_each_chunk_are_selected() -> None:
    ids = torch.tensor([[5, 1], [1, 5], [6, 1], [2, 7]])
    dispatch = Dispatch.of(ids, 9, 3)
    assert dispatch.counts == [0, 3, 1, 0, 0, 2, 1, 1, 0]
    found = lora_chunks(dispatch, LoraExperts((1, 5, 8), torch.tensor([1, 5, 8])))
    assert found[2] is None, "an expert with LoRA but without routed tokens"
    first, second = found[:2]
    assert first is not None and second is not None and first.routed is not None
    assert first.routed.tolist() == [0, 1, 2]
    assert first.local_experts is not None and first.local_experts.tolist() == [1]
    assert (first.chunk.first, first.chunk.last, first.chunk.counts) == (0, 1, [3])
    assert second.routed is None, "all routed tokens of the chunk go to the expert with LoRA"
    assert second.local_experts is not None and second.local_experts.tolist() == [2]
    assert (second.chunk.start, second.chunk.stop, second.chunk.offsets.tolist()) == (3, 5, [2])


def test_factors_of_differing_ranks_expand_and_collapse() -> None:
    ranks = LoraRanks.of((2, 1, 3), (0.5, 1.0, 2.0), torch.device("cpu"))
    stored = torch.arange(12.0).view(6, 2) + 1
    whole = ranks.expand(stored[2:6], slice(1, 3))
    assert whole.tolist() == [[[5, 6], [0, 0], [0, 0]], [[7, 8], [9, 10], [11, 12]]]
    assert torch.equal(ranks.collapse(whole, slice(1, 3)), stored[2:6])
    assert ranks.rows(slice(1, 3)) == slice(2, 6) and ranks.highest == 3
    assert ranks.scales.tolist() == [0.5, 0.5, 1.0, 2.0, 2.0, 2.0]


def test_without_tokens_on_adapted_experts_the_block_equals_the_base() -> None:
    """Without routed tokens on adapted experts the block equals the base's."""
    case = SomeCase(chosen=(6, 7), **SHAPE, used=5)
    out, grads = case.run(expert_block)
    weights: ExpertWeights = case.weights
    assert torch.equal(out, expert_block(case.x, case.ids, case.mix, weights, None, None))
    assert all(not grads[label].count_nonzero() for label in LABELS[2:])
    assert grads["x"].count_nonzero() and grads["mix"].count_nonzero()
