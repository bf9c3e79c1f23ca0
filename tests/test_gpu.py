"""The reference path on a GPU in bfloat16, against float32 on the CPU. Skipped, and said so, where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_kernels_experts import CASES, Case, relative_error

from finetune.adapters.lora import attach_adapter
from finetune.config.schema import AdapterConfig
from finetune.kernels.attention import plan_attention, sink_attention
from finetune.kernels.experts import ExpertWeights, LoraFactors, PackedLinear, expert_block
from finetune.model.build import check_unchanged, load_base
from finetune.model.checkpoint import Checkpoint
from finetune.model.forward import logits
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


def test_the_tiny_model_and_its_frozen_base(tiny_base: Path) -> None:
    base = load_base(Checkpoint.open(tiny_base), GPU, torch.bfloat16, experts_per_chunk=4)
    check_packing(base.model)
    attach_adapter(base, AdapterConfig(), seed=0)
    ids = torch.arange(100, 300)
    with torch.no_grad():
        ours = logits(base.model, ids.to(GPU)).float().cpu()
        cpu = load_base(Checkpoint.open(tiny_base), torch.device("cpu"), torch.float32, experts_per_chunk=4)
        exact = logits(cpu.model, ids)
    assert ((ours - exact).square().mean().sqrt() / exact.std()) < 0.15
    check_unchanged(base)
