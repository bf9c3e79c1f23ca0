"""`fsdp2`: the adapter sharded by torch's `fully_shard`, over a base whose layers are sharded as bytes.

Each decoder layer is one unit: its LoRA factors are gathered before the layer runs and freed after it, and their
gradients are reduced straight into each rank's shard. The base's own tensors are excluded (`ignored_params`): they are
frozen, and finetune/model/shards.py gathers them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from finetune.adapters.lora import Adapter
from finetune.config.schema import TrainerConfig
from finetune.errors import MachineError
from finetune.model.build import Base
from finetune.train.engines.base import Forward, ParamGroups, states_of
from finetune.train.optim import make_optimizer
from finetune.train.world import World

EPSILON = 1e-6  # torch's clip_grad_norm_ adds it to the norm


class FullySharded:
    """See `Engine`.

    Args:
        base: with `adapter` attached; its decoder layers become `fully_shard`'s units.
        adapter: its parameters become shards.
        config: optimiser and clipping.
        accelerator, world: the ranks of the run.

    Raises:
        MachineError: a parameter is not sharded over all ranks.
    """

    can_retry = False

    def __init__(
        self,
        base: Base,
        adapter: Adapter,
        config: TrainerConfig,
        accelerator: Accelerator,
        world: World,
    ) -> None:
        self.accelerator = accelerator
        self.world, self.max_norm = world, config.max_grad_norm
        mesh = init_device_mesh(base.device.type, (world.world_size,))
        model = base.model.model
        frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
        self._units = [fully_shard(layer, mesh=mesh, ignored_params=frozen) for layer in model.layers]
        self._units.append(fully_shard(model, mesh=mesh, ignored_params=frozen))
        self.parameters = adapter.parameters()
        self._check_sharded()
        self.optimizer = make_optimizer(self.parameters, config)

    def _check_sharded(self) -> None:
        for name, parameter in self.parameters.items():
            if not isinstance(parameter, DTensor) or parameter.device_mesh.size() != self.world.world_size:
                raise MachineError(
                    f"fully_shard has not sharded {name} over {self.world.world_size} ranks",
                    why="the topology asked for is not the one that would run",
                    fix="please report this with the version of torch",
                )

    @property
    def param_groups(self) -> ParamGroups:
        """See `Engine`."""
        return self.optimizer.param_groups

    def prepare_forward(self, forward: Forward, *, last: bool) -> Forward:
        """See `Engine`. Gradients are reduced after the last micro-batch only."""
        for unit in self._units:
            unit.set_requires_gradient_sync(last)
        return forward

    def backward(self, loss: Tensor) -> None:
        """See `Engine`."""
        loss.backward()

    def reduce_gradients(self) -> None:
        """The last backward pass has done it."""

    def gradient_norm(self) -> float:
        """See `Engine`."""
        gradients = [_local(p.grad) for p in self.parameters.values() if p.grad is not None]
        zero = torch.zeros((), device=next(iter(self.parameters.values())).device)
        squares = torch.stack([zero, *(gradient.float().pow(2).sum() for gradient in gradients)]).sum()
        dist.all_reduce(squares)
        norm = float(squares.sqrt())
        factor = (self.max_norm or math.inf) / (norm + EPSILON)
        if factor < 1:
            for gradient in gradients:
                gradient.mul_(factor)
        return norm

    def step(self) -> None:
        """See `Engine`."""
        self.optimizer.step()

    def zero_grad(self) -> None:
        """See `Engine`."""
        self.optimizer.zero_grad(set_to_none=True)

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """See `Engine`."""
        return None if parameter.grad is None else _gather(parameter.grad)

    def adapter_tensors(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return {name: _gather(parameter.detach()).to("cpu", copy=True) for name, parameter in self.parameters.items()}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return {
            f"{name}/{key}": _gather(value.detach()).to("cpu", copy=True)
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }

    def load(self, adapter: Mapping[str, Tensor], optimizer: Mapping[str, Tensor] | None) -> None:
        """See `Engine`."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(_shard(adapter[name], parameter))
        if optimizer is None:
            return
        for name, parameter in self.parameters.items():
            saved = states_of(optimizer, name)
            if saved:
                self.optimizer.state[parameter] = {
                    key: value.clone() if key == "step" else _shard(value, parameter) for key, value in saved.items()
                }

    def describe(self) -> str:
        """See `Engine`."""
        return (
            f"fsdp2: {self.world.world_size} ranks over {self.world.backend}, "
            f"{len(self.parameters)} adapter tensors sharded by fully_shard"
        )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _gather(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.contiguous()


def _shard(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of a whole tensor that every rank has."""
    assert isinstance(like, DTensor)
    placed = whole.to(like.device)
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)
