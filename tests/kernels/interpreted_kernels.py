"""The fused expert block on a CPU, in Triton's interpreter.

`test_triton.py` runs this file in a process of its own, because TRITON_INTERPRET counts at import:
`TRITON_INTERPRET=1 python -m pytest --noconftest tests/kernels/interpreted_kernels.py`.
"""

from __future__ import annotations

import random

import pytest
import torch
from allocation import AllocationTracker
from test_expert_block import CASES, Case, relative_error
from test_lora_experts import SOME, SomeCase
from test_lora_experts import assert_equal_to_the_oracle as assert_some_equal
from torch import Tensor

from finetune.kernels import experts_fused, experts_triton
from finetune.kernels.choice import LARGEST_EXPERT_DIFFERENCE, triton_difference
from finetune.kernels.experts import ExpertWeights, FrozenExperts, LoraFactors, Mxfp4Experts, expert_block
from finetune.kernels.experts_fused import fused_expert_block
from finetune.kernels.rotary import rotate
from finetune.mxfp4.format import dequantise

LABELS = ("x", "mix", "gate_up_a", "gate_up_b", "down_a", "down_b")


@pytest.fixture
def wide_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide tiles: the interpreter's time depends on the number of programs, not on their size."""
    for name, size in {"ROWS": 64, "WORDS": 4096, "UNROLL": 1, "TAIL_ELEMENTS": 65536}.items():
        monkeypatch.setattr(experts_triton, name, size)


def fused(case: Case, *, gate_up: bool = True, down: bool = True, block=fused_expert_block) -> tuple[Tensor, dict]:
    leaves = [t.clone().requires_grad_() for t in (case.x, case.mix, *case.factors)]
    x, mix, ga, gb, da, db = leaves
    updates = LoraFactors(ga, gb, case.scale) if gate_up else None, LoraFactors(da, db, case.scale) if down else None
    out = block(x, case.ids, mix, case.weights, *updates)
    grads = torch.autograd.grad(out, leaves, case.grad_out.to(out.dtype), allow_unused=True)
    return out.detach(), dict(zip(LABELS, grads, strict=True))


def assert_equal_to_the_oracle(case: Case, ours: tuple[Tensor, dict]) -> None:
    (out, grads), (exact, exact_grads) = ours, case.oracle()
    assert relative_error(out, exact) < 1e-5
    for (label, grad), wanted in zip(grads.items(), exact_grads, strict=True):
        assert relative_error(grad, wanted) < 1e-5, label
        assert (grad.double() - wanted).mean().abs() < 1e-6 * wanted.abs().max(), f"{label} drifts to one side"


@pytest.mark.parametrize("rank", [0, 1, 31, 32, 40, 64])
def test_weights_lora_and_bias_are_in_their_columns(rank: int) -> None:
    """Random bytes under every scale byte, those of infinities included; tiles as on a GPU, the last partly outside."""
    blocks = torch.randint(256, (2, 46, 3, 16), dtype=torch.uint8)
    scales = torch.arange(276).view(2, 46, 3).to(torch.uint8)
    bias, b = torch.randn(2, 46), torch.randn(2, 46, rank) if rank else None
    out = torch.full((2, 46, 96 + experts_triton.padding(rank)), 7.0)
    experts_triton.dequantise_augment(blocks, scales, bias, b, out)
    wanted = dequantise(blocks, scales, torch.float32)
    assert torch.equal(out[..., :96], wanted) and torch.equal(out[..., :96].signbit(), wanted.signbit())
    assert wanted.isinf().any() and (wanted.abs() < 2.0**-126).any()
    assert b is None or torch.equal(out[..., 96 : 96 + rank], b)
    assert torch.equal(out[..., 96 + rank], bias)
    assert out[..., 97 + rank :].count_nonzero() == 0
    blocks[1, 45, 2, 15] ^= 0x10
    experts_triton.dequantise_augment(blocks, scales, bias, b, out)
    assert (out[..., :96] != wanted).sum() == 1, "control: one bit of the last byte is seen, in one value"


def test_dequantised_bfloat16_has_the_same_bits() -> None:
    blocks = torch.randint(256, (2, 40, 3, 16), dtype=torch.uint8)
    scales = torch.randint(90, 140, (2, 40, 3), dtype=torch.uint8)
    out = torch.empty(2, 40, 96 + 32, dtype=torch.bfloat16)
    experts_triton.dequantise_augment(blocks, scales, torch.zeros(2, 40), None, out)
    assert torch.equal(out[..., :96], dequantise(blocks, scales, torch.bfloat16))


