"""`zero1`, `zero2` and `zero3`: the adapter in DeepSpeed's hands.

DeepSpeed treats every parameter of the module it is given as its own: it broadcasts them, and in stage 3 deals them
out. So the base's tensors are made buffers first, and DeepSpeed sees LoRA alone; in `zero3` the base is dealt out by
finetune/model/shards.py. Checkpoints are written by us from whole tensors: DeepSpeed's own are pickles.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from finetune.adapters.lora import Adapter
from finetune.config.schema import TrainerConfig
from finetune.data.batches import Batch
from finetune.errors import MachineError
from finetune.model.build import Base
from finetune.model.experts import PackedExperts
from finetune.train.engines.base import MicroStep, states_of
from finetune.train.optim import make_optimizer
from finetune.train.world import World

_MOMENTS = ("exp_avg", "exp_avg_sq")


class _Whole(nn.Module):
    """What DeepSpeed takes for the model: its forward pass is a micro-step."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, micro_step: MicroStep, batch: Batch) -> Tensor:
        return micro_step(batch)


class ZeroSharded:
    """See `Engine`.

    Args:
        base: with `adapter` attached; its frozen parameters become buffers.
        adapter: what DeepSpeed takes over.
        config: optimiser and clipping.
        accelerator, processes: who takes part.
        settings: DeepSpeed's (`finetune.config.derive`).

    Raises:
        MachineError: DeepSpeed is not installed, cannot build what it needs on a CPU, or runs another stage.
    """

    can_retry = False

    def __init__(
        self,
        base: Base,
        adapter: Adapter,
        config: TrainerConfig,
        accelerator: Accelerator,
        processes: World,
        settings: dict[str, Any],
    ) -> None:
        self.accelerator = accelerator
        self.processes, self.stage = processes, int(settings["zero_optimization"]["stage"])
        deepspeed = _deepspeed(base.device)
        make_frozen_buffers(base.model)
        self.parameters = adapter.parameters()
        whole = _Whole(base.model)
        if self.stage == 3:  # an expert block's factors belong to a module inside it that is never called
            deepspeed.utils.set_z3_leaf_modules(whole, [PackedExperts], raise_if_not_found=False)
        with contextlib.redirect_stdout(sys.stderr):  # it prints where a command's results go
            self._engine, *_ = deepspeed.initialize(
                model=whole,
                optimizer=make_optimizer(self.parameters, config),
                config=settings,
                dist_init_required=False,
            )
        self._zero = self._engine.optimizer
        self._refuse_other()

    def _refuse_other(self) -> None:
        stage, count = self._engine.zero_optimization_stage(), self._engine.dp_world_size
        dealt = all(hasattr(p, "ds_tensor") == (self.stage == 3) for p in self.parameters.values())
        if (stage, count) != (self.stage, self.processes.count) or not dealt:
            raise MachineError(
                f"DeepSpeed runs stage {stage} over {count} processes, the recipe says stage {self.stage} over "
                f"{self.processes.count}",
                why="the topology asked for is not the one that would run",
                fix="please report this with the version of DeepSpeed",
            )

    def forward(self, micro_step: MicroStep, batch: Batch, *, last: bool) -> Tensor:
        """See `Engine`."""
        self._engine.set_gradient_accumulation_boundary(last)
        result: Tensor = self._engine(micro_step, batch)
        return result

    def backward(self, loss: Tensor) -> None:
        """See `Engine`."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def exchange(self) -> None:
        """The backward passes have done it."""

    def gradient_norm(self) -> float:
        """See `Engine`; clipping is left to `update`."""
        zero = self._zero
        if self.stage == 3:
            groups = zero._get_norm_groups()
        else:
            groups = [
                zero.get_grad_norm_direct(zero.averaged_gradients[number], zero.params_in_partition[number])
                for number in range(len(zero.bit16_groups))
            ]
        norms = [float(norm) for norm in groups]
        # DeepSpeed writes -1 for a norm that is not finite.
        return math.nan if any(norm < 0 for norm in norms) else math.sqrt(sum(norm**2 for norm in norms))

    def update(self, rate: float) -> None:
        """See `Engine`."""
        for group in self._zero.param_groups:
            group["lr"] = rate
        self._engine.step()

    def drop(self) -> None:
        """Nothing: a run on DeepSpeed ends where gradients are dropped (rules: trainer.on_nonfinite)."""

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """See `Engine`."""
        gradient: Tensor | None = _utils().safe_get_full_grad(parameter)
        return gradient

    def adapter_tensors(self) -> dict[str, Tensor]:
        """See `Engine`."""
        whole = _utils().safe_get_full_fp32_param
        return {name: whole(p).detach().cpu().clone().contiguous() for name, p in self.parameters.items()}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """See `Engine`."""
        states = list(self._zero.optimizer.state.values())
        if not states:
            return {}
        whole = _utils().safe_get_full_optimizer_state
        tensors = {}
        for name, parameter in self.parameters.items():
            tensors[f"{name}/step"] = torch.as_tensor(states[0]["step"], dtype=torch.float32).cpu().clone()
            for key in _MOMENTS:
                tensors[f"{name}/{key}"] = whole(parameter, key).detach().cpu().clone().contiguous()
        return tensors

    def load(self, adapter: Mapping[str, Tensor], optimizer: Mapping[str, Tensor] | None) -> None:
        """See `Engine`."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                self._load_parameter(parameter, adapter[name].to(parameter.device))
        steps = [value for key, value in (optimizer or {}).items() if key.endswith("/step")]
        if not steps:
            return
        self._make_states(steps[0])
        for name, parameter in self.parameters.items():
            for key, value in states_of(optimizer or {}, name).items():
                if key in _MOMENTS:
                    self._load_moment(parameter, value.to(parameter.device), key)

    def _load_parameter(self, parameter: nn.Parameter, value: Tensor) -> None:
        if self.stage == 3:
            part = self._part(parameter, value)
            parameter.ds_tensor.data.copy_(part)  # type: ignore[attr-defined]
            _utils().safe_set_local_fp32_param(parameter, part)
        else:
            parameter.data.copy_(value)
            _utils().safe_set_full_fp32_param(parameter, value)

    def _load_moment(self, parameter: nn.Parameter, value: Tensor, key: str) -> None:
        if self.stage == 3:
            _utils().safe_set_local_optimizer_state(parameter, self._part(parameter, value), key)
        else:
            _utils().safe_set_full_optimizer_state(parameter, value, key)

    def _part(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """This process's part of a whole tensor, the last one padded, as stage 3 deals it out."""
        size = int(parameter.ds_tensor.numel())  # type: ignore[attr-defined]
        padded = torch.zeros(size * self.processes.count, device=value.device, dtype=value.dtype)
        padded[: value.numel()] = value.reshape(-1)
        return padded[self.processes.rank * size : (self.processes.rank + 1) * size]

    def _make_states(self, step: Tensor) -> None:
        """The states that AdamW would make at its first step, for DeepSpeed's flat parameters."""
        inner = self._zero.optimizer
        if self.stage == 3:
            flats = self._zero.fp32_partitioned_groups_flat
        else:
            flats = self._zero.single_partition_of_fp32_groups
        for flat in flats:
            inner.state[flat] = {"step": step.clone()} | {key: torch.zeros_like(flat) for key in _MOMENTS}
        if self.stage != 3:
            self._zero._lazy_init_hp_params_optimizer_state()

    def describe(self) -> str:
        """See `Engine`."""
        import deepspeed

        dealt = {1: "optimiser states", 2: "optimiser states and gradients", 3: "the adapter, its states and gradients"}
        return (
            f"zero{self.stage}: {self.processes.count} processes over {self.processes.backend}, DeepSpeed "
            f"{deepspeed.__version__} deals out {dealt[self.stage]}"
        )


def make_frozen_buffers(model: nn.Module) -> None:
    """Turn every frozen parameter into a buffer of the same name: the same tensor, that nobody takes for trainable."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and not parameter.requires_grad:
                del module._parameters[name]
                module.register_buffer(name, parameter.data)


def _deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed, ready for this device.

    Raises:
        MachineError: it is not installed, or has no compiler on a CPU.
    """
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        beside = str(Path(sys.executable).parent)  # where pip puts ninja
        os.environ["PATH"] = f"{beside}{os.pathsep}{os.environ.get('PATH', '')}"
        missing = [tool for tool in ("ninja", "g++") if shutil.which(tool) is None]
        if missing:
            raise MachineError(
                f"DeepSpeed on a CPU needs {' and '.join(missing)}",
                why="it compiles its shared-memory exchange on first use (about 75 s, once)",
                fix="pip install ninja, and install a C++ compiler",
            )
    try:
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        import deepspeed
    except ImportError as error:
        raise MachineError(
            "distributed.kind=zero1, zero2 and zero3 need DeepSpeed, which is not installed",
            why=str(error),
            fix="pip install 'gpt-oss-finetune[deepspeed]', or use distributed=fsdp2, which needs nothing more",
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def _utils() -> Any:
    import deepspeed.utils

    return deepspeed.utils
