"""Work of one rank in tests/train/test_distributed.py: the same few steps under one topology after another.

    python distributed_worker.py BASE OUT JOB...   under torchrun's environment variables

Each job is KIND, or KIND>KIND to switch to another one in the middle, or KIND:FAULT with a fault below.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from finetune.adapters.attach import attach_adapter
from finetune.adapters.lora import Adapter
from finetune.config.rules import SHARDED_BASE
from finetune.config.schema import (
    AdapterConfig,
    AttentionAdapterConfig,
    DataConfig,
    DistributedConfig,
    ExpertAdapterConfig,
    ModelConfig,
    RunConfig,
    TrainerConfig,
)
from finetune.data.harmony.render import Example
from finetune.data.plan import BatchPlan
from finetune.errors import CheckError
from finetune.model.build import Base, build_base, check_unchanged
from finetune.model.checkpoint import Checkpoint
from finetune.model.forward import checkpoint_activations
from finetune.model.shards import ShardedLayers
from finetune.objectives import base as objective_base
from finetune.train.engines.base import Engine, open_engine
from finetune.train.failures import digest_of
from finetune.train.step import OptimiserStep
from finetune.train.world import World, join_world

NUM_SAMPLES = 7  # in steps of four micro-steps: the second of an epoch is partial, and one process has padding alone
MICRO_STEPS_IN_ALL = 4
EPOCHS = 2


@dataclass
class Outcome:
    """Result of a job, the same on every rank."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    adapter: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, object] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        save_file(self.adapter, path.with_suffix(".safetensors"))
        path.with_suffix(".json").write_text(json.dumps([self.losses, self.norms, self.facts]))


def samples() -> list[Example]:
    """Ragged lengths, ragged numbers of trained tokens, weights other than 0 and 1."""
    rng = np.random.default_rng(3)
    made = []
    for number in range(NUM_SAMPLES):
        length = int(rng.integers(20, 90))
        weights = np.where(rng.random(length) < 0.3, rng.choice([0.5, 1.0], length), 0).astype(np.float32)
        weights[0], weights[-1] = 0, 1
        made.append(Example(rng.integers(0, 199_998, length).astype(np.int32), weights, f"s{number}", f"f:{number}"))
    return made


def recipe(kind: str, count: int, fault: str = "") -> RunConfig:
    """Four sequences per step for any world size: with `oom` two sequences per micro-batch, else one."""
    rows = 2 if fault == "oom" else 1
    return RunConfig(
        model=ModelConfig(path="unused", device="cpu"),
        data=DataConfig(train={}, pack=False),
        adapter=AdapterConfig(
            attention=AttentionAdapterConfig(rank=4, alpha=8.0), experts=ExpertAdapterConfig(rank=3, alpha=6.0)
        ),
        trainer=TrainerConfig(
            epochs=EPOCHS,
            micro_batch_size=rows,
            gradient_accumulation_steps=MICRO_STEPS_IN_ALL // count // rows,
            learning_rate=1e-3,
            # Adam divides a gradient by its size: at the usual 1e-8 one of 62,720 elements, whose gradient is about
            # that small, took another step (3.5e-5 away) under zero3, which sums in another order.
            adam_eps=1e-6,
            router_balance_coefficient=0.05,
            router_balance_scope="step",
            activation_checkpointing=fault != "no-checkpointing",
            halve_micro_batch_on_oom=fault == "oom",
            max_grad_norm=0.5,
        ),
        distributed=DistributedConfig(kind=kind, num_processes=count),
    )


