"""The session of a run: data, batch plan, base and adapter in memory, opened and checked before anything is written."""

from __future__ import annotations

import os
import platform
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from finetune import __version__, log
from finetune.adapters.attach import attach_adapter
from finetune.adapters.lora import Adapter
from finetune.adapters.sites import describe_sites, ranks_by_expert
from finetune.adapters.store import read_adapter_into
from finetune.config.derive import check_inputs, router_notes
from finetune.config.expert_selection import ExpertScores
from finetune.config.rules import SHARDED_BASE
from finetune.config.schema import PreferenceConfig, RunConfig
from finetune.data.control_text import control_text_lines
from finetune.data.dataset import Split, load_split, report_split
from finetune.data.groups import Groups
from finetune.data.harmony.tokenizer import TOKENIZER_JSON, check_tokenizer
from finetune.data.packing import packing_efficiency
from finetune.data.plan import BatchPlan
from finetune.data.preferences import check_forms
from finetune.data.sources import split_names
from finetune.errors import ConfigError, InputError, MachineError
from finetune.evaluate.evalset import EvalSet, choose_test_set
from finetune.evaluate.expert_scores import choose_experts
from finetune.files import sha256_of
from finetune.model.attention import attention_kernel
from finetune.model.build import Base
from finetune.model.checkpoint import Checkpoint
from finetune.model.experts import expert_kernel
from finetune.model.forward import check_packing
from finetune.model.hub import BaseLocation, check_reachable, locate_base
from finetune.model.open import choose_device, open_base
from finetune.model.shards import ShardedLayers
from finetune.model.storage import storage_table
from finetune.objectives.router import describe_router_reach
from finetune.train.optim import check_optimizer, describe_optimizer
from finetune.train.world import SINGLE_PROCESS, World

_FOREIGN_SETTINGS = (
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_MEGATRON_LM",
)


@dataclass(frozen=True)
class Session:
    """The objects of a run, in memory.

    Attributes:
        config: the recipe.
        location: of the base's files.
        base: frozen, with `adapter` attached.
        splits: `train` and, where the recipe has them, `validation` and `test`.
        plan: the sequences of each step.
        accelerator: device and trackers.
        world: the ranks of the run.
        test: examples scored before and after; None without a test split.
        scores: scores of the experts by which some are adapted; None: all are.
        tokenizer: SHA-256 of the base's tokenizer.json; None if it has none.
    """

    config: RunConfig
    location: BaseLocation
    base: Base
    adapter: Adapter
    splits: dict[str, Split]
    plan: BatchPlan
    accelerator: Accelerator
    world: World
    test: EvalSet | None
    scores: ExpertScores | None = None
    tokenizer: str | None = None


def open_session(config: RunConfig, world: World = SINGLE_PROCESS, *, resumed: bool = False) -> Session:
    """Read data and base, attach the adapter, and check all of it.

    Args:
        config: the recipe.
        world: the ranks of the run; each opens a session of its own.
        resumed: a checkpoint will fill the adapter, so `adapter.init_from` is not read again.

    Raises:
        FinetuneError: a fault of data, base, adapter or ranks; nothing was written yet.
    """
    if resumed:
        config = replace(config, adapter=replace(config.adapter, init_from=None))
    check_inputs(config)
    device, accelerator = choose_device(config.model), _accelerator(config, world)
    _check_offload(config, device)
    if device.type == "cuda":
        log.info(_describe_allocator())
    check_optimizer(config, device)
    if world.is_main:
        check_reachable(config.model.path, config.model.revision)
    splits: dict[str, Split] = {name: load_split(config.data, name) for name in split_names(config.data)}
    for split in splits.values():
        report_split(split)
        check_forms(split.name, split.stats.forms, config.objective.kind, split.stats.labels)
    train = splits["train"]
    test = choose_test_set(splits["test"], config, train.stats.answers) if "test" in splits else None
    plan = BatchPlan(
        train.examples,
        config.data,
        config.trainer,
        config.seed,
        source_sizes=train.stats.source_sizes,
        rank=world.rank,
        world_size=world.world_size,
        groups=_groups(train, config),
    )
    _describe_plan(plan, config)
    location = locate_base(config.model.path, config.model.revision)
    check_tokenizer(location.directory, refuse=True)
    tokenizer = location.directory / TOKENIZER_JSON
    tokenizer_sha256 = sha256_of(tokenizer) if tokenizer.is_file() else None
    base = _open_base(location, config, device, world)
    scores = _expert_scores(base, location.name, train, config, accelerator)
    adapter = _attach(base, config, scores)
    world.assert_same("the base", base.identity)
    for split_name, split in splits.items():
        world.assert_same(f"the {split_name} data", split.stats.fingerprint)
    return Session(config, location, base, adapter, splits, plan, accelerator, world, test, scores, tokenizer_sha256)


