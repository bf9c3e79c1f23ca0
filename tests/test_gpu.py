"""Reference and fast paths on a GPU in bfloat16, against float32 or float64 on the CPU. Skipped where there is none."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_kernels_experts import CASES, Case, relative_error
from torch.utils.checkpoint import checkpoint

from finetune.adapters.lora import attach_adapter
from finetune.config.schema import AdapterConfig
from finetune.kernels import flash
from finetune.kernels.attention import plan_attention, sink_attention
from finetune.kernels.attention_choice import AttentionShape, choose_attention, flash_difference
from finetune.kernels.experts import ExpertWeights, LoraFactors, PackedLinear, expert_block
from finetune.kernels.flash import flash_sink_attention
from finetune.kernels.loss_head import token_nll
from finetune.model.attention import select_attention
from finetune.model.build import check_unchanged, load_base
from finetune.model.checkpoint import Checkpoint
from finetune.model.forward import logits
from finetune.model.offload import CheckpointOffload
from finetune.model.selftest import check_packing
from finetune.mxfp4.format import dequantise

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
GPU = torch.device("cuda")


def test_dequantise_has_the_same_bits() -> None:
    blocks = torch.randint(256, (4, 64, 3, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (4, 64, 3), dtype=torch.uint8)
    assert torch.equal(dequantise(blocks.to(GPU), scales.to(GPU)).cpu(), dequantise(blocks, scales))


@pytest.mark.parametrize("name", CASES)
def test_expert_block(name: str) -> None:
    case = Case(**CASES[name])
    exact, exact_grads = case.oracle()

    def packed(part: PackedLinear) -> PackedLinear:
        return PackedLinear(part.blocks.to(GPU), part.scales.to(GPU), part.bias.to(GPU, torch.bfloat16))

    weights = ExpertWeights(
        packed(case.weights.gate_up), packed(case.weights.down), 7.0, 1.702, case.weights.experts_per_chunk
    )
    leaves = [t.to(GPU).requires_grad_() for t in case.factors]
    x = case.x.to(GPU, torch.bfloat16).requires_grad_()
    mix = case.mix.to(GPU, torch.bfloat16).requires_grad_()
    updates = LoraFactors(leaves[0], leaves[1], case.scale), LoraFactors(leaves[2], leaves[3], case.scale)
    out = expert_block(x, case.ids.to(GPU), mix, weights, *updates)
    grads = torch.autograd.grad(out, [x, mix, *leaves], case.grad_out.to(GPU, torch.bfloat16))
    assert relative_error(out.cpu(), exact) < 0.05
    for ours, wanted in zip(grads, exact_grads, strict=True):
        assert relative_error(ours.cpu(), wanted) < 0.05
        assert ((ours.cpu().double() - wanted).mean() / wanted.abs().max()).abs() < 5e-3


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


@pytest.mark.parametrize("shape", [AttentionShape(64, 8, 64, 128), AttentionShape(4, 2, 32, 24)])
def test_flash_attention_is_chosen_and_equals_the_reference(shape: AttentionShape) -> None:
    """Ragged segments, one-token ones, a shared prefix, both kinds of layer; output and every gradient."""
    choice = choose_attention("auto", shape, GPU, torch.bfloat16)
    assert choice.kernel == "flash", choice.reason
    assert max(flash_difference(shape, GPU, torch.bfloat16, seed=seed) for seed in range(3)) < 0.01


def test_flash_attention_without_its_sink_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "with_sinks", lambda out, lse, sinks: (out, lse))
    assert choose_attention("auto", AttentionShape(64, 8, 64, 128), GPU, torch.bfloat16).kernel == "reference"


@pytest.mark.parametrize("lengths", [(1, 1, 1), (1, 5000, 300), (4096,)])
def test_flash_attention_against_float32_without_waiting_for_the_device(lengths: tuple[int, ...]) -> None:
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
    base = load_base(Checkpoint.open(tiny_base), GPU, torch.bfloat16, experts_per_chunk=4)
    select_attention(base.model, "flash")
    check_packing(base.model)
    attach_adapter(base, AdapterConfig(), seed=0)
    ids = torch.arange(100, 300)
    with torch.no_grad():
        ours = logits(base.model, ids.to(GPU)).float().cpu()
        cpu = load_base(Checkpoint.open(tiny_base), torch.device("cpu"), torch.float32, experts_per_chunk=4)
        exact = logits(cpu.model, ids)
    assert ((ours - exact).square().mean().sqrt() / exact.std()) < 0.15
    check_unchanged(base)
