"""Conditions on several keys at once: contradictions, and settings that would have no effect.

The ranges of single keys are part of the schema's types. Conditions on experts and routers are in expert_selection.py,
beside the forms that `select` and `rank_by` take.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from functools import reduce

from finetune.config.expert_selection import expert_problems
from finetune.config.lint import Problem
from finetune.config.paths import HUB_PREFIX, matching_files, resolve_data_path
from finetune.config.schema import DataConfig, DpoConfig, PreferenceConfig, RunConfig, SourceConfig
from finetune.config.schema_paths import KeyPath

SHARDED_BASE = ("zero3", "fsdp2")
DEEPSPEED = ("zero1", "zero2", "zero3")
MAX_BALANCE_COEFFICIENT = 0.1


def broken_rules(config: RunConfig) -> Iterator[Problem]:
    """Find what is wrong with a configuration whose types and ranges are right.

    Yields:
        A problem for each contradiction and each setting that would have no effect.
    """
    yield from _names(config)
    yield from _sources(config)
    yield from _rendering(config.data)
    yield from _objective(config)
    yield from _adapter(config)
    yield from expert_problems(config)
    yield from _trainer(config)
    yield from _distributed(config)
    yield from _memory(config)
    yield from _evaluation(config)


def _names(config: RunConfig) -> Iterator[Problem]:
    if config.name is not None and (config.name in ("", ".", "..") or "/" in config.name or "\\" in config.name):
        yield Problem(("name",), f"is {config.name!r}, must be a directory's name without a slash")
    for path in (("output_dir",), ("model", "path")):
        if not reduce(getattr, path, config).strip():  # type: ignore[attr-defined]
            yield Problem(path, "is empty")


def _sources(config: RunConfig) -> Iterator[Problem]:
    data = config.data
    if not data.train:
        yield Problem(("data", "train"), "names no source", "write data.train.NAME.path=FILE.jsonl")
    for split in ("train", "validation", "test"):
        for name, source in getattr(data, split).items():
            path = ("data", split, name)
            if not source.path.strip():
                yield Problem((*path, "path"), "is empty")
            yield from _source_without_effect(path, source)
    if data.validation_split.key is not None and data.validation:
        yield Problem(
            ("data", "validation_split"),
            "takes validation records from the training sources, but data.validation names sources too",
            "keep one of the two",
        )
    for split in ("validation", "test"):
        for name, held_out in getattr(data, split).items():
            for train_name, trained in data.train.items():
                if _overlap(held_out, trained):
                    yield Problem(
                        ("data", split, name),
                        f"reads records that data.train.{train_name} trains on",
                        f"give both a `where` on the same field with different values, or other files ({trained.path})",
                    )
    yield from _date(config)


def _source_without_effect(path: KeyPath, source: SourceConfig) -> Iterator[Problem]:
    """Find keys of a source that would have no effect."""
    if source.weight != 1 and path[1] != "train":
        yield Problem((*path, "weight"), "has no effect: only sources in data.train are mixed", "remove it")
    if not source.path.startswith(HUB_PREFIX):
        for key in ("subset", "revision", "streaming"):
            if getattr(source, key):
                what = f"has no effect: {source.path} is not {HUB_PREFIX}OWNER/NAME"
                yield Problem((*path, key), what, "remove it")


def _overlap(one: SourceConfig, other: SourceConfig) -> bool:
    """Whether two sources can give the same record: a file in common, and no field on which their `where` differ."""
    same = resolve_data_path(one.path).resolve() == resolve_data_path(other.path).resolve()
    if not same and not set(matching_files(one.path)) & set(matching_files(other.path)):
        return False
    if same and one.split != other.split and None not in (one.split, other.split):
        return False
    return not any(one.where[key] != other.where[key] for key in one.where.keys() & other.where.keys())


def _date(config: RunConfig) -> Iterator[Problem]:
    given = config.data.conversation_date
    try:
        if len(given) != len("2025-06-28"):
            raise ValueError
        datetime.date.fromisoformat(given)
    except ValueError:
        yield Problem(("data", "conversation_date"), f"is {given!r}, must be a date such as 2025-06-28")


def _rendering(data: DataConfig) -> Iterator[Problem]:
    loss = data.loss
    if not any((loss.analysis, loss.commentary, loss.tool_call, loss.final)):
        yield Problem(("data", "loss"), "trains nothing: every weight is 0", "give one of them a weight")
    if data.earlier_thinking == "split" and loss.turns == "last":
        yield Problem(
            ("data", "loss", "turns"),
            "is last, but data.earlier_thinking=split makes an example of every turn",
            "leave data.loss.turns out, or write data.earlier_thinking=drop",
        )
    if data.convention == "template":
        if data.earlier_thinking == "keep":
            yield Problem(
                ("data", "earlier_thinking"),
                "is keep, but the template always drops earlier thinking",
                "write data.earlier_thinking=split to train all of it, or data.convention=harmony",
            )
        if data.tool_call_type == "constrain":
            yield Problem(
                ("data", "tool_call_type"),
                "is constrain, but the template writes json",
                "leave data.tool_call_type out, or write data.convention=harmony",
            )
    if data.model_identity is not None and not data.model_identity.strip():
        yield Problem(("data", "model_identity"), "is empty", "leave it out for the published one")


def _objective(config: RunConfig) -> Iterator[Problem]:
    """Find settings that a preference objective cannot use or would ignore."""
    objective, data = config.objective, config.data
    if not isinstance(objective, PreferenceConfig):
        return
    kind = objective.kind
    for channel in ("analysis", "commentary", "tool_call", "final"):
        weight = getattr(data.loss, channel)
        if weight not in (0, 1):
            what = f"is {weight:g}, but {kind} compares log-probabilities of tokens, which count or do not"
            yield Problem(("data", "loss", channel), what, "write 0 or 1")
    if data.pairs == "listwise":
        what = f"is listwise, but {kind} compares pairs"
        yield Problem(("data", "pairs"), what, "write best_worst (one pair per record) or all")
    if isinstance(objective, DpoConfig):
        yield from _dpo(config, objective)


def _dpo(config: RunConfig, objective: DpoConfig) -> Iterator[Problem]:
    losses = objective.losses
    if objective.loss in objective.add:
        yield Problem(("objective", "add"), f"has {objective.loss} once more", "give it objective.loss_weight")
    if not losses.keys() - {"sft"}:
        yield Problem(
            ("objective", "loss"),
            "is sft alone, which compares nothing",
            "choose another loss with objective.add={sft: 1.0}, or train on chosen answers with objective: sft",
        )
    if objective.label_smoothing and not losses.keys() & {"sigmoid", "robust", "sigmoid_norm"}:
        what = f"is {objective.label_smoothing:g}, but {', '.join(losses)} has no use for it"
        yield Problem(("objective", "label_smoothing"), what, "write 0, or choose sigmoid, robust or sigmoid_norm")
    if objective.reference == "none":
        return
    if config.adapter.attention.dropout:
        yield Problem(
            ("adapter", "attention", "dropout"),
            f"is {config.adapter.attention.dropout:g}, which the reference does not have: rewards would be noise",
            "write 0, or objective.reference=none",
        )
    if config.adapter.init_from is not None:
        yield Problem(
            ("adapter", "init_from"),
            "is set, but the reference is the base without any adapter: training would start far from it",
            "merge the first adapter into the base and train on that, or write objective.reference=none",
        )


def _adapter(config: RunConfig) -> Iterator[Problem]:
    attention, experts = config.adapter.attention, config.adapter.experts
    targets: KeyPath = ("adapter", "attention", "targets")
    if attention.rank == 0 and experts.rank == 0 and config.adapter.router.mode == "frozen":
        yield Problem(
            ("adapter",),
            "trains nothing: adapter.attention.rank and adapter.experts.rank are both 0 and routers are frozen",
            "give one of them a rank, or choose adapter=attention_and_experts",
        )
    if attention.rank > 0 and not attention.targets:
        yield Problem(targets, "is empty", "to leave attention frozen write adapter.attention.rank=0")
    if len(set(attention.targets)) != len(attention.targets):
        yield Problem(targets, f"names a projection twice: {', '.join(attention.targets)}")
    if attention.rank == 0 and attention.dropout:
        yield Problem(("adapter", "attention", "dropout"), "is set, but adapter.attention.rank is 0")
    if experts.dropout:
        yield Problem(
            ("adapter", "experts", "dropout"),
            f"is {experts.dropout}, must be 0: PEFT's format adapts expert weights as W + BA, in which inputs of BA "
            "alone cannot be dropped, and PEFT refuses such a file",
            "use adapter.attention.dropout, fewer epochs or a lower adapter.experts.rank against overfitting",
        )
    layers = config.adapter.layers
    if layers is not None and not 0 <= layers[0] <= layers[1]:
        yield Problem(
            ("adapter", "layers"),
            f"is {list(layers)}, must be [first, last] with 0 <= first <= last",
            "layers count from 0 and both ends are included: [12, 23] is the upper half of 20b",
        )


def _trainer(config: RunConfig) -> Iterator[Problem]:
    trainer = config.trainer
    coefficient = trainer.router_balance_coefficient
    if coefficient > MAX_BALANCE_COEFFICIENT and not trainer.force_router_balance_coefficient:
        yield Problem(
            ("trainer", "router_balance_coefficient"),
            f"is {coefficient}, above {MAX_BALANCE_COEFFICIENT}: the published config.json says 0.9, but that is a "
            "pre-training value and ruins a fine-tune",
            "write 0.001, or set trainer.force_router_balance_coefficient=true if you mean it",
        )
    if trainer.activation_offload and not trainer.activation_checkpointing:
        yield Problem(
            ("trainer", "activation_offload"),
            "has no effect without trainer.activation_checkpointing: it moves what checkpointing saves",
            "set trainer.activation_checkpointing=true",
        )
    if config.logging.mode == "online" and config.logging.tracker == "none":
        yield Problem(("logging", "mode"), "is online, but there is no tracker", "choose logging=wandb")
    if config.logging.mode == "online" and config.logging.tracker == "tensorboard":
        yield Problem(("logging", "mode"), "is online, but tensorboard only writes files", "set logging.mode=offline")


def _distributed(config: RunConfig) -> Iterator[Problem]:
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
            "write the number of GPUs, or choose distributed=single",
        )
    if config.trainer.halve_micro_batch_on_oom and kind not in ("single", "ddp"):
        yield Problem(
            ("trainer", "halve_micro_batch_on_oom"),
            f"is true, but with distributed.kind={kind} ranks exchange tensors during a micro-batch: a rank that is "
            "out of memory cannot repeat it without the others",
            "set it to false and lower trainer.micro_batch_size yourself, or use distributed=ddp",
        )
    if config.trainer.on_nonfinite == "skip" and kind in DEEPSPEED:
        yield Problem(
            ("trainer", "on_nonfinite"),
            f"is skip, but with distributed.kind={kind} DeepSpeed owns the gradients and cannot drop those of a step",
            "write stop, or use distributed=ddp or distributed=fsdp2",
        )
    if config.model.embedding_on_cpu and kind in DEEPSPEED:
        yield Problem(
            ("model", "embedding_on_cpu"),
            f"is true, but with distributed.kind={kind} DeepSpeed moves the whole model to the GPU, the embedding too",
            "write false, or use distributed=ddp or distributed=fsdp2",
        )
    if kind not in ("single", "ddp"):
        yield from _sharded_adapter(config)
    if kind in SHARDED_BASE:
        for name, value, plain in (
            ("expert_storage", config.model.expert_storage, "mxfp4"),
            ("attention_storage", config.model.attention_storage, "compute"),
        ):
            if value != plain:
                what = f"is {value}, but distributed.kind={kind} shards layers in the checkpoint's own format"
                yield Problem(("model", name), what, f"write {plain}, or use distributed=ddp")


def _sharded_adapter(config: RunConfig) -> Iterator[Problem]:
    """Find settings that engines which shard the adapter lack: it is float32 there, with torch's AdamW."""
    trainer, kind = config.trainer, config.distributed.kind
    for path, value, plain in (
        (("trainer", "optimizer"), trainer.optimizer, "adamw"),
        (("trainer", "optimizer_states_on_cpu"), trainer.optimizer_states_on_cpu, False),
        (("adapter", "dtype"), config.adapter.dtype, "float32"),
    ):
        if value != plain:
            what = f"is {value}, but distributed.kind={kind} keeps the adapter in float32, with AdamW's states"
            yield Problem(path, what, f"write {str(plain).lower()}, or use distributed=ddp")