@pytest.mark.parametrize("heads,half", [(1, 32), (3, 32), (5, 12)])
def test_rotary_positions_equal_float64(heads: int, half: int) -> None:
    x, grad_out = torch.randn(37, heads, 2 * half), torch.randn(37, heads, 2 * half)
    angles = torch.rand(37, half) * 6
    cos, sin = angles.cos(), angles.sin()
    results = []
    for fused, dtype in ((True, torch.float32), (False, torch.float64)):
        leaf = x.to(dtype).requires_grad_()
        out = rotate(leaf, cos.to(dtype), sin.to(dtype), fused=fused)
        results.append([out.detach(), *torch.autograd.grad(out, leaf, grad_out.to(dtype))])
    for ours, exact in zip(*results, strict=True):
        assert (ours.double() - exact).abs().max() < 1e-6
    turned_back = rotate(results[0][0], cos, -sin, fused=True)
    assert (turned_back - x).abs().max() < 1e-6
    assert (rotate(x, cos, -sin, fused=True) - results[0][0]).abs().max() > 0.1, "control: the direction is seen"
    narrow = rotate(x.bfloat16(), cos, sin, fused=True).float()
    assert (narrow - rotate(x.bfloat16().float(), cos, sin)).abs().max() < 2**-7 * 6, "rounded once"


@pytest.mark.parametrize("name", ["square", "empty experts in a visited chunk", "one token"])
def test_forward_and_every_gradient_equal_the_float64_loop(name: str, wide_tiles: None) -> None:
    case = Case(**CASES[name])
    assert_equal_to_the_oracle(case, fused(case))


@pytest.mark.parametrize("seed", range(6))
def test_random_shapes(seed: int, wide_tiles: None) -> None:
    choose = random.Random(seed)
    experts = choose.randint(2, 7)
    shape = dict(E=experts, D=32 * choose.randint(1, 6), F=32 * choose.randint(1, 6), L=choose.randint(1, 64))
    case = Case(**shape, T=choose.randint(1, 40), K=choose.randint(1, experts), chunk=choose.randint(2, 8))
    assert_equal_to_the_oracle(case, fused(case))