def _groups(train: Split, config: RunConfig) -> Groups | None:
    """The answers that a preference objective compares; None for other objectives.

    Raises:
        InputError: no record has two answers with different scores.
    """
    if not isinstance(config.objective, PreferenceConfig):
        return None
    groups = Groups.of(train.examples, train.first_examples(), config.data.pairs)
    left_out = len(train.first_examples()) - len(groups.members)
    if not groups.members:
        raise InputError("data.train has no pair: no record has two answers with different scores")
    shared, separate = (sum(groups.lengths(train.examples, share_prompts=share)) for share in (True, False))
    computed = "prompts are computed once" if config.data.share_prompts else "prompts are computed for every answer"
    log.info(
        f"pairs: {sum(map(len, groups.pairs)):,} of {len(groups.members):,} records"
        + (f"; {left_out:,} records whose answers all have one score are left out" if left_out else "")
        + f"; {separate:,} tokens with a prompt per answer, {shared:,} with shared prompts; {computed}"
    )
    return groups


def _open_base(location: BaseLocation, config: RunConfig, device: torch.device, world: World) -> Base:
    """Load and check the base."""
    checkpoint = Checkpoint.open(location.directory)
    _check_length(checkpoint, config)
    if config.trainer.activation_offload:
        log.info(_describe_offload(checkpoint, config))
    is_sharded = config.distributed.kind in SHARDED_BASE
    shards = ShardedLayers(world.rank, world.world_size, device) if is_sharded else None
    base = open_base(config.model, checkpoint=checkpoint, shards=shards)
    if config.data.pack:
        leak = check_packing(base.model)
        log.info(f"packing check passed: cross-sample leakage {leak:.1e} of an unmasked sequence")
    return base


def _expert_scores(
    base: Base, name: str, split: Split, config: RunConfig, accelerator: Accelerator
) -> ExpertScores | None:
    """The scores by which experts are adapted; from rank 0, since sums may differ between ranks in the last bit."""
    if not config.adapter.experts.rank:
        return None
    scores = choose_experts(base, name, split.examples, config.data, config.adapter)
    if accelerator.num_processes > 1:
        (scores,) = broadcast_object_list([scores])
    return scores


def _attach(base: Base, config: RunConfig, scores: ExpertScores | None) -> Adapter:
    """Attach the adapter, fill it from `adapter.init_from`, and describe it."""
    selection = None if scores is None else scores.selected
    ranks = None if scores is None else ranks_by_expert(scores)
    adapter = attach_adapter(base, config.adapter, seed=config.seed, selection=selection, ranks=ranks)
    if config.adapter.init_from is not None:
        read_adapter_into(Path(config.adapter.init_from), adapter, config.adapter, base.identity, base.storage_changes)
        log.info(f"adapter: training starts from {config.adapter.init_from}")
    arch = base.checkpoint.arch
    log.info("adapter sites:\n" + describe_sites(list(adapter.sites), arch))
    log.info(describe_optimizer(config, adapter.parameters()))
    if config.trainer.router_balance_coefficient or config.trainer.router_z_loss_coefficient:
        log.info(describe_router_reach(adapter.sites, arch, config.adapter.router.mode))
    for note in router_notes(config):
        log.info(note)
    return adapter