def _memory(config: RunConfig) -> Iterator[Problem]:
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
            f"is true, but the states of {trainer.optimizer} already move between GPU and host",
            f"remove it, or write trainer.optimizer={trainer.optimizer.removeprefix('paged_')}",
        )
    if trainer.gradient_dtype == "bfloat16" and config.adapter.dtype != "bfloat16":
        yield Problem(
            ("trainer", "gradient_dtype"),
            f"is bfloat16, but adapter.dtype is {config.adapter.dtype}",
            "set adapter.dtype=bfloat16 as well, or leave gradients in float32",
        )


def _evaluation(config: RunConfig) -> Iterator[Problem]:
    evaluate, data = config.evaluate, config.data
    validates = bool(data.validation) or data.validation_split.key is not None
    watched = validates and evaluate.every_steps is not None
    needs = "needs a source in data.validation (or data.validation_split.key) and evaluate.every_steps"
    if config.save.best_metric != "none" and not watched:
        yield Problem(("save", "best_metric"), f"is {config.save.best_metric}: it {needs}")
    if config.trainer.early_stop_patience is not None and config.save.best_metric == "none":
        yield Problem(
            ("trainer", "early_stop_patience"), "has no metric to watch", "set save.best_metric=validation_loss"
        )
    if evaluate.every_steps is not None and not validates:
        yield Problem(("evaluate", "every_steps"), "is set, but data.validation names no source")
    if evaluate.validation_examples is not None and not validates:
        yield Problem(("evaluate", "validation_examples"), "is set, but data.validation names no source")
    if evaluate.test_examples is not None and not data.test:
        yield Problem(("evaluate", "test_examples"), "is set, but data.test names no source")
    if evaluate.labels == "always" and not data.test:
        yield Problem(("evaluate", "labels"), "is always, but data.test names no source")
