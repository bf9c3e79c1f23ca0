"""Reference and fast paths on a GPU in bfloat16, against float32 or float64 on the CPU. Skipped without a GPU."""

from __future__ import annotations

import random
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_expert_block import CASES, Case, relative_error
from test_lora_experts import SOME, SomeCase
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from finetune.adapters.attach import attach_adapter
from finetune.config.schema import AdapterConfig
from finetune.kernels import flash
from finetune.kernels.attention import plan_attention, sink_attention
from finetune.kernels.choice import AttentionDims, choose_attention_kernel, expert_block_of, flash_difference
from finetune.kernels.experts import ExpertWeights, LoraFactors, Mxfp4Experts
from finetune.kernels.flash import flash_sink_attention
from finetune.kernels.loss_head import token_nll
from finetune.model.attention import select_attention_kernel
from finetune.model.build import build_base, check_unchanged
from finetune.model.checkpoint import Checkpoint
from finetune.model.experts import select_expert_kernel
from finetune.model.forward import check_packing, checkpoint_activations, hidden_states, logits
from finetune.model.offload import CheckpointOffload
from finetune.mxfp4.format import dequantise

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
GPU = torch.device("cuda")


def test_dequantise_has_the_same_bits() -> None:
    blocks = torch.randint(256, (4, 64, 3, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (4, 64, 3), dtype=torch.uint8)
    assert torch.equal(dequantise(blocks.to(GPU), scales.to(GPU)).cpu(), dequantise(blocks, scales))


def on_gpu(case: Case) -> tuple[list[Tensor], tuple[LoraFactors, LoraFactors], ExpertWeights]:
    """A case in bfloat16 with factors in float32: leaves x, mix and the factors, updates, weights."""

    def packed(part: Mxfp4Experts) -> Mxfp4Experts:
        return Mxfp4Experts(part.blocks.to(GPU), part.scales.to(GPU), part.bias.to(GPU, torch.bfloat16))

    weights = ExpertWeights(
        packed(case.weights.gate_up), packed(case.weights.down), 7.0, 1.702, case.weights.experts_per_chunk
    )
    inputs = [t.to(GPU, torch.bfloat16).requires_grad_() for t in (case.x, case.mix)]
    factors = [t.to(GPU).requires_grad_() for t in case.factors]
    updates = LoraFactors(factors[0], factors[1], case.scale), LoraFactors(factors[2], factors[3], case.scale)
    return [*inputs, *factors], updates, weights


def run_block(kernel: str, case: Case) -> list[Tensor]:
    """Output and gradients of x, mix and the factors."""
    leaves, updates, weights = on_gpu(case)
    out = expert_block_of(kernel)(leaves[0], case.ids.to(GPU), leaves[1], weights, *updates)
    return [out.detach(), *torch.autograd.grad(out, leaves, case.grad_out.to(GPU, torch.bfloat16))]


@pytest.mark.parametrize("kernel", ["reference", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_expert_block(name: str, kernel: str) -> None:
    case = Case(**CASES[name])
    exact, exact_grads = case.oracle()
    out, *grads = run_block(kernel, case)
    assert relative_error(out.cpu(), exact) < 0.05
    for ours, wanted in zip(grads, exact_grads, strict=True):
        assert relative_error(ours.cpu(), wanted) < 0.05
        assert ((ours.cpu().double() - wanted).mean() / wanted.abs().max()).abs() < 5e-3


@pytest.mark.parametrize("kernel", ["reference", "triton"])
@pytest.mark.parametrize("name", SOME)
def test_lora_on_some_experts_and_of_differing_ranks(name: str, kernel: str) -> None:
    case = SomeCase(**SOME[name])
    exact, exact_grads = case.oracle()
    leaves, updates, weights = on_gpu(case)
    ids, adapted = case.ids.to(GPU), case.adapted(GPU)
    out = expert_block_of(kernel)(leaves[0], ids, leaves[1], weights, *updates, adapted)
    grads = torch.autograd.grad(out, leaves, case.grad_out.to(GPU, torch.bfloat16))
    for ours, wanted in zip((out.detach(), *grads), (exact, *exact_grads), strict=True):
        assert relative_error(ours.cpu(), wanted) < 0.05


@pytest.mark.parametrize("seed", range(12))
def test_fused_experts_over_random_shapes(seed: int) -> None:
    choose = random.Random(seed)
    experts = choose.randint(2, 12)
    shape = dict(E=experts, D=32 * choose.randint(1, 24), F=32 * choose.randint(1, 24), L=choose.randint(1, 64))
    case = Case(**shape, T=choose.randint(1, 300), K=choose.randint(1, experts), chunk=choose.randint(1, 12))
    exact, exact_grads = case.oracle()
    fused, reference = run_block("triton", case), run_block("reference", case)
    for ours, other, wanted in zip(fused, reference, (exact, *exact_grads), strict=True):
        scale = wanted.square().mean().sqrt()
        error, usual = ((t.cpu().double() - wanted).square().mean().sqrt() / scale for t in (ours, other))
        assert error < max(1.5 * usual, 0.01), "no further from float64 than the reference in bfloat16 is"
        assert (ours.cpu().double() - wanted).mean().abs() < 5e-3 * wanted.abs().max()


def test_fused_experts_at_the_published_widths() -> None:
    """2,880 wide, 8 experts, most routed tokens on one of them: the kernels with the tiles of a real layer."""
    case = Case(E=8, D=2880, F=2880, L=16, T=700, K=2, used=3, chunk=4)
    exact, exact_grads = case.oracle()
    for ours, wanted in zip(run_block("triton", case), (exact, *exact_grads), strict=True):
        error = (ours.cpu().double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
        assert error < 0.03


def test_fused_experts_give_the_same_bits_and_a_swap_is_detected() -> None:
    case = Case(E=8, D=96, F=160, L=5, T=200, K=3)
    first, second = run_block("triton", case), run_block("triton", case)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    case.ids[0] = case.ids[0].flip(0)
    other = run_block("triton", case)
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("name", [None, "mixed chunks", "ranks"])
def test_fused_experts_synchronise_once_forward_and_never_backward(name: str | None) -> None:
    case = Case(E=8, D=96, F=160, L=5, T=200, K=3) if name is None else SomeCase(**SOME[name])
    adapted = case.adapted(GPU) if isinstance(case, SomeCase) else None
    leaves, updates, weights = on_gpu(case)
    ids, grad_out = case.ids.to(GPU), case.grad_out.to(GPU, torch.bfloat16)
    expert_block_of("triton")(leaves[0], ids, leaves[1], weights, *updates, adapted).backward(grad_out)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            out = expert_block_of("triton")(leaves[0], ids, leaves[1], weights, *updates, adapted)
        torch.cuda.set_sync_debug_mode("error")
        out.backward(grad_out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in waits if "synchroniz" in str(w.message)]) == 1


@pytest.mark.parametrize("rank", [0, 16, 33])
def test_augmented_weights_have_the_same_bits(rank: int) -> None:
    from finetune.kernels import experts_triton as launch

    blocks = torch.randint(256, (4, 64, 90, 16), dtype=torch.uint8)
    scales = torch.randint(256, (4, 64, 90), dtype=torch.uint8)
    bias, b = torch.randn(4, 64).bfloat16(), torch.randn(4, 64, rank) if rank else None
    out = torch.full((4, 64, 2880 + launch.padding(rank)), 7.0, dtype=torch.bfloat16, device=GPU)
    launch.dequantise_augment(blocks.to(GPU), scales.to(GPU), bias.to(GPU), None if b is None else b.to(GPU), out)
    assert torch.equal(out[..., :2880].cpu(), dequantise(blocks, scales, torch.bfloat16))
    assert b is None or torch.equal(out[..., 2880 : 2880 + rank].cpu(), b.bfloat16())
    assert torch.equal(out[..., 2880 + rank].cpu(), bias)
    assert out[..., 2881 + rank :].count_nonzero() == 0


def test_fused_experts_are_chosen_on_this_gpu(tiny_base: Path) -> None:
    base = build_base(Checkpoint.open(tiny_base), GPU, torch.bfloat16, experts_per_chunk=4)
    choice = select_expert_kernel(base.model, "auto")
    capable = torch.cuda.get_device_capability() >= (8, 0)
    assert choice.kernel == ("triton" if capable else "reference"), choice.describe()


def test_a_checkpointed_model_with_fused_experts_has_the_reference_gradients(tiny_base: Path) -> None:
    grads = {}
    for kernel in ("reference", "triton"):
        base = build_base(Checkpoint.open(tiny_base), GPU, torch.bfloat16, experts_per_chunk=4)
        adapter = attach_adapter(base, AdapterConfig(), seed=0)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in adapter.parameters().items():
                if name.endswith("b"):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        assert select_expert_kernel(base.model, kernel).kernel == kernel
        checkpoint_activations(base.model)
        base.model.train()
        positions = torch.arange(300)[None]
        hidden = hidden_states(base.model, torch.arange(200, 500)[None], positions, torch.zeros_like(positions))
        hidden.float().square().sum().backward()
        grads[kernel] = torch.cat([p.grad.float().flatten() for p in adapter.parameters().values()])
    ours, other = grads["triton"], grads["reference"]
    cosine = torch.nn.functional.cosine_similarity(ours, other, dim=0)
    assert cosine > 0.99 and abs(ours.norm() / other.norm() - 1) < 0.02


def test_attention() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(600, heads, 64, generator=g) for heads in (8, 2, 2))
    sinks = torch.randn(8, generator=g)
    segments, positions = torch.arange(600)[None] // 200, torch.arange(600)[None] % 200
    for window in (None, 128):
        plan = plan_attention(segments, positions, window)
        exact = sink_attention(q, k, v, sinks, plan, 0.125)
        half = [t.to(GPU, torch.bfloat16) for t in (q, k, v, sinks)]
        assert relative_error(sink_attention(*half, plan.to(GPU), 0.125).cpu(), exact.double()) < 0.03


@pytest.mark.parametrize("shape", [AttentionDims(64, 8, 64, 128), AttentionDims(4, 2, 32, 24)])
def test_flash_attention_is_chosen_and_equals_the_reference(shape: AttentionDims) -> None:
    """Ragged segments, one-token ones, a shared prefix, both kinds of layer; output and every gradient."""
    choice = choose_attention_kernel("auto", shape, GPU, torch.bfloat16)
    assert choice.kernel == "flash", choice.reason
    assert max(flash_difference(shape, GPU, torch.bfloat16, seed=seed) for seed in range(3)) < 0.01


def test_flash_attention_without_its_sink_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "with_sinks", lambda out, lse, sinks: (out, lse))
    assert choose_attention_kernel("auto", AttentionDims(64, 8, 64, 128), GPU, torch.bfloat16).kernel == "reference"


@pytest.mark.parametrize("lengths", [(1, 1, 1), (1, 5000, 300), (4096,)])
def test_flash_attention_against_float32_without_synchronising(lengths: tuple[int, ...]) -> None:
    count = sum(lengths)
    segments = torch.repeat_interleave(torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    g = torch.Generator(GPU).manual_seed(0)
    sizes = [(count, 64, 64), (count, 8, 64), (count, 8, 64), (64,)]
    leaves = [torch.randn(size, generator=g, device=GPU).bfloat16().requires_grad_() for size in sizes]
    grad_out = torch.randn(sizes[0], generator=g, device=GPU).bfloat16()
    exact_leaves = [leaf.detach().float().requires_grad_() for leaf in leaves]
    for window in (None, 128):
        plan = plan_attention(segments, positions, window).to(GPU)
        exact = sink_attention(*exact_leaves, plan, 0.125)
        exact_grads = torch.autograd.grad(exact, exact_leaves, grad_out.float())
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = flash_sink_attention(*leaves, plan, 0.125)
            grads = torch.autograd.grad(out, leaves, grad_out)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for ours, wanted in zip((out, *grads), (exact, *exact_grads), strict=True):
            error = (ours.double() - wanted.double()).square().mean().sqrt() / wanted.double().square().mean().sqrt()
            assert error < 0.015
            assert (ours.double() - wanted.double()).mean().abs() < 1e-3 * wanted.abs().max()


def test_bfloat16_logits_are_not_rounded() -> None:
    g = torch.Generator().manual_seed(1)
    hidden = (5 * torch.randn(600, 64, generator=g)).bfloat16().to(GPU).requires_grad_()
    head = torch.randn(5000, 64, generator=g).bfloat16().to(GPU)
    targets = torch.randint(5000, (600,), generator=g).to(GPU)
    exact = F.cross_entropy(hidden.double() @ head.double().T, targets, reduction="none")
    ours = token_nll(hidden, head, targets)
    rounded = F.cross_entropy((hidden @ head.T).double(), targets, reduction="none")
    assert (ours - exact).abs().max() < 1e-3 < 1e-2 < (rounded - exact).abs().max()
    wanted = torch.autograd.grad(exact.sum(), hidden)[0].double()
    found = torch.autograd.grad(ours.sum(), hidden)[0].double()
    assert (found - wanted).square().mean().sqrt() < 0.01 * wanted.square().mean().sqrt()


def test_offloaded_checkpoints_give_the_same_bits_and_take_less_memory() -> None:
    """Sixteen checkpointed layers: at most two inputs on the GPU at a time instead of all."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(1024, 1024, device=GPU, dtype=torch.bfloat16) for _ in range(16)]
    x = torch.randn(1, 8192, 1024, device=GPU, dtype=torch.bfloat16, requires_grad=True)

    def run(context: AbstractContextManager[object]) -> tuple[list[torch.Tensor], int]:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with context:
            hidden = x
            for layer in layers:
                hidden = checkpoint(lambda h, layer=layer: h + torch.tanh(layer(h)), hidden, use_reentrant=False)
        held = torch.cuda.memory_allocated() - before
        grads = torch.autograd.grad(hidden.float().square().mean(), [x, *(layer.weight for layer in layers)])
        return list(grads), held

    plain, plain_held = run(nullcontext())
    moved, moved_held = run(CheckpointOffload(GPU, 1024, torch.bfloat16))
    assert all(torch.equal(a, b) for a, b in zip(plain, moved, strict=True))
    one = x.numel() * x.element_size()
    assert plain_held > 14 * one and moved_held < 4 * one


def test_the_tiny_model_and_its_frozen_base(tiny_base: Path) -> None:
    base = build_base(Checkpoint.open(tiny_base), GPU, torch.bfloat16, experts_per_chunk=4)
    select_attention_kernel(base.model, "flash")
    check_packing(base.model)
    attach_adapter(base, AdapterConfig(), seed=0)
    ids = torch.arange(100, 300)
    with torch.no_grad():
        ours = logits(base.model, ids.to(GPU)).float().cpu()
        cpu = build_base(Checkpoint.open(tiny_base), torch.device("cpu"), torch.float32, experts_per_chunk=4)
        exact = logits(cpu.model, ids)
    assert ((ours - exact).square().mean().sqrt() / exact.std()) < 0.15
    check_unchanged(base)