def open_base(directory: Path, config: RunConfig, world: World) -> tuple[Base, Adapter]:
    """A base with a non-zero adapter, so that every factor has a gradient."""
    device = torch.device("cpu")
    deals_out = config.distributed.kind in SHARDED_BASE
    shards = ShardedLayers(world.rank, world.world_size, device) if deals_out else None
    base = build_base(Checkpoint.open(directory), device, torch.float32, 3, shards=shards)
    adapter = attach_adapter(base, config.adapter, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapter.parameters().items():
            if name.endswith("b"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    if config.trainer.activation_checkpointing:
        checkpoint_activations(base.model)
    return base, adapter


def train(
    directory: Path,
    kinds: list[str],
    world: World,
    *,
    fault: str = "",
    opened: tuple[Base, Adapter] | None = None,
) -> Outcome:
    """All steps, under the kinds in turn; on what `open_base` gave, where that is at hand."""
    outcome = Outcome()
    config = recipe(kinds[0], world.world_size, fault)
    plan = BatchPlan(samples(), config.data, config.trainer, 0, rank=world.rank, world_size=world.world_size)
    engine: Engine | None = None
    for number in range(plan.total_steps):
        turn = number * len(kinds) // plan.total_steps
        if engine is None or (turn > 0 and kinds[turn] != config.distributed.kind):
            before = engine
            config = recipe(kinds[turn], world.world_size, fault)
            base, adapter = opened or open_base(directory, config, world)
            engine = open_engine(config, base, adapter, Accelerator(cpu=True), world)
            if before is not None:
                engine.load(before.adapter_tensors(), before.optimizer_tensors())
            inject(engine, fault, world)
            step = OptimiserStep(config.trainer, base, engine, adapter)
        epoch, index = plan.position(number)
        batches = [plan.batch(micro) for micro in plan.steps(epoch)[index]]
        figures = step(batches, 1e-3, number + 1)
        outcome.losses.append(figures.loss)
        outcome.norms.append(figures.gradient_norm)
    assert engine is not None
    outcome.adapter = engine.adapter_tensors()
    outcome.facts = {"parts": step.parts} | facts_of(base, engine, world)
    return outcome


def inject(engine: Engine, fault: str, world: World) -> None:
    """Break one rank, so that comparisons fail."""
    reduce_gradients = engine.reduce_gradients

    def without_gradient() -> None:
        for parameter in engine.parameters.values():
            if parameter.grad is not None:
                parameter.grad.zero_()
        reduce_gradients()

    if fault == "drops" and world.rank == 1:
        engine.reduce_gradients = without_gradient  # type: ignore[method-assign]
    if fault == "alone":
        engine.reduce_gradients = lambda: None  # type: ignore[method-assign]


@contextmanager
def out_of_memory(world: World) -> Iterator[None]:
    """Raise out of memory on the second rank for more than one sequence."""
    original = objective_base.hidden_states

    def limited(model: Any, input_ids: Tensor, *others: Any) -> Tensor:
        if world.rank == 1 and len(input_ids) > 1:
            raise torch.OutOfMemoryError("made up for a test")
        return original(model, input_ids, *others)

    objective_base.hidden_states = limited
    try:
        yield
    finally:
        objective_base.hidden_states = original


def facts_of(base: Base, engine: Engine, world: World) -> dict[str, object]:
    facts: dict[str, object] = {"engine": engine.describe(), "identity": check_unchanged(base) == base.identity}
    try:
        world.assert_same("the adapter", digest_of(engine.adapter_tensors()))
        facts["agree"] = "yes"
    except CheckError as error:
        facts["agree"] = error.what
    if base.shards is not None:
        held = sum(len(share) for share in base.shards.stored)
        facts["held"], facts["all"] = held, sum(world.all_gather(held))
        if world.rank == 1:
            base.shards.stored[2][7] ^= 1  # the high byte of a float32: check_unchanged rounds to bfloat16
        try:
            check_unchanged(base)
            facts["flip"] = "not seen"
        except CheckError as error:
            facts["flip"] = error.what
    return facts


def main() -> None:
    directory, out, *jobs = sys.argv[1:]
    first = recipe("ddp", 2)
    world = join_world(replace(first, distributed=replace(first.distributed, timeout_s=100.0)))
    torch.set_num_threads(1)
    for job in jobs:
        kinds, _, fault = job.partition(":")
        with out_of_memory(world) if fault == "oom" else nullcontext():
            outcome = train(Path(directory), kinds.split(">"), world, fault=fault)
        if world.is_main:
            outcome.write(Path(out) / job.replace(">", "-").replace(":", "-"))
        world.barrier()
    world.destroy()


if __name__ == "__main__":
    main()
