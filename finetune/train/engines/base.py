"""The engine protocol, the engine of replicated adapters, and the choice of an engine by `distributed.kind`.

An engine stores the adapter and its optimiser and combines gradients over ranks. Every engine averages gradients; a
loss that is a share of the whole step's is multiplied by the world size before `backward`. Checkpoints hold whole
tensors by name, whichever engine stored them, so that a run may resume under another one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from finetune.adapters.lora import Adapter
from finetune.config.rules import DEEPSPEED
from finetune.config.schema import RunConfig, TrainerConfig
from finetune.model.build import Base
from finetune.train.optim import load_optimizer_tensors, make_optimizer, optimizer_tensors
from finetune.train.world import SINGLE_PROCESS, World

Forward = Callable[[], Tensor]
"""Forward pass of a micro-batch: its shares of the step's terms, float32 [terms]."""

ParamGroups = list[dict[str, Any]]
"""torch's form of an optimiser's parameters and settings."""

BUCKET_ELEMENTS = 16 << 20


class Engine(Protocol):
    """The operations of an optimiser step that differ between topologies.

    Attributes:
        parameters: the adapter's, or this rank's shards of them, by name.
        accelerator, world: the ranks of the run.
        can_retry: a rank may drop a micro-batch and begin it again while the others wait.
    """

    parameters: dict[str, nn.Parameter]
    accelerator: Accelerator
    world: World
    can_retry: bool

    @property
    def param_groups(self) -> ParamGroups:
        """The optimiser's parameter groups, in which the learning rate is set."""

    def prepare_forward(self, forward: Forward, *, last: bool) -> Forward:
        """Prepare a micro-batch, the `last` of a step or not; returns the function to call for its forward pass."""

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients."""

    def reduce_gradients(self) -> None:
        """Average gradients over ranks, where backward has not done so."""

    def gradient_norm(self) -> float:
        """Norm over the whole adapter before clipping; clips, unless `step` does. Not finite if a gradient is not."""

    def step(self) -> None:
        """Update the parameters."""

    def zero_grad(self) -> None:
        """Drop the gradients."""

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """A parameter's whole gradient, for the audit. Every rank calls it, in the same order."""

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The whole adapter on the CPU, in memory that later steps do not change. Every rank calls it."""

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimiser's whole state on the CPU by `parameter name/state name`, likewise. Every rank calls it."""

    def load(self, adapter: Mapping[str, Tensor], optimizer: Mapping[str, Tensor] | None) -> None:
        """Load tensors as the two methods above return them, of this run or another; None leaves the optimiser."""

    def describe(self) -> str:
        """One line for the log and the manifest."""


class Replicated:
    """`single` and `ddp`: every rank stores the whole adapter and optimiser.

    Gradients are summed over micro-batches in place and averaged over ranks once per step, through Accelerate. torch's
    DistributedDataParallel would average inside the last backward pass. That hides some of the traffic, which is small
    (an adapter, not a model), but a rank that runs out of memory in a micro-batch could then not report it before the
    others wait for its gradients, and begin again.

    Args:
        parameters: the adapter's, by name, the same on every rank.
        optimizer: over them.
        config: clipping.
        accelerator, world: the ranks of the run.
    """

    can_retry = True

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        config: TrainerConfig,
        accelerator: Accelerator,
        world: World,
    ) -> None:
        self.parameters, self.optimizer = dict(parameters), optimizer
        self.max_norm, self.accelerator, self.world = config.max_grad_norm, accelerator, world

    @property
    def param_groups(self) -> ParamGroups:
        """See `Engine`."""
        return self.optimizer.param_groups

    def prepare_forward(self, forward: Forward, *, last: bool) -> Forward:
        """See `Engine`."""
        return forward

    def backward(self, loss: Tensor) -> None:
        """See `Engine`."""
        self.accelerator.backward(loss)

    def reduce_gradients(self) -> None:
        """See `Engine`."""
        if self.world.world_size == 1:
            return
        bucket: list[nn.Parameter] = []
        for parameter in self.parameters.values():
            if parameter.grad is None:  # a rank whose tokens reached nothing still takes part
                parameter.grad = torch.zeros_like(parameter)
            if bucket and (
                sum(p.numel() for p in bucket) + parameter.numel() > BUCKET_ELEMENTS
                or bucket[0].grad.dtype != parameter.grad.dtype  # type: ignore[union-attr]
            ):
                self._average(bucket)
                bucket = []
            bucket.append(parameter)
        self._average(bucket)

    def _average(self, parameters: list[nn.Parameter]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        mean = self.accelerator.reduce(flat, "mean").split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, mean, strict=True):
            gradient.copy_(part.view_as(gradient))

    def gradient_norm(self) -> float:
        """See `Engine`."""
        return float(self.accelerator.clip_grad_norm_(self.parameters.values(), self.max_norm or math.inf))

    def step(self) -> None:
        """See `Engine`."""
        self.optimizer.step()

    def zero_grad(self) -> None:
        """See `Engine`."""
        self.optimizer.zero_grad(set_to_none=True)

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """See `Engine`."""
        return parameter.grad

    def adapter_tensors(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return {
            name: parameter.detach().to("cpu", copy=True).contiguous() for name, parameter in self.parameters.items()
        }

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return optimizer_tensors(self.optimizer, self.parameters)

    def load(self, adapter: Mapping[str, Tensor], optimizer: Mapping[str, Tensor] | None) -> None:
        """See `Engine`."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(adapter[name])
        if optimizer is not None:
            load_optimizer_tensors(self.optimizer, self.parameters, optimizer)

    def describe(self) -> str:
        """See `Engine`."""
        if self.world.world_size == 1:
            return "single: one process"
        return f"ddp: {self.world.world_size} ranks over {self.world.backend}, gradients averaged once per step"


def single_engine(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, config: TrainerConfig
) -> Replicated:
    """The engine of one process, for a step outside of a run."""
    on_cpu = all(parameter.device.type == "cpu" for parameter in parameters.values())
    return Replicated(parameters, optimizer, config, Accelerator(cpu=on_cpu), SINGLE_PROCESS)


def states_of(optimizer: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """One parameter's optimiser tensors, by state name."""
    return {key.rpartition("/")[2]: value for key, value in optimizer.items() if key.startswith(f"{name}/")}


def open_engine(config: RunConfig, base: Base, adapter: Adapter, accelerator: Accelerator, world: World) -> Engine:
    """Make the engine of a recipe's `distributed.kind`.

    Args:
        config: the recipe.
        base: with `adapter` attached; for `zero3` and `fsdp2` its layers are sharded already.
        adapter: its parameters are trained.
        accelerator, world: the ranks of the run.

    Raises:
        MachineError: it cannot run here.
    """
    trainer = config.trainer
    if config.distributed.kind == "fsdp2":
        from finetune.train.engines.fsdp2 import FullySharded

        return FullySharded(base, adapter, trainer, accelerator, world)
    if config.distributed.kind in DEEPSPEED:
        from finetune.train.engines.zero import ZeroSharded

        return ZeroSharded(base, adapter, config, accelerator, world)
    parameters = adapter.parameters()
    optimizer = make_optimizer(parameters, trainer, seed=config.seed)
    return Replicated(parameters, optimizer, trainer, accelerator, world)
