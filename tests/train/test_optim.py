"""Optimisers against torch's and bitsandbytes' own, bfloat16 updates against exact sums, and their states on disk."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from finetune.config.schema import TrainerConfig
from finetune.errors import ConfigError, MachineError
from finetune.train.optim import (
    PerParameterOptimizer,
    check_optimizer,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    round_stochastically,
    state_bytes,
)

CONFIG = TrainerConfig(learning_rate=1e-2, weight_decay=0.1)
SIZES = {"a": (8, 700), "b": (64, 65), "c": (3, 5)}  # 5600 and 4160 elements take 8-bit moments, 15 do not


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for name, size in SIZES.items()}


def train(trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: range, rate: float = 1e-2) -> None:
    """Make steps whose gradients depend on the step number."""
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in trained.values():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = None
            (parameter.float() * gradient).sum().backward()
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class TestAgainstOthersOwn:
    """Updates of one parameter at a time are bit-identical to torch's and bitsandbytes' updates of all."""

    def reference(self, kind: Any, **settings: Any) -> dict[str, nn.Parameter]:
        trained = parameters()
        train(trained, kind(trained.values(), lr=1.0, betas=(0.9, 0.999), weight_decay=0.1, **settings), range(6))
        return trained

    def test_states_on_the_cpu_are_torchs_adamw(self) -> None:
        trained = parameters()
        optimizer = make_optimizer(trained, replace(CONFIG, optimizer_states_on_cpu=True))
        assert isinstance(optimizer, PerParameterOptimizer)
        train(trained, optimizer, range(6))
        assert equal(trained, self.reference(torch.optim.AdamW))
        assert not equal(trained, self.reference(torch.optim.AdamW, eps=1e-5)), "another epsilon would be seen"

    def test_8_bit_is_bitsandbytes(self) -> None:
        from bitsandbytes.optim import AdamW8bit

        trained = parameters()
        optimizer = make_optimizer(trained, replace(CONFIG, optimizer="adamw_8bit"))
        train(trained, optimizer, range(6))
        assert equal(trained, self.reference(AdamW8bit))
        states = optimizer_tensors(optimizer, trained)
        assert states["a/state1"].dtype == states["b/state2"].dtype == torch.uint8
        assert states["c/state1"].dtype == torch.float32, "below 4,096 elements bitsandbytes keeps float32"
        assert not equal(trained, self.reference(torch.optim.AdamW)), "8-bit moments are felt"

    def test_the_default_is_torchs_adamw(self) -> None:
        assert type(make_optimizer(parameters(), CONFIG)) is torch.optim.AdamW


class TestStochasticRounding:
    def test_rounding_is_unbiased_and_between_neighbours(self) -> None:
        values = torch.tensor([1.0, 1 + 1 / 512, 1 + 3 / 1024, -0.3, 1e-30, -7.77, 0.0])
        generator = torch.Generator().manual_seed(0)
        rounded = torch.stack([round_stochastically(values, generator) for _ in range(20_000)]).double()
        step = torch.exp2(torch.floor(torch.log2(values.abs().clamp_min(1e-38))) - 7)  # 8 bits of significand
        assert ((rounded - values.double()).abs() < step).all()
        # The mean of n draws lies within 5 standard errors, each at most half a step / sqrt(n).
        assert ((rounded.mean(0) - values.double()).abs() < 5 * 0.5 * step / 20_000**0.5).all()
        nearest = values.bfloat16().double() - values.double()
        assert (nearest.abs() > 5 * 0.5 * step / 20_000**0.5).any(), "nearest rounding is off by more than that"

    def test_bfloat16_values_are_unchanged(self) -> None:
        values = torch.randn(1000).bfloat16()
        assert torch.equal(round_stochastically(values.float(), torch.Generator().manual_seed(1)), values)

    @pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
    def test_updates_of_a_ten_thousandth_add_up(self, kind: Any) -> None:
        """200 updates of 1e-4 of the weight; a bfloat16 step is 78 times one. Nearest rounding loses every one."""
        size, steps, rate = 8192, 200, 1e-4

        def push(make: Any, dtype: torch.dtype) -> torch.Tensor:
            """Change of weights of 1 under 200 equal gradients."""
            weight = nn.Parameter(torch.ones(size, dtype=dtype))
            optimizer = make({"w": weight})
            for group in optimizer.param_groups:
                group["lr"] = rate
            for _ in range(steps):
                weight.grad = -torch.ones_like(weight)
                optimizer.step()
            return weight.detach().double() - 1

        config = TrainerConfig(optimizer=kind, gradient_dtype="bfloat16", weight_decay=0.0)
        ours = push(lambda trained: make_optimizer(trained, config), torch.bfloat16)
        exact = push(lambda trained: make_optimizer(trained, config), torch.float32).mean().item()
        # Adam moves by the rate itself; moments in 8 bits are off by some per cent, whatever the parameters' dtype.
        assert exact == pytest.approx(steps * rate, rel=1e-3 if kind == "adamw" else 0.1)
        # Each weight's sum of roundings has a standard deviation of about sqrt(200 x 1/78) = 1.6 steps of 2^-7.
        assert ours.mean().item() == pytest.approx(exact, abs=5 * 1.6 * 2**-7 / size**0.5)
        lost = push(lambda trained: torch.optim.AdamW(trained.values(), weight_decay=0.0), torch.bfloat16)
        assert (lost == 0).all(), "the control loses every update"

    def test_rounding_depends_on_the_seed(self) -> None:
        runs = []
        for seed in (0, 0, 1):
            trained = parameters(torch.bfloat16)
            train(trained, make_optimizer(trained, CONFIG, seed=seed), range(3), rate=1e-4)
            runs.append(trained)
        assert equal(runs[0], runs[1]) and not equal(runs[0], runs[2])


def test_gradients_of_bfloat16_parameters_are_summed_in_float32() -> None:
    """256 micro-batches of 1 + 1/256: a bfloat16 sum stalls, as it cannot tell 256 from 257."""
    sums = {}
    for dtype in ("float32", "bfloat16"):
        trained = parameters(torch.bfloat16)
        make_optimizer(trained, replace(CONFIG, gradient_dtype=dtype))
        for _ in range(512):
            trained["a"].sum().backward()
        assert trained["a"].grad is not None and str(trained["a"].grad.dtype) == f"torch.{dtype}"
        sums[dtype] = trained["a"].grad.float().max().item()
    assert sums == {"float32": 512, "bfloat16": 256}


CASES = {
    "adamw": (CONFIG, torch.float32),
    "adamw, states on cpu": (replace(CONFIG, optimizer_states_on_cpu=True), torch.float32),
    "adamw_8bit": (replace(CONFIG, optimizer="adamw_8bit"), torch.float32),
    "bfloat16": (CONFIG, torch.bfloat16),
    "bfloat16, 8 bit": (
        replace(CONFIG, optimizer="adamw_8bit", gradient_dtype="bfloat16", optimizer_states_on_cpu=True),
        torch.bfloat16,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_resuming_from_saved_states_is_bit_identical(name: str) -> None:
    config, dtype = CASES[name]
    whole = parameters(dtype)
    optimizer = make_optimizer(whole, config)
    train(whole, optimizer, range(3))
    saved = optimizer_tensors(optimizer, whole)
    middle = {key: nn.Parameter(value.detach().clone()) for key, value in whole.items()}
    fresh = {key: nn.Parameter(value.detach().clone()) for key, value in whole.items()}
    train(whole, optimizer, range(3, 6))
    resumed = make_optimizer(middle, config)
    load_optimizer_tensors(resumed, middle, saved)
    assert equal(optimizer_tensors(resumed, middle), saved)
    train(middle, resumed, range(3, 6))
    assert equal(middle, whole)
    assert equal(optimizer_tensors(resumed, middle), optimizer_tensors(optimizer, whole))
    train(fresh, make_optimizer(fresh, config), range(3, 6))
    assert not equal(fresh, whole), "without its states it goes elsewhere"


def test_states_of_another_kind_are_refused() -> None:
    trained = parameters()
    optimizer = make_optimizer(trained, replace(CONFIG, optimizer="adamw_8bit"))
    train(trained, optimizer, range(1))
    for other in (CONFIG, replace(CONFIG, optimizer_states_on_cpu=True)):
        with pytest.raises(ConfigError, match="another kind"):
            load_optimizer_tensors(make_optimizer(trained, other), trained, optimizer_tensors(optimizer, trained))


@pytest.mark.parametrize("kind", ["paged_adamw", "paged_adamw_8bit"])
def test_paging_without_a_gpu_is_refused(kind: Any) -> None:
    config: Any = SimpleNamespace(trainer=TrainerConfig(optimizer=kind))
    with pytest.raises(MachineError, match="on a CPU") as caught:
        check_optimizer(config, torch.device("cpu"))
    assert caught.value.exit_code == 5 and "silently" in str(caught.value)


def test_computed_bytes_equal_the_actual_bytes() -> None:
    for config, dtype in CASES.values():
        trained = parameters(dtype)
        optimizer = make_optimizer(trained, config)
        train(trained, optimizer, range(1))
        run: Any = SimpleNamespace(trainer=config)
        moments = sum(
            tensor.numel() * tensor.element_size()
            for key, tensor in optimizer_tensors(optimizer, trained).items()
            if not key.endswith(("/step", "/qmap1", "/qmap2"))
        )
        grads = sum(p.grad.numel() * p.grad.element_size() for p in trained.values() if p.grad is not None)
        counted = state_bytes(run, trained)
        assert counted["gradients"] == grads
        # A parameter's last block of 256 may be incomplete.
        assert 0 <= moments - counted["moments"] <= 8 * len(trained)
