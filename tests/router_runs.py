"""Steps of a tiny model with chosen router settings, for tests of what the router's losses do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from finetune.adapters.attach import attach_adapter
from finetune.adapters.sites import ExpertRanks
from finetune.config.schema import AdapterConfig, AttentionAdapterConfig, ExpertAdapterConfig, TrainerConfig
from finetune.data.batches import Batch
from finetune.data.harmony.render import Example
from finetune.model.build import Base, build_base
from finetune.model.checkpoint import Checkpoint
from finetune.model.forward import checkpoint_activations
from finetune.train.engines.base import Replicated
from finetune.train.optim import make_optimizer
from finetune.train.step import OptimiserStep, StepStats
from finetune.train.world import World

SMALL = AdapterConfig(
    attention=AttentionAdapterConfig(rank=4, alpha=8.0), experts=ExpertAdapterConfig(rank=4, alpha=8.0)
)


def samples(count: int = 8) -> list[Example]:
    """Random samples of ragged lengths."""
    rng = np.random.default_rng(7)
    made = []
    for number in range(count):
        length = int(rng.integers(20, 90))
        weights = (rng.random(length) < 0.3).astype(np.float32)
        weights[0], weights[-1] = 0, 1
        made.append(Example(rng.integers(0, 199_998, length).astype(np.int32), weights, f"s{number}", f"f:{number}"))
    return made


def new_base(directory: Path) -> Base:
    return build_base(Checkpoint.open(directory), torch.device("cpu"), torch.float32, experts_per_chunk=8)


def shake(parameters: dict[str, torch.nn.Parameter], size: float = 0.05) -> None:
    """Move every factor that starts at zero, so that every parameter has a gradient."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if not parameter.count_nonzero():
                parameter.copy_(torch.randn(parameter.shape, generator=g) * size)
            assert parameter.count_nonzero(), name


class Run:
    """A tiny base with an adapter, and one optimiser step of it."""

    def __init__(
        self,
        directory: Path,
        *,
        adapter: AdapterConfig = SMALL,
        accelerator: Any = None,
        checkpointed: bool = False,
        fresh: bool = False,
        selection: dict[int, tuple[int, ...]] | None = None,
        ranks: ExpertRanks | None = None,
        **trainer: Any,
    ) -> None:
        self.base = new_base(directory)
        self.adapter = attach_adapter(self.base, adapter, seed=0, selection=selection, ranks=ranks)
        parameters = self.adapter.parameters()
        if not fresh:
            shake(parameters)
        if checkpointed:
            checkpoint_activations(self.base.model)
        config = TrainerConfig(max_grad_norm=0, **trainer)
        accelerator = accelerator or Accelerator(cpu=True)
        optimizer = make_optimizer(parameters, config)
        self.gradients: dict[str, Tensor] = {}
        world = AcceleratorWorld(
            getattr(accelerator, "process_index", 0), accelerator.num_processes, accelerator=accelerator
        )
        engine = Replicated(parameters, optimizer, config, accelerator, world)
        self.step = OptimiserStep(config, self.base, engine, self.adapter)

    def __call__(self, batches: list[Batch]) -> StepStats:
        def keep() -> None:
            parameters = self.adapter.parameters()
            self.gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}

        return self.step(batches, 1e-3, 1, before_update=keep)


@dataclass(frozen=True)
class AcceleratorWorld(World):
    """Ranks whose small messages go through an accelerator, real or made of threads."""

    accelerator: Any = None

    def all_reduce_sum(self, *values: float) -> list[float]:
        summed: list[float] = self.accelerator.reduce(torch.tensor(values, dtype=torch.float64), "sum").tolist()
        return summed

    def all_reduce_max(self, value: int) -> int:
        """Of zeros and ones."""
        return int(self.all_reduce_sum(value)[0] > 0)


class Together:
    """Stands for several processes' accelerators: threads that add up what they reduce, like an all-reduce."""

    def __init__(self, count: int) -> None:
        self.count, self.barrier = count, threading.Barrier(count, timeout=120)
        self.values: list[Any] = [None] * count

    def accelerator(self, rank: int) -> Any:
        return _Member(self, rank)

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        results: list[Any] = [None] * self.count

        def one(rank: int) -> None:
            try:
                results[rank] = work(rank)
            except BaseException:
                self.barrier.abort()
                raise

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


class _Member:
    def __init__(self, together: Together, rank: int) -> None:
        self.together, self.rank, self.num_processes = together, rank, together.count

    def reduce(self, value: Tensor, how: str) -> Tensor:
        assert how in ("sum", "mean")
        together = self.together
        together.values[self.rank] = value
        together.barrier.wait()
        total = torch.stack(list(together.values)).sum(0) / (together.count if how == "mean" else 1)
        together.barrier.wait()
        return total

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip_grad_norm_(self, parameters: Any, limit: float) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(list(parameters), limit)
