"""`zero1`, `zero2` and `zero3`: the adapter is stored and updated by DeepSpeed.

DeepSpeed takes over every parameter of the module it is given: it broadcasts them, and in stage 3 shards them. So the
base's tensors are made buffers first, and DeepSpeed sees LoRA alone; in `zero3` the base is sharded by
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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from finetune.adapters.lora import Adapter
from finetune.config.derive import deepspeed_settings
from finetune.config.schema import RunConfig
from finetune.errors import MachineError
from finetune.model.build import Base
from finetune.model.experts import PackedExperts
from finetune.train.engines.base import Forward, ParamGroups, states_of
from finetune.train.optim import make_optimizer
from finetune.train.world import World

_MOMENTS = ("exp_avg", "exp_avg_sq")


class _MicroBatchModule(nn.Module):
    """The model as DeepSpeed sees it: its forward pass is a micro-batch's, loss included."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, forward: Forward) -> Tensor:
        return forward()


class ZeroSharded:
    """See `Engine`.

    Args:
        base: with `adapter` attached; its frozen parameters become buffers.
        adapter: its parameters are trained.
        config: the recipe.
        accelerator, world: the ranks of the run.

    Raises:
        MachineError: DeepSpeed is not installed, cannot be compiled on a CPU, or runs another stage.
    """

    can_retry = False

    def __init__(
        self,
        base: Base,
        adapter: Adapter,
        config: RunConfig,
        accelerator: Accelerator,
        world: World,
    ) -> None:
        settings = deepspeed_settings(config)
        assert settings is not None
        self.accelerator = accelerator
        self.world, self.stage = world, int(settings["zero_optimization"]["stage"])
        deepspeed = _deepspeed(base.device)
        make_frozen_buffers(base.model)
        self.parameters = adapter.parameters()
        module = _MicroBatchModule(base.model)
        if self.stage == 3:  # an expert block's factors belong to a module inside it that is never called
            deepspeed.utils.set_z3_leaf_modules(module, [PackedExperts], raise_if_not_found=False)
        with contextlib.redirect_stdout(sys.stderr):  # it prints where a command's results go
            self._engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=make_optimizer(self.parameters, config.trainer),
                config=settings,
                dist_init_required=False,
            )
        self._zero = self._engine.optimizer
        self._check_topology()

    def _check_topology(self) -> None:
        stage, count = self._engine.zero_optimization_stage(), self._engine.dp_world_size
        is_sharded = all(hasattr(p, "ds_tensor") == (self.stage == 3) for p in self.parameters.values())
        if (stage, count) != (self.stage, self.world.world_size) or not is_sharded:
            raise MachineError(
                f"DeepSpeed runs stage {stage} over {count} ranks, the recipe says stage {self.stage} over "
                f"{self.world.world_size}",
                why="the topology asked for is not the one that would run",
                fix="please report this with the version of DeepSpeed",
            )

    @property
    def param_groups(self) -> ParamGroups:
        """See `Engine`."""
        groups: ParamGroups = self._zero.param_groups
        return groups

    def prepare_forward(self, forward: Forward, *, last: bool) -> Forward:
        """See `Engine`. DeepSpeed's hooks run around the forward pass of its own module."""
        self._engine.set_gradient_accumulation_boundary(last)
        return partial(self._engine, forward)

    def backward(self, loss: Tensor) -> None:
        """See `Engine`."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def reduce_gradients(self) -> None:
        """The backward passes have done it."""

    def gradient_norm(self) -> float:
        """See `Engine`; clipping is left to `step`."""
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

    def step(self) -> None:
        """See `Engine`; gradients are dropped too."""
        self._engine.step()

    def zero_grad(self) -> None:
        """Nothing: `step` has done it, and a run on DeepSpeed ends at a step without one (trainer.on_nonfinite)."""

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
        """This rank's shard of a whole tensor, the last one padded, as in stage 3."""
        size = int(parameter.ds_tensor.numel())  # type: ignore[attr-defined]
        padded = torch.zeros(size * self.world.world_size, device=value.device, dtype=value.dtype)
        padded[: value.numel()] = value.reshape(-1)
        return padded[self.world.rank * size : (self.world.rank + 1) * size]

    def _make_states(self, step: Tensor) -> None:
        """Make the states that AdamW makes at its first step, for DeepSpeed's flat parameters."""
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

        sharded = {1: "optimiser states", 2: "optimiser states and gradients", 3: "adapter, states and gradients"}
        return (
            f"zero{self.stage}: {self.world.world_size} ranks over {self.world.backend}, DeepSpeed "
            f"{deepspeed.__version__} shards {sharded[self.stage]}"
        )


def make_frozen_buffers(model: nn.Module) -> None:
    """Turn every frozen parameter into a buffer of the same name and tensor, which no library takes for trainable."""
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
