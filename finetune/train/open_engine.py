"""Which engine carries out a recipe's `distributed.kind`, made and checked."""

from __future__ import annotations

from accelerate import Accelerator

from finetune.adapters.lora import Adapter
from finetune.config.deepspeed import deepspeed_settings
from finetune.config.schema import RunConfig
from finetune.model.build import Base
from finetune.train.engine import Engine, Replicated
from finetune.train.optimisers import make_optimizer
from finetune.train.processes import Processes


def open_engine(
    config: RunConfig, base: Base, adapter: Adapter, accelerator: Accelerator, processes: Processes
) -> Engine:
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
        from finetune.train.engine_fsdp2 import FullySharded

        return FullySharded(base, adapter, trainer, accelerator, processes)
    if settings := deepspeed_settings(config):
        from finetune.train.engine_zero import ZeroSharded

        return ZeroSharded(base, adapter, trainer, accelerator, processes, settings)
    parameters = adapter.parameters()
    optimizer = make_optimizer(parameters, trainer, seed=config.seed)
    return Replicated(parameters, optimizer, trainer, accelerator, processes)
