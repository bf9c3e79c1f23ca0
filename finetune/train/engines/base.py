"""Who holds the adapter and its optimiser, and how gradients meet: one class a kind of topology, the same verbs.

Every engine averages gradients over processes; a loss that is a share of the whole step's is multiplied by their number
before it is handed to `backward`. What goes into a checkpoint is whole tensors by name, whichever engine held them, so
that a run may go on under another one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from finetune.adapters.lora import Adapter
from finetune.config.derive import deepspeed_settings
from finetune.config.schema import RunConfig, TrainerConfig
from finetune.data.batches import Batch
from finetune.model.build import Base
from finetune.train.optim import load_optimizer_tensors, make_optimizer, optimizer_tensors
from finetune.train.world import ALONE, World

MicroStep = Callable[[Batch], Tensor]
"""Forward pass of a micro-step: its shares of the step's terms, float32 [terms]."""

BUCKET_ELEMENTS = 16 << 20


class Engine(Protocol):
    """What the step and the trainer need.

    Attributes:
        parameters: what this process holds of the adapter, by name.
        accelerator, processes: who takes part.
        can_retry: a process may drop a micro-step and begin it again without the others taking part.
    """

    parameters: dict[str, nn.Parameter]
    accelerator: Accelerator
    processes: World
    can_retry: bool

    def forward(self, micro_step: MicroStep, batch: Batch, *, last: bool) -> Tensor:
        """Run a micro-step; `last` of an optimiser step's."""

    def backward(self, loss: Tensor) -> None:
        """Add a micro-step's gradients."""

    def exchange(self) -> None:
        """Make gradients the mean over processes, where backward has not done so."""

    def gradient_norm(self) -> float:
        """Norm over the whole adapter before clipping; clips, unless `update` does. Not finite if a gradient is not."""

    def update(self, rate: float) -> None:
        """Make the optimiser's step at this learning rate and forget the gradients."""

    def drop(self) -> None:
        """Forget the gradients."""

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """A parameter's whole gradient, for the audit. Every process calls it, in the same order."""

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The whole adapter on the CPU. Every process calls it."""

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimiser's whole state on the CPU by `parameter name/state name`. Every process calls it."""

    def load(self, adapter: Mapping[str, Tensor], optimizer: Mapping[str, Tensor] | None) -> None:
        """Take over what the two above gave, in this run or another; None leaves the optimiser as it is."""

    def describe(self) -> str:
        """What runs, for the person and the manifest."""


class Replicated:
    """`single` and `ddp`: every process holds the whole adapter and optimiser.

    Gradients are summed over micro-steps where they are and averaged over processes once a step, through Accelerate.
    torch's DistributedDataParallel would do it inside the last backward pass instead. That hides some of the traffic,
    which is small (an adapter, not a model), and costs what is wanted more: a process that runs out of memory in a
    micro-step can say so before the others wait for its gradients, and begin again.

    Args:
        parameters: the adapter's, by name, the same on every process.
        optimizer: over them.
        config: clipping.
        accelerator, processes: who takes part.
    """

    can_retry = True

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        config: TrainerConfig,
        accelerator: Accelerator,
        processes: World,
    ) -> None:
        self.parameters, self.optimizer = dict(parameters), optimizer
        self.max_norm, self.accelerator, self.processes = config.max_grad_norm, accelerator, processes

    def forward(self, micro_step: MicroStep, batch: Batch, *, last: bool) -> Tensor:
        """See `Engine`."""
        return micro_step(batch)

    def backward(self, loss: Tensor) -> None:
        """See `Engine`."""
        self.accelerator.backward(loss)

    def exchange(self) -> None:
        """See `Engine`."""
        if self.processes.count == 1:
            return
        bucket: list[nn.Parameter] = []
        for parameter in self.parameters.values():
            if parameter.grad is None:  # a process whose rows reached nothing still takes part
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

    def update(self, rate: float) -> None:
        """See `Engine`."""
        step_at(self.optimizer, rate)

    def drop(self) -> None:
        """See `Engine`."""
        self.optimizer.zero_grad(set_to_none=True)

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """See `Engine`."""
        return parameter.grad

    def adapter_tensors(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return {name: parameter.detach().cpu().contiguous() for name, parameter in self.parameters.items()}

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
        if self.processes.count == 1:
            return "single: one process"
        return f"ddp: {self.processes.count} processes over {self.processes.backend}, gradients averaged once a step"


def alone(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, config: TrainerConfig
) -> Replicated:
    """The engine of one process, for a step outside of a run."""
    on_cpu = all(parameter.device.type == "cpu" for parameter in parameters.values())
    return Replicated(parameters, optimizer, config, Accelerator(cpu=on_cpu), ALONE)


def step_at(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """One update at this learning rate; the gradients are dropped."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def states_of(optimizer: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """One parameter's optimiser tensors, by state name."""
    return {key.rpartition("/")[2]: value for key, value in optimizer.items() if key.startswith(f"{name}/")}


# Which engine carries out a recipe's `distributed.kind`, made and checked.


def open_engine(config: RunConfig, base: Base, adapter: Adapter, accelerator: Accelerator, processes: World) -> Engine:
    """Make the engine that the recipe asks for.

    Args:
        config: the recipe.
        base: with `adapter` attached; for `zero3` and `fsdp2` with its layers dealt out already.
        adapter: what the engine takes over.
        accelerator, processes: who takes part.

    Raises:
        MachineError: it cannot run here.
    """
    trainer = config.trainer
    if config.distributed.kind == "fsdp2":
        from finetune.train.engines.fsdp2 import FullySharded

        return FullySharded(base, adapter, trainer, accelerator, processes)
    if settings := deepspeed_settings(config):
        from finetune.train.engines.zero import ZeroSharded

        return ZeroSharded(base, adapter, trainer, accelerator, processes, settings)
    parameters = adapter.parameters()
    optimizer = make_optimizer(parameters, trainer, seed=config.seed)
    return Replicated(parameters, optimizer, trainer, accelerator, processes)
