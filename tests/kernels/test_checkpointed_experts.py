"""A checkpointed layer computes its experts twice, forward and in their own backward pass, not three times."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from allocation import AllocationTracker
from torch import Tensor

from finetune.adapters.attach import attach_adapter
from finetune.adapters.lora import Adapter
from finetune.config.schema import AdapterConfig
from finetune.kernels import experts
from finetune.kernels.dispatch import Dispatch
from finetune.model.build import Base, build_base
from finetune.model.checkpoint import Checkpoint
from finetune.model.forward import checkpoint_activations, hidden_states


@pytest.fixture
def dequantised(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A list that grows by one with every dequantisation, and with every sort of tokens by expert."""
    calls: list[str] = []
    dequantise, sort = experts.dequantise, Dispatch.of

    def counted_dequantise(*args, **kwargs):
        calls.append("dequantise")
        return dequantise(*args, **kwargs)

    def counted_sort(*args):
        calls.append("sort")
        return sort(*args)

    monkeypatch.setattr(experts, "dequantise", counted_dequantise)
    monkeypatch.setattr(Dispatch, "of", counted_sort)
    yield calls


def step(base: Base, adapter: Adapter) -> tuple[list[Tensor], int]:
    """Gradients of all trained parameters, and the most bytes alive at once."""
    ids = torch.arange(200, 500)[None]
    positions = torch.arange(300)[None]
    base.model.train()
    base.model.zero_grad()
    with AllocationTracker() as tracker:
        hidden = hidden_states(base.model, ids, positions, torch.zeros_like(positions))
        (hidden * torch.linspace(-1, 1, hidden.shape[-1])).sum().backward()
    return [parameter.grad.clone() for parameter in adapter.parameters().values()], tracker.peak_bytes


def prepared(directory: Path) -> tuple[Base, Adapter]:
    base = build_base(Checkpoint.open(directory), torch.device("cpu"), torch.float32, experts_per_chunk=4)
    adapter = attach_adapter(base, AdapterConfig(), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapter.parameters().items():
            if name.endswith("b"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return base, adapter


def test_the_experts_run_twice_and_gradients_stay_the_same(tiny_base: Path, dequantised: list[str]) -> None:
    base, adapter = prepared(tiny_base)
    arch = base.checkpoint.arch
    projections = arch.num_layers * 2 * (arch.num_experts // 4)

    def counted() -> tuple[list[Tensor], int, int, int]:
        dequantised.clear()
        grads, peak = step(base, adapter)
        return grads, peak, dequantised.count("dequantise"), dequantised.count("sort")

    plain, plain_peak, plain_calls, plain_sorts = counted()
    checkpoint_activations(base.model)
    ours, peak, calls, sorts = counted()
    base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    usual, usual_peak, usual_calls, usual_sorts = counted()

    assert plain_calls == calls == 2 * projections
    assert usual_calls == 3 * projections, "control: without our contexts the experts run three times"
    assert plain_sorts == sorts == arch.num_layers, "the host waits once a layer, in the forward pass"
    assert usual_sorts == 2 * arch.num_layers
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain, usual, strict=True))
    assert all(grad.abs().sum() > 0 for grad in ours)
    print(f"peak MiB: plain {plain_peak / 2**20:.2f}, checkpointed {peak / 2**20:.2f}, usual {usual_peak / 2**20:.2f}")
    assert peak <= usual_peak < plain_peak


def test_a_recomputed_block_returns_nan(tiny_base: Path) -> None:
    """Accidental use of that output is detected at once."""
    from finetune.kernels.dispatch import checkpoint_contexts

    base, _ = prepared(tiny_base)
    module = base.model.model.layers[0].mlp.experts
    inputs = torch.randn(5, base.checkpoint.arch.hidden), torch.arange(10).view(5, 2) % 4, torch.rand(5, 2)
    _, recomputing = checkpoint_contexts()
    assert module(*inputs).isfinite().all()
    for _ in range(2):  # a context is entered once for every recomputation
        with recomputing:
            assert module(*inputs).isnan().all()
    assert module(*inputs).isfinite().all()
