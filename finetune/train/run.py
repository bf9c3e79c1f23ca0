"""End to end: data, base, adapter, before-figures, training, after-figures, adapter on disk, read-back, report."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from finetune import __version__
from finetune.adapters.files import read_adapter_into, write_adapter
from finetune.adapters.lora import Adapter, attach_adapter
from finetune.adapters.read_back import fits_in_memory, memory_needed_bytes, read_back
from finetune.adapters.sites import describe_sites
from finetune.config.compose import ComposedConfig
from finetune.config.schema import RunConfig
from finetune.config.validate import to_plain
from finetune.console import Progress, say, warn
from finetune.data.batches import BatchPlan
from finetune.data.dataset import Split, describe, load_split
from finetune.errors import ConfigError, InputError, Interrupted, MachineError
from finetune.evaluate.likelihood import held_out_loss
from finetune.model.build import Base, check_unchanged, choose_device, choose_dtype, load_base
from finetune.model.checkpoint import Checkpoint as BaseCheckpoint
from finetune.model.hub import BaseLocation, locate_base
from finetune.model.selftest import check_packing
from finetune.model.storage import check_expert_storage, describe_storage, storage_table
from finetune.train.balance_reach import describe_balance_reach
from finetune.train.checkpoints import checkpoint_path, load_checkpoint, load_newest, remove_after
from finetune.train.evaluation import TestSet, choose_test_set, evaluate_test_set, validation_subset
from finetune.train.loop import Trainer
from finetune.train.metrics import Tracker, memory_gib
from finetune.train.run_directory import RunDirectory, write_json
from finetune.train.signals import StopRequest


@dataclass(frozen=True)
class Session:
    """Everything a run holds in memory."""

    config: RunConfig
    location: BaseLocation
    base: Base
    adapter: Adapter
    splits: dict[str, Split]
    plan: BatchPlan
    accelerator: Accelerator
    test: TestSet | None


WriteReport = Callable[[Path], object]
"""Given the run directory, whether the run finished or not."""


def train(composed: ComposedConfig, write_report: WriteReport) -> Path:
    """Run a recipe from the start.

    Args:
        composed: the checked recipe.
        write_report: see `WriteReport`; called once the run directory exists, whatever happens.

    Returns:
        The run directory.
    """
    started = time.monotonic()
    config = composed.config
    if config.name is not None:
        RunDirectory.refuse_existing(Path(config.output_dir) / config.name)
    session = _open_session(config)  # until there is something to save, signals end the command as usual
    with StopRequest() as stop:
        run = RunDirectory.create(config, composed.recipe_name)
        say(f"run directory: {run.path}")
        run.update_manifest(recipe=composed.recipe_name, overrides=list(composed.overrides), **_facts(session))
        _execute(session, run, stop, started, write_report, resumed=False)
    return run.path


def resume(path: Path, write_report: WriteReport) -> Path:
    """Continue a run from its newest whole checkpoint.

    Raises:
        InputError: no run, or no whole checkpoint, there.
        ConfigError: the run is finished.
    """
    started = time.monotonic()
    run, config = RunDirectory.open(path)
    if run.read_json(run.manifest).get("status") == "finished":
        raise ConfigError(
            f"{path} is finished",
            fix=f"to train on from its adapter, start a new run with adapter.init_from={run.adapter}",
        )
    session = _open_session(config)
    with StopRequest() as stop:
        _execute(session, run, stop, started, write_report, resumed=True)
    return run.path


def _open_session(config: RunConfig) -> Session:
    """Read data and base, attach the adapter, and check all of it before anything is written."""
    device, accelerator = choose_device(config.model), _accelerator(config)
    names = [name for name in ("train", "validation", "test") if getattr(config.data, name)]
    splits = {name: load_split(config.data, name) for name in names}  # type: ignore[arg-type]
    for split in splits.values():
        say(describe(split))
    test = choose_test_set(splits["test"], config) if "test" in splits else None
    plan = BatchPlan(splits["train"].samples, config.data, config.trainer, config.seed)
    _describe_plan(plan, splits["train"], config)
    location = locate_base(config.model.path, config.model.revision)
    checkpoint = BaseCheckpoint.open(location.directory)
    _verify_checksums(checkpoint, config)
    base = load_base(checkpoint, device, choose_dtype(config.model, device), config.model.experts_per_chunk)
    say(f"base: {location.name}, identity {base.identity[:12]}, {base.compute_dtype} on {device}")
    storage = storage_table(base.model)
    say(describe_storage(storage))
    check_expert_storage(storage, config.model.expert_storage)
    say(f"packing: samples are separate (leak {check_packing(base.model):.1e})")
    adapter = attach_adapter(base, config.adapter, seed=config.seed)
    if config.adapter.init_from is not None:
        read_adapter_into(Path(config.adapter.init_from), adapter, config.adapter, base.identity)
        say(f"adapter: training on from {config.adapter.init_from}")
    say("adapter sites:\n" + describe_sites(list(adapter.sites), checkpoint.shape))
    if config.trainer.router_balance_coefficient:
        say(describe_balance_reach(list(adapter.sites), checkpoint.shape))
    return Session(config, location, base, adapter, splits, plan, accelerator, test)


def _execute(
    session: Session,
    run: RunDirectory,
    stop: StopRequest,
    started: float,
    write_report: WriteReport,
    *,
    resumed: bool,
) -> None:
    """Train and finish; manifest and report say how it ended, whatever happens."""
    tracker = Tracker(session.accelerator, session.config.logging, to_plain(session.config), run.path)
    trainer = _trainer(session, run, tracker)
    if resumed:
        _restore(trainer, session, run)
    earlier = run.read_json(run.manifest)
    run.update_manifest(status="running", stopped_by=None)
    ending: dict[str, Any] = {"status": "finished"}
    try:
        _train_and_export(session, trainer, run, stop)
    except BaseException as error:
        first_line = (str(error).splitlines() or [""])[0]
        ending = {"status": "stopped", "stopped_by": f"{type(error).__name__}: {first_line}".removesuffix(": ")}
        raise
    finally:
        run.update_manifest(**ending, **_sitting(trainer, earlier, started))
        tracker.close()
        try:
            write_report(run.path)
        except Exception as error:  # what ended the run matters more than a report that cannot be written
            warn(f"no report: {type(error).__name__}: {error}")


def _restore(trainer: Trainer, session: Session, run: RunDirectory) -> None:
    """Go on from the newest whole checkpoint.

    Raises:
        InputError: there is none, or it holds another adapter than config.yaml describes.
        CheckError: it belongs to other data or another base.
    """
    step, checkpoint = load_newest(run.checkpoints)
    saved = {name: list(tensor.shape) for name, tensor in checkpoint.adapter.items()}
    now = {name: list(tensor.shape) for name, tensor in session.adapter.parameters().items()}
    if saved != now:
        name = next(name for name in sorted(saved | now) if saved.get(name) != now.get(name))
        raise InputError(
            f"the checkpoint of step {step} does not hold the adapter that {run.config} describes",
            why=f"{name} is {saved.get(name, 'absent')} there and {now.get(name, 'absent')} here",
            fix="make config.yaml as it was when the run was started",
        )
    trainer.restore(checkpoint)
    remove_after(run.checkpoints, step)
    say(f"resuming after step {step} of {session.plan.total_steps}")


def _train_and_export(session: Session, trainer: Trainer, run: RunDirectory, stop: StopRequest) -> None:
    """Before-figures, training, after-figures, the adapter on disk, and reading it back.

    The adapter is written last but one: a run that was stopped has none that could be taken for its result.
    """

    def leave_if_asked(save: bool) -> None:
        if stop.signal_number is None:
            return
        if save:
            trainer.save()
        raise Interrupted(
            "stopped by a signal while evaluating; everything is saved",
            signal_number=stop.signal_number,
            fix=f"go on with `finetune train --resume {run.path}`",
        )

    config, base, test = session.config, session.base, session.test
    evaluation = run.read_json(run.evaluation)
    if test is not None and "before" not in evaluation:
        with session.adapter.disabled():
            evaluation["before"] = evaluate_test_set(
                base, test, config, when="before", between_batches=lambda: leave_if_asked(save=True)
            )
        write_json(run.evaluation, evaluation)
    trainer.train(stop)
    _choose_best(session, trainer, run)
    check_unchanged(base)
    if test is not None:
        # The last step is saved already; saving now could store the best step's adapter under its name.
        evaluation["after"] = evaluate_test_set(
            base, test, config, when="after", between_batches=lambda: leave_if_asked(save=False)
        )
        write_json(run.evaluation, evaluation)
    _write_adapter(session, run)
    run.update_manifest(read_back=_read_back(session, run))


def _sitting(trainer: Trainer, earlier: dict[str, Any], started: float) -> dict[str, Any]:
    """What manifest.json says at the end of a sitting: figures over all sittings of the run."""
    minutes = (time.monotonic() - started) / 60
    return {
        "audit": list(dict.fromkeys([*earlier.get("audit", []), *trainer.audit_lines])),
        "loop": asdict(trainer.state),
        "minutes": round(earlier.get("minutes", 0.0) + minutes, 2),
        "peak_memory_gib": round(max(earlier.get("peak_memory_gib", 0.0), memory_gib(trainer.base.device)), 3),
    }


def _accelerator(config: RunConfig) -> Accelerator:
    """The processes that run, checked against the recipe.

    Raises:
        MachineError: the launcher started another number of processes than the recipe says.
    """
    log_with = None if config.logging.tracker == "none" else config.logging.tracker
    on_cpu = choose_device(config.model).type == "cpu"
    accelerator = Accelerator(cpu=on_cpu, log_with=log_with)
    if accelerator.num_processes != config.distributed.num_processes:
        raise MachineError(
            f"{accelerator.num_processes} processes run, the recipe says {config.distributed.num_processes}",
            why="processes that do not know of each other train separate adapters and overwrite one another",
            fix="start it with `finetune train` and set distributed.num_processes",
        )
    return accelerator


def _describe_plan(plan: BatchPlan, split: Split, config: RunConfig) -> None:
    trainer, rows = config.trainer, plan.rows(0)
    efficiency = split.num_tokens / (len(rows) * config.data.max_length)
    say(
        f"steps: {len(rows):,} rows of {config.data.max_length:,} tokens an epoch, {efficiency:.1%} filled; "
        f"{trainer.rows_per_micro_step} rows x {trainer.micro_steps} micro-steps = "
        f"{trainer.rows_per_micro_step * trainer.micro_steps} rows a step => {plan.total_steps:,} steps "
        f"for {trainer.epochs:g} epochs"
    )


def _verify_checksums(checkpoint: BaseCheckpoint, config: RunConfig) -> None:
    if not config.model.verify_checksums:
        say("base files: checksums not compared (model.verify_checksums=false)")
        return
    with Progress("checking base files", None, "MiB") as progress:
        if checkpoint.verify_checksums(progress):
            say("base files: every sha256 as in checksums.json")
        else:
            say("base files: no checksums.json to compare with; the identity below is what was read")


def _trainer(session: Session, run: RunDirectory, tracker: Tracker) -> Trainer:
    config, base = session.config, session.base
    validation: Callable[[], float] | None = None
    if "validation" in session.splits:
        samples = validation_subset(session.splits["validation"].samples, config.evaluate.validation_rows)

        def validation() -> float:
            return held_out_loss(base.model, samples, config.data.max_length, task="validation").mean

    fingerprint = session.splits["train"].fingerprint
    return Trainer(
        config, base, session.adapter, session.plan, session.accelerator, run, tracker, validation, fingerprint
    )


def _choose_best(session: Session, trainer: Trainer, run: RunDirectory) -> None:
    """Go back to the best checkpoint's adapter when the recipe says so."""
    best = trainer.state.best_step
    if session.config.save.best_metric == "none" or best is None:
        return
    if best != trainer.state.step:
        trainer.load_adapter(load_checkpoint(checkpoint_path(run.checkpoints, best)))
    say(f"adapter of step {best}: best validation loss {trainer.state.best_loss:.4f}")
    run.update_manifest(adapter_of_step=best)


