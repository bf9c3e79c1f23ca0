"""Which engine carries out a recipe's `distributed.kind`, made and checked."""

from __future__ import annotations

from finetune.config.deepspeed import deepspeed_settings
from finetune.train.engine import Engine, Replicated
from finetune.train.session import Session
from finetune.train.step import make_optimizer


def open_engine(session: Session) -> Engine:
    """Make the engine that the recipe asks for.

    Raises:
        MachineError: it cannot run here.
    """
    trainer, processes = session.config.trainer, session.processes
    kind = session.config.distributed.kind
    if kind == "fsdp2":
        from finetune.train.engine_fsdp2 import FullySharded

        return FullySharded(session.base, session.adapter, trainer, processes)
    if settings := deepspeed_settings(session.config):
        from finetune.train.engine_zero import ZeroSharded

        return ZeroSharded(session.base, session.adapter, trainer, processes, settings)
    parameters = session.adapter.parameters()
    optimizer = make_optimizer(parameters, trainer)
    return Replicated(parameters, optimizer, trainer, session.accelerator, processes)
