"""Optimisers over LoRA parameters in float32 or bfloat16, and the learning-rate schedule.

Plain float32 training uses torch's own AdamW. Everything else goes through `PerParameterOptimizer`, which updates one
parameter at a time with an optimiser of torch or bitsandbytes: beside the states, only one parameter's float32 copy or
moments occupy the device at any moment.

Stochastic rounding in bfloat16: its numbers are 2^-8 of a weight apart, so an update below about 2^-9 of a weight
rounds away, step after step. Rounding up or down at random, with the odds that make the mean right, loses nothing in
the mean (Gupta et al. 2015). bitsandbytes has no such rounding; torchao's draws from torch's global generator, compiles
on every machine, and keeps learning rates as tensors (docs/log.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from finetune.config.schema import RunConfig, TrainerConfig
from finetune.errors import ConfigError, MachineError
from finetune.files import seeded_generator
from finetune.model.nf4 import import_bitsandbytes

MIN_8BIT_ELEMENTS = 4096  # bitsandbytes keeps smaller parameters' moments in float32
_MOMENTS = ("exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_DROPPED_BITS = 16  # of a float32's mantissa, which bfloat16 has not

State = dict[str, Any]
"""torch's form of one parameter's optimiser state: tensors and numbers by name."""
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def check_optimizer(config: RunConfig, device: torch.device) -> None:
    """Refuse an optimiser that this machine cannot run, before anything is loaded.

    Raises:
        MachineError: bitsandbytes is not installed, or paged states are asked for without a GPU: there bitsandbytes
            falls back to ordinary memory with no more than a Python warning.
    """
    kind = config.trainer.optimizer
    if kind != "adamw":
        _bitsandbytes(kind)
    if kind.startswith("paged") and device.type == "cpu":
        raise MachineError(
            f"trainer.optimizer is {kind}, and this run is on a CPU",
            why="paged states are CUDA's unified memory; on a CPU bitsandbytes silently uses ordinary memory",
            fix=f"set trainer.optimizer={kind.removeprefix('paged_')}",
        )


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], config: TrainerConfig, *, seed: int = 0
) -> torch.optim.Optimizer:
    """Make the optimiser of a recipe; the learning rate is set at every step (`set_learning_rate`).

    Also sets the dtype in which gradients are summed over micro-batches (`trainer.gradient_dtype`).

    Args:
        parameters: by name, float32 or bfloat16.
        config: `optimizer`, `optimizer_states_on_cpu`, `gradient_dtype` and Adam's own settings.
        seed: of the stochastic rounding; equal on every rank.
    """
    for parameter in parameters.values():
        # torch sums gradients wider than the parameter where this is set; the parameter's own dtype is its default.
        if parameter.dtype == torch.bfloat16 and config.gradient_dtype == "float32":
            parameter.grad_dtype = torch.float32
    make = _maker(config)
    narrow = any(parameter.dtype != torch.float32 for parameter in parameters.values())
    if config.optimizer == "adamw" and not narrow and not config.optimizer_states_on_cpu:
        return make(list(parameters.values()))
    return PerParameterOptimizer(parameters, make, seed=seed, states_on_cpu=config.optimizer_states_on_cpu)


def _bitsandbytes(kind: str) -> ModuleType:
    return import_bitsandbytes(f"trainer.optimizer={kind}", "trainer.optimizer=adamw")


def _maker(config: TrainerConfig) -> MakeOptimizer:
    kind: Any = torch.optim.AdamW
    if config.optimizer != "adamw":
        optim = _bitsandbytes(config.optimizer).optim
        kind = {
            "adamw_8bit": optim.AdamW8bit,
            "paged_adamw_8bit": optim.PagedAdamW8bit,
            "paged_adamw": optim.PagedAdamW32bit,
        }[config.optimizer]

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = kind(
            parameters,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
        )
        return made

    return make


@dataclass(frozen=True)
class _Slot:
    """One parameter, a float32 copy that is updated in its place, and the optimiser of that copy alone."""

    name: str
    parameter: nn.Parameter
    stand_in: nn.Parameter
    inner: torch.optim.Optimizer

    @property
    def state(self) -> State:
        state: State = self.inner.state[self.stand_in]
        return state


class PerParameterOptimizer(torch.optim.Optimizer):
    """Updates parameters one after the other, in float32, each through an optimiser of its own.

    A bfloat16 parameter is widened for its update and rounded back stochastically. The random numbers depend on the
    seed, the parameter's name and its step alone: a resumed run, and every rank of a replicated one, draws the same.

    Args:
        parameters: by name.
        make: makes the optimiser of a list of float32 parameters.
        seed: of the rounding.
        states_on_cpu: moments are in host memory (pinned, if the parameters are on a GPU) and are copied to the device
            for the update of their parameter. The arithmetic stays on the device, so results are bit-identical.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], make: MakeOptimizer, *, seed: int, states_on_cpu: bool = False
    ) -> None:
        super().__init__(list(parameters.values()), {"lr": 0.0})
        self.seed, self.states_on_cpu = seed, states_on_cpu
        self.slots = []
        for name, parameter in parameters.items():
            # Full size only during its update.
            stand_in = nn.Parameter(torch.empty(0, device=parameter.device))
            self.slots.append(_Slot(name, parameter, stand_in, make([stand_in])))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, float32 or the parameter's dtype."""
        for slot in self.slots:
            if slot.parameter.grad is not None:
                self._update(slot)

    def _update(self, slot: _Slot) -> None:
        parameter, stand_in = slot.parameter, slot.stand_in
        slot.inner.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        stand_in.data = parameter.detach().float()  # a float32 parameter is updated in place
        stand_in.grad = parameter.grad.float() if parameter.grad is not None else None
        at_home = self._fetch(slot)
        slot.inner.step()
        self._return(slot, at_home)
        if parameter.dtype != torch.float32:
            step = int(slot.state["step"])
            generator = seeded_generator(self.seed, "rounding", step, slot.name, device=parameter.device)
            parameter.copy_(round_stochastically(stand_in.data, generator))
        stand_in.grad, stand_in.data = None, torch.empty(0, device=parameter.device)

    def _fetch(self, slot: _Slot) -> dict[str, Tensor]:
        """Copy moments to the device; returns their host tensors."""
        at_home: dict[str, Tensor] = {}
        device = slot.parameter.device
        if self.states_on_cpu and device.type != "cpu":
            at_home = {key: value for key, value in slot.state.items() if key in _MOMENTS}
            slot.state.update({key: value.to(device, non_blocking=True) for key, value in at_home.items()})
        return at_home

    def _return(self, slot: _Slot, at_home: dict[str, Tensor]) -> None:
        """Copy moments back to the host. The stream orders the copies; `optimizer_tensors` waits for them."""
        if not self.states_on_cpu or slot.parameter.device.type == "cpu":
            return
        for key in _MOMENTS:
            if key in slot.state:
                place = at_home.get(key)
                if place is None:
                    place = torch.empty_like(slot.state[key], device="cpu", pin_memory=True)
                slot.state[key] = place.copy_(slot.state[key], non_blocking=True)

    def load_states(self, name: str, saved: Mapping[str, Tensor]) -> None:
        """Load one parameter's saved states (see `optimizer_tensors`)."""
        slot = next(slot for slot in self.slots if slot.name == name)
        device = slot.parameter.device
        paged = bool(getattr(slot.inner, "is_paged", False))
        if paged:  # bitsandbytes must allocate its memory
            slot.stand_in.data = slot.parameter.detach().float()
            slot.inner.init_state(slot.inner.param_groups[0], slot.stand_in, 0, 0)  # type: ignore[attr-defined]
            slot.stand_in.data = torch.empty(0, device=device)
        for key, value in saved.items():
            if key == "step":
                is_torch = isinstance(slot.inner, torch.optim.AdamW)
                slot.state[key] = value.clone() if is_torch else int(value)
            elif paged and key in slot.state:
                slot.state[key].copy_(value)
            elif self.states_on_cpu and key in _MOMENTS and device.type != "cpu":
                slot.state[key] = value.pin_memory()
            else:
                slot.state[key] = value.to(device, copy=True)


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to one of the two nearest bfloat16 numbers, at random, with the odds that keep the mean.

    Args:
        values: float32, finite.
        generator: on the values' device.

    Returns:
        bfloat16. Values that bfloat16 can represent are unchanged.
    """
    # The bits of a float32, read as an integer, grow with its magnitude: adding a random number below one bfloat16 step
    # and dropping the lower bits rounds up exactly as often as it should.
    bits = torch.randint(1 << _DROPPED_BITS, values.shape, generator=generator, device=values.device, dtype=torch.int32)
    bits += values.contiguous().view(torch.int32)
    bits &= -(1 << _DROPPED_BITS)
    return bits.view(torch.float32).bfloat16()


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Every state of an optimiser, as copies on the CPU by `parameter name/state name`.

    Args:
        optimizer: of `make_optimizer`.
        parameters: the ones it was made with.
    """
    tensors: dict[str, Tensor] = {}
    for name, state in _states(optimizer, parameters).items():
        for key, value in state.items():
            tensors[f"{name}/{key}"] = torch.as_tensor(value).detach().to("cpu", copy=True)
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Load the states that `optimizer_tensors` returned, bit for bit.

    Raises:
        ConfigError: they are the states of another kind of optimiser.
    """
    saved: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, state = key.rpartition("/")
        saved.setdefault(name, {})[state] = value
    theirs = any("exp_avg" in state for state in saved.values())
    ours = isinstance(
        optimizer.slots[0].inner if isinstance(optimizer, PerParameterOptimizer) else optimizer, torch.optim.AdamW
    )
    if saved and theirs != ours:
        raise ConfigError(
            "the checkpoint's optimiser states are of another kind than trainer.optimizer",
            fix="make trainer.optimizer in config.yaml as it was when the run was started",
        )
    for name, states in saved.items():
        if isinstance(optimizer, PerParameterOptimizer):
            optimizer.load_states(name, states)
        else:  # AdamW keeps its step counter on the CPU and its moments beside the parameter
            parameter = parameters[name]
            optimizer.state[parameter] = {
                key: value.clone() if key == "step" else value.to(parameter.device, copy=True)
                for key, value in states.items()
            }


def _states(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, State]:
    if not isinstance(optimizer, PerParameterOptimizer):
        return {name: optimizer.state.get(parameter, {}) for name, parameter in parameters.items()}
    if optimizer.states_on_cpu and torch.cuda.is_available():
        torch.cuda.synchronize()  # the last step's copies to the host may not be done
    return {slot.name: slot.state for slot in optimizer.slots}


def describe_optimizer(config: RunConfig, parameters: Mapping[str, nn.Parameter]) -> str:
    """One line: the optimiser, where its states are, their dtypes, and the bytes that follow."""
    trainer, device = config.trainer, next(iter(parameters.values())).device
    name: str = trainer.optimizer
    if name != "adamw":
        name += f" (bitsandbytes {version('bitsandbytes')})"
    where = ""
    if trainer.optimizer_states_on_cpu:
        where = ", states in host memory" + ("" if device.type != "cpu" else ", as all else in this run")
    dtype = config.adapter.dtype
    rounding = ", updates rounded stochastically" if dtype == "bfloat16" else ""
    sizes = state_bytes(config, parameters)
    parts = ", ".join(f"{part} {size / 2**20:,.1f} MiB" for part, size in sizes.items())
    return f"optimiser: {name}{where}; parameters {dtype}{rounding}; {parts}"


def state_bytes(config: RunConfig, parameters: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """Bytes of parameters, their gradients and their moments, by arithmetic."""
    trainer = config.trainer
    gradient = _DTYPES[trainer.gradient_dtype].itemsize
    moments = 0.0
    for parameter in parameters.values():
        small = parameter.numel() < MIN_8BIT_ELEMENTS
        # Two moments of one byte each, and a float32 per 256 values of either.
        moments += parameter.numel() * (8 if small or not trainer.optimizer.endswith("8bit") else 2 + 8 / 256)
    count = sum(parameter.numel() for parameter in parameters.values())
    itemsize = next(iter(parameters.values())).element_size()
    return {"parameters": count * itemsize, "gradients": count * gradient, "moments": int(moments)}


# ---- learning rate --------------------------------------------------------------------------------------------------


def warmup_steps(total_steps: int, config: TrainerConfig) -> int:
    """Steps spent rising to the peak, at least one when there is a warm-up at all."""
    return math.ceil(config.warmup_ratio * total_steps)


def learning_rate(step: int, total_steps: int, config: TrainerConfig) -> float:
    """The learning rate of optimiser step `step` (from 0) out of `total_steps`: a function of the step, without state.

    The warm-up starts at peak / warm-up steps, not at zero: step 0 already changes the adapter, so that A has a
    gradient to audit on step 1. After it the rate falls to `min_lr_ratio` of the peak at the last step.
    """
    peak, rising = config.peak_learning_rate, warmup_steps(total_steps, config)
    if step < rising:
        return peak * (step + 1) / rising
    final = peak * config.min_lr_ratio
    progress = (step - rising) / max(1, total_steps - 1 - rising)
    match config.schedule:
        case "constant":
            return peak
        case "linear":
            return peak + (final - peak) * progress
        case "cosine":
            return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2
