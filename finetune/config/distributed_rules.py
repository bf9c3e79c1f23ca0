"""What must hold for several processes: the rules of `distributed` and of settings that not every kind can keep."""

from __future__ import annotations

from collections.abc import Iterator

from finetune.config.problems import Problem
from finetune.config.schema import RunConfig

SHARDED_BASE = ("zero3", "fsdp2")
DEEPSPEED = ("zero1", "zero2", "zero3")


def distributed_problems(config: RunConfig) -> Iterator[Problem]:
    """Find what contradicts the kind of topology."""
    distributed = config.distributed
    kind, processes = distributed.kind, distributed.num_processes
    if kind == "single" and processes != 1:
        yield Problem(
            ("distributed", "num_processes"),
            f"is {processes}, but distributed.kind=single is one process",
            "choose distributed=ddp (or zero2, zero3, fsdp2), or write 1",
        )
    if kind != "single" and processes == 1:
        yield Problem(
            ("distributed", "num_processes"),
            f"is 1, but distributed.kind={kind} is for several processes",
            "write how many, or choose distributed=single",
        )
    if config.trainer.halve_micro_batch_on_oom and kind not in ("single", "ddp"):
        yield Problem(
            ("trainer", "halve_micro_batch_on_oom"),
            f"is true, but with distributed.kind={kind} processes exchange tensors while they compute: one that is "
            "out of memory cannot begin a micro-step again without the others",
            "set it to false and lower trainer.micro_batch_size yourself, or use distributed=ddp",
        )
    if config.trainer.on_nonfinite == "skip" and kind in DEEPSPEED:
        yield Problem(
            ("trainer", "on_nonfinite"),
            f"is skip, but with distributed.kind={kind} DeepSpeed holds the gradients and cannot drop a step's",
            "write stop, or use distributed=ddp or distributed=fsdp2",
        )
    if kind not in ("single", "ddp"):
        yield from _plain_adapter(config)
    if kind in SHARDED_BASE:
        for name, value, plain in (
            ("expert_storage", config.model.expert_storage, "mxfp4"),
            ("attention_storage", config.model.attention_storage, "compute"),
        ):
            if value != plain:
                what = f"is {value}, and distributed.kind={kind} deals out layers as the checkpoint has them"
                yield Problem(("model", name), what, f"write {plain}, or use distributed=ddp")


def _plain_adapter(config: RunConfig) -> Iterator[Problem]:
    """Engines that deal out the adapter hold it in float32, with torch's AdamW."""
    trainer, kind = config.trainer, config.distributed.kind
    for path, value, plain in (
        (("trainer", "optimizer"), trainer.optimizer, "adamw"),
        (("trainer", "optimizer_states_on_cpu"), trainer.optimizer_states_on_cpu, False),
        (("adapter", "dtype"), config.adapter.dtype, "float32"),
    ):
        if value != plain:
            what = f"is {value}, and distributed.kind={kind} holds the adapter in float32, with AdamW's states there"
            yield Problem(path, what, f"write {str(plain).lower()}, or use distributed=ddp")