def manifest_record(session: Session) -> dict[str, Any]:
    """The entries of manifest.json at the start of a run."""
    sites = session.adapter.sites
    return {
        "finetune_version": __version__,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "base": {
            "name": session.location.name,
            "revision": session.location.revision,
            "identity": session.base.identity,
            "tokenizer_sha256": session.tokenizer,
            "expert_rounding_error": session.base.expert_rounding_error,
            "expert_kernel": expert_kernel(session.base.model),
            "held_as": session.base.storage_changes,
            "storage": [asdict(line) for line in storage_table(session.base.model)],
        },
        "data": {
            name: {
                "rows": len(split.examples),
                "tokens": split.stats.num_tokens,
                "trained_tokens": split.stats.num_trained_tokens,
                "skipped_rows": len(split.stats.bad_records),
                "control_text": list(control_text_lines(split.stats.control_text)),
                "fingerprint": split.stats.fingerprint,
            }
            for name, split in session.splits.items()
        },
        "adapter_parameters": {
            kind: sum(site.num_parameters for site in sites if site.kind == kind)
            for kind in ("attention", "router", "experts")
            if kind != "router" or session.config.adapter.router.mode != "frozen"
        },
        "optimizer": describe_optimizer(session.config, session.adapter.parameters()),
        "total_steps": session.plan.total_steps,
        "working_directory": str(Path.cwd()),
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "device": str(session.base.device),
            "compute_dtype": str(session.base.compute_dtype),
            "attention_kernel": attention_kernel(session.base.model),
            "platform": platform.platform(),
            "command": log.without_passwords(" ".join(sys.argv)),
        },
    }


def _accelerator(config: RunConfig, world: World) -> Accelerator:
    """Make Accelerate's view of the same ranks, and check it.

    Accelerate reads ACCELERATE_* variables, which a launcher or a shell may have set; those that would change the
    training without the recipe saying so are refused.

    Raises:
        MachineError: another topology than the recipe's.
    """
    set_here = sorted(name for name in _FOREIGN_SETTINGS if os.environ.get(name, "false") not in ("false", "no", "1"))
    if set_here:
        raise MachineError(
            f"{', '.join(set_here)} would override the recipe",
            why="accumulation, precision and engine are set in the recipe alone",
            fix=f"unset {' '.join(set_here)}",
        )
    on_cpu = choose_device(config.model).type == "cpu"
    accelerator = Accelerator(cpu=on_cpu, mixed_precision="no")
    if (accelerator.num_processes, accelerator.process_index) != (world.world_size, world.rank):
        raise MachineError(
            f"Accelerate sees rank {accelerator.process_index} of {accelerator.num_processes}, this is {world.rank} of "
            f"{world.world_size}",
            why="processes that do not know of each other train separate adapters and overwrite one another",
            fix="start it with `finetune train`, without a launcher",
        )
    return accelerator


def _describe_plan(plan: BatchPlan, config: RunConfig) -> None:
    trainer, rows = config.trainer, plan.sequences(0)
    count = config.distributed.num_processes
    ranks = f" x {count} ranks" if count > 1 else ""
    efficiency = packing_efficiency(plan.lengths, rows, config.data.max_length)
    log.info(
        f"steps: {len(rows):,} sequences of {config.data.max_length:,} tokens per epoch, {efficiency:.1%} filled; "
        f"{trainer.micro_batch_size} sequences x {trainer.gradient_accumulation_steps} micro-batches{ranks} = "
        f"{trainer.micro_batch_size * trainer.gradient_accumulation_steps * count} sequences per step => "
        f"{plan.total_steps:,} steps for {trainer.epochs:g} epochs"
    )


def _check_length(checkpoint: Checkpoint, config: RunConfig) -> None:
    longest = checkpoint.config.get("max_position_embeddings", config.data.max_length)
    if config.data.max_length > longest:
        raise ConfigError(
            f"data.max_length is {config.data.max_length:,}, the model has {longest:,} positions",
            fix=f"set data.max_length={longest} or less",
        )


def _check_offload(config: RunConfig, device: torch.device) -> None:
    if config.trainer.activation_offload and device.type == "cpu":
        raise ConfigError(
            "trainer.activation_offload is true, but the model is on a CPU",
            why="it moves activations to the CPU's memory, where they are already",
            fix="leave it false, or set model.device=cuda on a machine with a GPU",
        )


def _describe_allocator() -> str:
    """The settings of torch's GPU allocator (`finetune.cli.main` sets them unless the user did)."""
    names = [name for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF") if name in os.environ]
    settings = " ".join(f"{name}={os.environ[name]}" for name in names)
    return f"GPU memory: {settings or 'allocator settings are torch defaults'}"


def _describe_offload(checkpoint: Checkpoint, config: RunConfig) -> str:
    arch, tokens = checkpoint.arch, config.trainer.micro_batch_size * config.data.max_length
    gib = arch.num_layers * tokens * arch.hidden * 2 / 2**30  # bfloat16, as on every GPU
    return f"activation checkpoints: in the CPU's memory, {gib:.2f} GiB of it (pinned) for {tokens:,} tokens at a time"
