"""Which engine carries out a recipe's `distributed.kind`, made and checked."""

from __future__ import annotations

from finetune.train.engine import Engine, Replicated
from finetune.train.session import Session
from finetune.train.step import make_optimizer


def open_engine(session: Session) -> Engine:
    """Make the engine that the recipe asks for.

    Raises:
        MachineError: it cannot run here.
    """
    trainer = session.config.trainer
    parameters = session.adapter.parameters()
    optimizer = make_optimizer(parameters, trainer)
    return Replicated(parameters, optimizer, trainer, session.accelerator, session.processes)