def _write_adapter(session: Session, run: RunDirectory) -> None:
    if run.adapter.exists():  # its read-back failed or was killed, and the run was resumed
        run.remove_adapter()
    location = session.location
    name = location.name if location.revision else str(location.directory.resolve())
    write_adapter(
        run.adapter,
        session.adapter,
        session.config.adapter,
        base_name=name,
        base_revision=location.revision,
        base_identity=session.base.identity,
    )
    say(f"adapter: {run.adapter}")


def _read_back(session: Session, run: RunDirectory) -> dict[str, Any]:
    """Read the adapter back, or say why not; what is stored says which."""
    export, base = session.config.export, session.base
    skipped = None
    if export.read_back == "never":
        skipped = "export.read_back is never"
    elif export.read_back == "auto" and not fits_in_memory(base):
        needed = memory_needed_bytes(base) / 2**30
        skipped = f"a dequantised base needs {needed:.0f} GiB of memory, more than half of what is free"
    if skipped:
        warn(f"the adapter was not read back with stock PEFT: {skipped}")
        return {"skipped": skipped}
    split = session.splits.get("test", session.splits["train"])
    result = read_back(base, session.adapter, run.adapter, split.samples[: export.read_back_rows])
    say(result.describe())
    return asdict(result)


def _facts(session: Session) -> dict[str, Any]:
    """What manifest.json records at the start."""
    sites = session.adapter.sites
    return {
        "finetune_version": __version__,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "base": {
            "name": session.location.name,
            "revision": session.location.revision,
            "identity": session.base.identity,
            "storage": [asdict(line) for line in storage_table(session.base.model)],
        },
        "data": {
            name: {
                "rows": len(split.samples),
                "tokens": split.num_tokens,
                "trained_tokens": split.num_trained_tokens,
                "skipped_rows": len(split.bad_rows),
                "fingerprint": split.fingerprint,
            }
            for name, split in session.splits.items()
        },
        "adapter_parameters": {
            kind: sum(site.num_parameters for site in sites if site.kind == kind) for kind in ("attention", "experts")
        },
        "total_steps": session.plan.total_steps,
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "device": str(session.base.device),
            "compute_dtype": str(session.base.compute_dtype),
            "platform": platform.platform(),
            "command": " ".join(sys.argv),
        },
    }
