"""Rules about what saves memory: settings that contradict each other or would do nothing."""

from __future__ import annotations

from collections.abc import Iterator

from finetune.config.problems import Problem
from finetune.config.schema import RunConfig


def memory_problems(config: RunConfig) -> Iterator[Problem]:
    """Find contradictions among optimiser, dtypes and device.

    Yields:
        A problem for each.
    """
    trainer = config.trainer
    paged = trainer.optimizer.startswith("paged")
    if paged and config.model.device == "cpu":
        yield Problem(
            ("trainer", "optimizer"),
            f"is {trainer.optimizer}, but model.device is cpu, where bitsandbytes silently pages nothing",
            f"write {trainer.optimizer.removeprefix('paged_')}",
        )
    if paged and trainer.optimizer_states_on_cpu:
        yield Problem(
            ("trainer", "optimizer_states_on_cpu"),
            f"is true, but the states of {trainer.optimizer} move between GPU and host by themselves",
            f"remove it, or write trainer.optimizer={trainer.optimizer.removeprefix('paged_')}",
        )
    if trainer.gradient_dtype == "bfloat16" and config.adapter.dtype != "bfloat16":
        yield Problem(
            ("trainer", "gradient_dtype"),
            f"is bfloat16, but adapter.dtype is {config.adapter.dtype}",
            "set adapter.dtype=bfloat16 as well, or leave gradients in float32",
        )