def test_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles along every axis, the last of each partly outside, as with large layers on a GPU."""
    sizes = {"ROWS": 4, "COLUMNS": 64, "PAIR_COLUMNS": 32, "WORDS": 256, "UNROLL": 2, "TAIL_ELEMENTS": 1024}
    for name, size in sizes.items():
        monkeypatch.setattr(experts_triton, name, size)
    case = Case(E=2, D=96, F=160, L=33, T=5, K=2)
    assert_equal_to_the_oracle(case, fused(case))


def test_one_hot_expert_and_ties(wide_tiles: None) -> None:
    """All router logits equal: every token takes the same experts with the same weights."""
    case = Case(E=6, D=64, F=96, L=4, T=37, K=3)
    values, case.ids = torch.zeros(37, 6).topk(3)
    case.mix = values.softmax(-1)
    assert len(case.ids.unique()) == 3
    assert_equal_to_the_oracle(case, fused(case))
    one = Case(E=6, D=64, F=96, L=4, T=37, K=1, used=1)
    assert_equal_to_the_oracle(one, fused(one))


def test_the_same_bits_from_run_to_run(wide_tiles: None) -> None:
    case = Case(E=4, D=64, F=96, L=3, T=21, K=3)
    (out, grads), (again, grads_again) = fused(case), fused(case)
    assert torch.equal(out, again)
    assert all(torch.equal(grads[label], grads_again[label]) for label in LABELS)


@pytest.mark.parametrize("what", ["nibbles", "bias", "ids", "scale"])
def test_a_small_mistake_is_detected(what: str, wide_tiles: None) -> None:
    """Negative controls: the oracle of a slightly different layer is far from the kernel."""
    case = Case(**CASES["square"])
    out, grads = fused(case)
    if what == "nibbles":
        blocks = case.weights.down.blocks
        blocks[:, :, 0, 0] = (blocks[:, :, 0, 0] << 4) | (blocks[:, :, 0, 0] >> 4)
    elif what == "bias":
        case.weights.down.bias[0, 0] += 0.5
    elif what == "ids":
        case.ids[0] = case.ids[0].flip(0)
    else:
        case.scale *= 1.001
    exact, exact_grads = case.oracle()
    assert relative_error(out, exact) > 1e-4
    assert relative_error(grads["mix"], exact_grads[1]) > 1e-4


@pytest.mark.parametrize(("gate_up", "down"), [(False, False), (True, False), (False, True)])
def test_lora_on_one_projection_or_none(gate_up: bool, down: bool, wide_tiles: None) -> None:
    case = Case(E=4, D=64, F=96, L=3, T=21, K=3)
    out, grads = fused(case, gate_up=gate_up, down=down)
    wanted, wanted_grads = fused(case, gate_up=gate_up, down=down, block=expert_block)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    for label in LABELS:
        assert (grads[label] is None) == (wanted_grads[label] is None), label
        if grads[label] is not None:
            assert relative_error(grads[label], wanted_grads[label].double()) < 1e-5, label


@pytest.mark.parametrize("needed", ["x", "mix", "gate_up_a", "down_b"])
def test_only_tensors_that_need_one_get_a_gradient(needed: str, wide_tiles: None) -> None:
    case = Case(E=4, D=32, F=32, L=2, T=6, K=2)
    tensors = dict(zip(LABELS, (case.x, case.mix, *case.factors), strict=True))
    leaf = tensors[needed].clone().requires_grad_()
    x, mix, ga, gb, da, db = (leaf if label == needed else tensor for label, tensor in tensors.items())
    updates = LoraFactors(ga, gb, case.scale), LoraFactors(da, db, case.scale)
    out = fused_expert_block(x, case.ids, mix, case.weights, *updates)
    (grad,) = torch.autograd.grad(out, leaf, case.grad_out)
    assert relative_error(grad, case.oracle()[1][LABELS.index(needed)]) < 1e-5


@pytest.mark.parametrize("block", [expert_block, fused_expert_block])
def test_one_factor_for_all_experts(block, wide_tiles: None) -> None:
    """A shared A is one [1, L, in] seen E times; its gradient is the sum."""
    case = Case(E=5, D=64, F=32, L=3, T=21, K=3)
    shared = case.factors[0][:1].clone().requires_grad_()
    case.factors[0] = case.factors[0][:1].expand(5, -1, -1)
    ga, gb, da, db = shared.expand(5, -1, -1), *case.factors[1:]
    updates = LoraFactors(ga, gb, case.scale), LoraFactors(da, db, case.scale)
    out = block(case.x, case.ids, case.mix, case.weights, *updates)
    exact, exact_grads = case.oracle()
    assert relative_error(out.detach(), exact) < 1e-5
    (grad,) = torch.autograd.grad(out, shared, case.grad_out)
    assert relative_error(grad, exact_grads[2].sum(0, keepdim=True)) < 1e-5


@pytest.mark.parametrize("name", SOME)
def test_lora_on_some_experts_and_of_differing_ranks(name: str, wide_tiles: None) -> None:
    case = SomeCase(**SOME[name])
    assert_some_equal(case, case.run(fused_expert_block))


@pytest.mark.parametrize("needed", ["x", "mix", "gate_up_b", "down_a"])
def test_only_tensors_that_need_one_get_a_gradient_with_some_experts(needed: str, wide_tiles: None) -> None:
    case = SomeCase(**SOME["a chunk without, a chunk of nothing else"])
    _, grads = case.run(fused_expert_block, (needed,))
    assert relative_error(grads[needed], case.oracle()[1][LABELS.index(needed)]) < 1e-5


def test_a_chunk_without_lora_has_no_columns_for_it(monkeypatch: pytest.MonkeyPatch, wide_tiles: None) -> None:
    """Rank 40: 96 + 64 columns in a row of weights with LoRA, 96 + 32 where only the bias is added."""
    seen: list[tuple[int, bool]] = []
    kept = experts_triton.dequantise_augment

    def watched(blocks: Tensor, scales: Tensor, bias: Tensor, b: Tensor | None, out: Tensor) -> Tensor:
        seen.append((out.shape[2], b is not None))
        return kept(blocks, scales, bias, b, out)

    monkeypatch.setattr(experts_triton, "dequantise_augment", watched)
    case = SomeCase(chosen=(0, 1), E=6, D=96, F=96, L=40, T=20, K=3)
    assert_some_equal(case, case.run(fused_expert_block))
    assert set(seen) == {(96 + 64, True), (96 + 32, False)} and len(seen) == 8


class Dense:
    """Experts in another storage format than MXFP4."""

    def __init__(self, packed: Mxfp4Experts) -> None:
        self.weight, self.bias = dequantise(packed.blocks, packed.scales, torch.float32), packed.bias

    def dequantised(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        return self.weight[first:last].to(dtype)


def test_experts_in_another_storage_format(wide_tiles: None) -> None:
    case = Case(**CASES["square"])
    out, grads = fused(case)
    held: list[FrozenExperts] = [Dense(case.weights.gate_up), Dense(case.weights.down)]
    case.weights = ExpertWeights(*held, case.weights.limit, case.weights.gain, case.weights.experts_per_chunk)
    other, other_grads = fused(case)
    assert torch.equal(out, other)
    assert all(torch.equal(grads[label], other_grads[label]) for label in LABELS)


def test_bfloat16(wide_tiles: None) -> None:
    """The interpreter truncates where a GPU rounds, so this limit is wide; those of the GPU tests are not."""
    case = Case(E=4, D=64, F=64, L=3, T=40, K=2)
    case.x, case.mix = case.x.bfloat16(), case.mix.bfloat16()
    halves = (Mxfp4Experts(p.blocks, p.scales, p.bias.bfloat16()) for p in (case.weights.gate_up, case.weights.down))
    case.weights = ExpertWeights(*halves, case.weights.limit, case.weights.gain, 2)
    (out, grads), (exact, exact_grads) = fused(case), case.oracle()
    assert out.dtype == torch.bfloat16 and grads["down_b"].dtype == torch.float32
    for ours, wanted in zip((out, *grads.values()), (exact, *exact_grads), strict=True):
        error = (ours.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
        print(f"relative RMS {error:.4f}")
        assert error < 0.05


def test_a_chunk_is_dequantised_once_per_pass(monkeypatch: pytest.MonkeyPatch, wide_tiles: None) -> None:
    calls: list[str] = []
    for module, names in (
        (experts_triton, ("dequantise_augment", "gather", "swiglu", "swiglu_backward", "combine")),
        (experts_fused, ("grouped", "grouped_outer")),
    ):
        for name in names:
            kept = getattr(module, name)
            counted = lambda *args, _kept=kept, _name=name: (calls.append(_name), _kept(*args))[1]  # noqa: E731
            monkeypatch.setattr(module, name, counted)
    case = Case(E=6, D=32, F=32, L=2, T=30, K=2, chunk=3)
    leaves = [t.clone().requires_grad_() for t in (case.x, case.mix, *case.factors)]
    updates = LoraFactors(leaves[2], leaves[3], 2.0), LoraFactors(leaves[4], leaves[5], 2.0)
    out = fused_expert_block(leaves[0], case.ids, leaves[1], case.weights, *updates)
    forward = {name: calls.count(name) for name in set(calls)}
    calls.clear()
    out.backward(case.grad_out)
    backward = {name: calls.count(name) for name in set(calls)}
    # Two chunks each: the two large products and the two thin ones of the updates' A ...
    assert forward == {"dequantise_augment": 4, "gather": 2, "swiglu": 2, "grouped": 8, "combine": 1}
    # ... and going back gate_up again, dY W and dH W (large), A of both updates twice, and four of the factors'.
    assert backward == {
        "dequantise_augment": 4, "gather": 4, "swiglu_backward": 2, "grouped": 14, "grouped_outer": 8, "combine": 1,
    }  # fmt: skip


def test_memory_is_one_chunk_of_scratch_that_is_reused(wide_tiles: None) -> None:
    experts_fused._SCRATCH.clear()
    case = Case(E=16, D=128, F=192, L=4, T=8, K=2, chunk=2)
    chunk = 2 * (2 * 192 * (128 + 32) + 128 * (192 + 32)) * 4
    with AllocationTracker() as tracker:
        out, _ = fused(case)
    (scratch,) = experts_fused._SCRATCH.values()
    assert scratch.nbytes == chunk == tracker.largest_bytes
    kept = scratch.data_ptr()
    again, _ = fused(case)
    (scratch,) = experts_fused._SCRATCH.values()
    assert scratch.data_ptr() == kept and torch.equal(out, again)


def test_the_comparison_at_start_up(monkeypatch: pytest.MonkeyPatch, wide_tiles: None) -> None:
    """The comparison of `choose_expert_kernel`, here in float32; a kernel that is slightly wrong fails it."""
    cpu = torch.device("cpu")
    assert triton_difference(cpu, torch.float32) < 1e-5
    right = experts_triton.swiglu
    monkeypatch.setattr(experts_triton, "swiglu", lambda h, limit, gain, rank: right(h, limit, gain * 1.5, rank))
    assert triton_difference(cpu, torch.float32) > LARGEST_EXPERT_DIFFERENCE
