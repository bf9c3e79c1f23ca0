"""Different ways of computing a step agree; each comparison has a negative control."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from allocation import AllocationTracker
from tolerances import StepNoise, largest_drift, largest_share, step_with_noise
from torch import Tensor
from transformers import AutoModelForCausalLM, Mxfp4Config

from finetune.adapters.attach import attach_adapter
from finetune.config.schema import AdapterConfig, AttentionAdapterConfig, ExpertAdapterConfig, TrainerConfig
from finetune.data.batches import Batch, collate
from finetune.data.harmony.render import Example
from finetune.kernels.experts import ExpertWeights, LoraFactors, Mxfp4Experts, expert_block
from finetune.model.build import build_base
from finetune.model.checkpoint import Checkpoint
from finetune.model.forward import checkpoint_activations
from finetune.mxfp4.format import dequantise
from finetune.objectives.router import balance_loss
from finetune.train.engines.base import single_engine
from finetune.train.optim import make_optimizer
from finetune.train.step import OptimiserStep, StepStats

SMALL = AdapterConfig(
    attention=AttentionAdapterConfig(rank=4, alpha=8.0), experts=ExpertAdapterConfig(rank=4, alpha=8.0)
)


def samples(count: int = 8) -> list[Example]:
    """Random examples of ragged lengths and ragged numbers of trained tokens, with weights other than 0 and 1."""
    rng = np.random.default_rng(7)
    made = []
    for number in range(count):
        length = int(rng.integers(20, 190))
        weights = np.where(rng.random(length) < 0.3, rng.choice([0.5, 1.0], length), 0).astype(np.float32)
        weights[0], weights[-1] = 0, 1
        made.append(Example(rng.integers(0, 199_998, length).astype(np.int32), weights, f"s{number}", f"f:{number}"))
    return made


class Run:
    """A tiny base with a non-zero adapter, so that every factor has a gradient."""

    def __init__(
        self, directory: Path, *, balance: float = 0.0, checkpointed: bool = False, perturb: float = 0.0
    ) -> None:
        self.base = build_base(Checkpoint.open(directory), torch.device("cpu"), torch.float32, experts_per_chunk=3)
        self.adapter = attach_adapter(self.base, SMALL, seed=0)
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in self.adapter.parameters().items():
                if name.endswith("b"):
                    parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.05 + perturb)
        if checkpointed:
            checkpoint_activations(self.base.model)
        config = TrainerConfig(router_balance_coefficient=balance, max_grad_norm=0)
        parameters = self.adapter.parameters()
        optimizer = make_optimizer(parameters, config)
        self.gradients: dict[str, Tensor] = {}
        self.step = OptimiserStep(config, self.base, single_engine(parameters, optimizer, config))

    def __call__(self, batches: list[Batch]) -> StepStats:
        def keep() -> None:
            self.gradients = {
                name: p.grad.clone() for name, p in self.adapter.parameters().items() if p.grad is not None
            }

        return self.step(batches, 1e-3, 1, before_update=keep)


def assert_same(one: Run, other: Run, noise: StepNoise) -> None:
    assert largest_share(one.gradients, other.gradients) <= noise.gradients < 1e-3
    assert largest_drift(one.gradients, other.gradients) <= noise.mean < 1e-4


def test_packed_equals_unpacked(tiny_base: Path) -> None:
    data = samples()
    packed, unpacked, leaking = Run(tiny_base), Run(tiny_base), Run(tiny_base)
    loss = packed([collate([data[:5], data[5:]])]).loss
    wanted, noise = step_with_noise(unpacked, [collate([[sample] for sample in data])])
    assert abs(loss - wanted.loss) <= noise.loss < 1e-3
    assert_same(packed, unpacked, noise)
    joined = collate([data[:5], data[5:]])
    joined.segments.clamp_(max=0)  # every sample sees those before it
    leaking([joined])
    assert largest_share(leaking.gradients, unpacked.gradients) > 1e-2


def test_accumulation_1_x_8_equals_8_x_1(tiny_base: Path) -> None:
    data = samples()
    many, one, mean_of_means = Run(tiny_base), Run(tiny_base), Run(tiny_base)
    loss = many([collate([[sample]]) for sample in data]).loss
    wanted, noise = step_with_noise(one, [collate([[sample] for sample in data])])
    assert abs(loss - wanted.loss) <= noise.loss < 1e-3
    assert_same(many, one, noise)
    # What averaging each micro-step's own mean would give: each sample's weights scaled to the same sum.
    even = [Example(s.ids, s.weights / s.weights.sum(), s.id, s.where) for s in data]
    mean_of_means([collate([[sample]]) for sample in even])
    assert largest_share(mean_of_means.gradients, one.gradients) > 1e-2


def test_a_partial_last_window_has_the_full_gradient(tiny_base: Path) -> None:
    """3 micro-batches instead of the usual 8 are still divided by their own weights."""
    data = samples(3)
    partial, whole = Run(tiny_base), Run(tiny_base)
    partial([collate([[sample]]) for sample in data])
    _, noise = step_with_noise(whole, [collate([data])])
    assert_same(partial, whole, noise)


def test_checkpointing_on_equals_off_with_balance_loss(tiny_base: Path) -> None:
    data = samples(4)
    runs = [Run(tiny_base, balance=0.05, checkpointed=flag) for flag in (True, False)]
    figures = runs[0]([collate([data])])
    wanted, noise = step_with_noise(runs[1], [collate([data])])
    for name in ("loss", "balance_loss"):
        assert abs(figures.terms[name] - wanted.terms[name]) <= noise.terms[name] < 1e-3
    assert_same(*runs, noise)
    without = Run(tiny_base, balance=0.0, checkpointed=True)
    without([collate([data])])
    assert largest_share(without.gradients, runs[1].gradients) > 5e-3 > 20 * noise.gradients, (
        "the balance loss reaches it when checkpointed"
    )
    perturbed = Run(tiny_base, balance=0.05, perturb=1e-3)
    perturbed([collate([data])])
    assert largest_share(perturbed.gradients, runs[1].gradients) > 1e-2


def test_the_step_loss_is_transformers_weighted_mean(tiny_base: Path) -> None:
    data = samples(3)
    run = Run(tiny_base)
    with torch.no_grad():
        for name, parameter in run.adapter.parameters().items():
            if name.endswith("b"):
                parameter.zero_()
    stats, noise = step_with_noise(run, [collate([data[:2], data[2:]])])
    model = AutoModelForCausalLM.from_pretrained(
        tiny_base, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True), attn_implementation="eager"
    ).float()
    total = weight = 0.0
    for sample in data:
        ids = torch.from_numpy(sample.ids).long()
        with torch.no_grad():
            nll = torch.nn.functional.cross_entropy(
                model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none"
            )
        weights = torch.from_numpy(sample.weights[1:])
        total, weight = total + (nll * weights).sum().item(), weight + weights.sum().item()
    assert abs(stats.loss - total / weight) <= noise.loss < 1e-3


class TestBalanceLoss:
    """Against the definition in float64, written without torch's autograd or the project's helpers."""

    def layers(self, seed: int, T: int = 50, E: int = 6, K: int = 2, num: int = 3) -> list[SimpleNamespace]:
        g = torch.Generator().manual_seed(seed)
        made = []
        for _ in range(num):
            router_logits = torch.randn(T, E, generator=g) * 2
            made.append(SimpleNamespace(logits=router_logits, expert_ids=router_logits.topk(K).indices))
        return made

    def oracle(self, layers: list[SimpleNamespace], real: np.ndarray) -> float:
        per_layer = []
        for layer in layers:
            x = layer.logits.double().numpy()[real]
            p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
            E, K = x.shape[1], layer.expert_ids.shape[1]
            f = np.array([(layer.expert_ids.numpy()[real] == e).sum() for e in range(E)]) / (len(x) * K)
            per_layer.append(E * (f * p.mean(0)).sum())
        return float(np.mean(per_layer))

    def test_it_equals_the_definition_without_padding(self) -> None:
        layers = self.layers(0)
        real = np.random.default_rng(0).random(50) < 0.7
        ours = balance_loss(layers, torch.from_numpy(real)).item()
        assert ours == pytest.approx(self.oracle(layers, real), abs=1e-6)
        assert abs(ours - self.oracle(layers, np.ones(50, bool))) > 1e-4, "padding would have changed it"

    def test_it_is_1_and_stationary_when_routing_is_uniform(self) -> None:
        E, T = 4, 8
        router_logits = torch.zeros(T, E, requires_grad=True)
        ids = torch.arange(T * 2).reshape(T, 2) % E
        loss = balance_loss([SimpleNamespace(logits=router_logits, expert_ids=ids)], torch.ones(T, dtype=torch.bool))
        assert loss.item() == pytest.approx(1.0)
        assert torch.autograd.grad(loss, router_logits)[0].abs().max() < 1e-7

    def test_padding_alone_gives_zero_not_nan(self) -> None:
        router_logits = torch.randn(5, 4, requires_grad=True)
        layers = [SimpleNamespace(logits=router_logits, expert_ids=router_logits.topk(2).indices)]
        loss = balance_loss(layers, torch.zeros(5, dtype=torch.bool))
        assert loss.item() == 1.0
        assert torch.autograd.grad(loss, router_logits)[0].count_nonzero() == 0

    def test_opposite_imbalances_in_two_layers_do_not_cancel(self) -> None:
        """transformers pools layers first, so its imbalances cancel."""
        sharp = torch.tensor([[8.0, 8.0, 0, 0]]).expand(10, 4)
        layers = [SimpleNamespace(logits=x, expert_ids=x.topk(2).indices) for x in (sharp, sharp.flip(1))]
        assert balance_loss(layers, torch.ones(10, dtype=torch.bool)).item() > 1.9


class TestMemory:
    """No copy of all experts in bf16 or float32 ever exists: E = 32, hidden != width, both at least 512."""

    E, D, F, L, T, K = 32, 512, 768, 4, 64, 4

    def measure(self, experts_per_chunk: int, *, everything: bool = False) -> AllocationTracker:
        g = torch.Generator().manual_seed(0)

        def packed(out: int, inputs: int) -> Mxfp4Experts:
            blocks = torch.randint(256, (self.E, out, inputs // 32, 16), dtype=torch.uint8, generator=g)
            scales = torch.full(blocks.shape[:-1], 120, dtype=torch.uint8)
            return Mxfp4Experts(blocks, scales, torch.zeros(self.E, out, dtype=torch.bfloat16))

        weights = ExpertWeights(packed(2 * self.F, self.D), packed(self.D, self.F), 7.0, 1.702, experts_per_chunk)

        def factors(out: int, inputs: int) -> LoraFactors:
            a = torch.randn(self.E, self.L, inputs, generator=g, requires_grad=True)
            return LoraFactors(a, torch.zeros(self.E, out, self.L, requires_grad=True), 2.0)

        x = torch.randn(self.T, self.D, generator=g).bfloat16().requires_grad_()
        ids = torch.stack([torch.randperm(self.E, generator=g)[: self.K] for _ in range(self.T)])
        mix = torch.rand(self.T, self.K, generator=g).bfloat16()
        updates = factors(2 * self.F, self.D), factors(self.D, self.F)
        with AllocationTracker() as tracker:
            if everything:
                dense = [dequantise(w.blocks, w.scales, dtype=torch.bfloat16) for w in (weights.gate_up, weights.down)]
                assert len(dense) == 2
            expert_block(x, ids, mix, weights, *updates).sum().backward()
        return tracker

    @property
    def all_experts_bytes(self) -> int:
        return self.E * 3 * self.D * self.F * 2

    def test_peak_is_a_few_chunks(self) -> None:
        tracker = self.measure(experts_per_chunk=2)
        chunk = self.all_experts_bytes * 2 / self.E
        assert tracker.peak_bytes < 0.35 * self.all_experts_bytes
        assert tracker.largest_bytes <= 2 * chunk

    def test_dequantising_everything_is_detected(self) -> None:
        """Negative control: the tracker fails when all experts are dequantised at once."""
        assert self.measure(experts_per_chunk=2, everything=True).peak_bytes > self.all_experts_bytes
        assert self.measure(experts_per_chunk=self.E).peak_bytes > 0.66 * self.all_experts_bytes
