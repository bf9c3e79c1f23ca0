"""Memory options that keep something off the GPU. Skipped where there is no GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_optim import CONFIG, equal, parameters
from torch import nn

from finetune.model.build import build_base, check_unchanged
from finetune.model.checkpoint import Checkpoint
from finetune.model.forward import logits
from finetune.model.storage import BaseStorage, check_storage, storage_table
from finetune.train.optim import PerParameterOptimizer, load_optimizer_tensors, make_optimizer, optimizer_tensors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
GPU = torch.device("cuda")


def on_gpu(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(parameter.detach().to(GPU)) for name, parameter in parameters(dtype).items()}


def stepped(config: Any, dtype: torch.dtype = torch.float32) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    trained = on_gpu(dtype)
    optimizer = make_optimizer(trained, config)
    for step in range(3):
        torch.manual_seed(step)
        for parameter in trained.values():
            parameter.grad = torch.randn(parameter.shape).to(GPU)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        optimizer.step()
    return trained, optimizer


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_states_on_the_host_change_no_bit(kind: Any) -> None:
    here, _ = stepped(replace(CONFIG, optimizer=kind))
    host, optimizer = stepped(replace(CONFIG, optimizer=kind, optimizer_states_on_cpu=True))
    assert equal(here, host)
    assert isinstance(optimizer, PerParameterOptimizer)
    for slot in optimizer.slots:
        moments = [value for key, value in slot.state.items() if key.startswith(("exp_", "state", "absmax"))]
        assert moments and all(moment.device.type == "cpu" and moment.is_pinned() for moment in moments)


@pytest.mark.parametrize("kind", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_states_resume_bit_for_bit(kind: Any, dtype: torch.dtype) -> None:
    config = replace(CONFIG, optimizer=kind)
    trained, optimizer = stepped(config, dtype)
    saved = optimizer_tensors(optimizer, trained)
    copy = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in trained.items()}
    resumed = make_optimizer(copy, config)
    load_optimizer_tensors(resumed, copy, saved)
    for some, its in ((trained, optimizer), (copy, resumed)):
        torch.manual_seed(9)
        for parameter in some.values():
            parameter.grad = torch.randn(parameter.shape).to(GPU)
        its.step()
    assert equal(trained, copy)
    assert equal(optimizer_tensors(optimizer, trained), optimizer_tensors(resumed, copy))


def test_large_states_are_paged() -> None:
    """bitsandbytes pages states of 100,000 elements and more."""
    trained = {"w": nn.Parameter(torch.randn(400, 400, device=GPU))}
    optimizer = make_optimizer(trained, replace(CONFIG, optimizer="paged_adamw"))
    trained["w"].grad = torch.ones_like(trained["w"])
    optimizer.step()
    assert isinstance(optimizer, PerParameterOptimizer)
    state = optimizer.slots[0].state
    assert state["state1"].is_paged and state["state2"].is_paged


def test_the_embedding_stays_on_the_host_and_logits_stay_the_same(tiny_base: Path) -> None:
    ids = torch.arange(100, 300)
    results = []
    for storage in (BaseStorage(), BaseStorage(embedding_on_cpu=True)):
        base = build_base(Checkpoint.open(tiny_base), GPU, torch.bfloat16, 4, storage)
        check_storage(storage_table(base.model), storage)
        with torch.no_grad():
            results.append(logits(base.model, ids))
        check_unchanged(base)
    assert torch.equal(*results)
    assert base.model.model.embed_tokens.weight.device.type == "cpu"


@pytest.mark.parametrize("storage", [BaseStorage(experts="nf4", attention="nf4"), BaseStorage(experts="bfloat16")])
def test_other_storage_formats_equal_the_cpu(tiny_base: Path, storage: BaseStorage) -> None:
    base = build_base(Checkpoint.open(tiny_base), GPU, torch.bfloat16, 4, storage)
    cpu = build_base(Checkpoint.open(tiny_base), torch.device("cpu"), torch.float32, 4, storage)
    ids = torch.arange(100, 300)
    with torch.no_grad():
        ours, exact = logits(base.model, ids).float().cpu(), logits(cpu.model, ids)
    assert ((ours - exact).square().mean().sqrt() / exact.std()) < 0.15
    check_unchanged(base)
