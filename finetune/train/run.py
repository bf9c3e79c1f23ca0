"""End to end: data, base, adapter, before-figures, training, after-figures, adapter on disk, read-back, report."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from finetune.adapters.compact import is_worth_it, write_compact
from finetune.adapters.files import write_adapter
from finetune.adapters.read_back import fits_in_memory, memory_needed_bytes, read_back
from finetune.config.compose import ComposedConfig
from finetune.config.schema import AdapterConfig
from finetune.config.validate import to_plain
from finetune.console import say, warn
from finetune.errors import ConfigError, InputError, Interrupted, MachineError
from finetune.evaluate.affinity import write_affinity
from finetune.evaluate.likelihood import held_out_loss
from finetune.model.build import check_unchanged
from finetune.train.checkpoint_files import checkpoint_path, remove_after
from finetune.train.checkpoints import load_checkpoint, load_newest
from finetune.train.evaluation import evaluate_test_set, validation_subset
from finetune.train.loop import Trainer
from finetune.train.metrics import Tracker, memory_gib
from finetune.train.routing_watch import RoutingWatch
from finetune.train.run_directory import RunDirectory, write_json
from finetune.train.session import Session, open_session, session_facts
from finetune.train.signals import StopRequest

EXPERTS = "experts.json"  # which experts are adapted, unless all are
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
    session = open_session(config)  # until there is something to save, signals end the command as usual
    run = RunDirectory.create(config, composed.recipe_name)
    say(f"run directory: {run.path}")
    with StopRequest() as stop, run.locked():
        run.update_manifest(recipe=composed.recipe_name, overrides=list(composed.overrides), **session_facts(session))
        _name_skipped_rows(session, run)
        if session.affinity is not None:
            write_affinity(run.path / EXPERTS, session.affinity)
        _execute(session, run, stop, started, write_report, resumed=False)
    return run.path


def resume(path: Path, write_report: WriteReport) -> Path:
    """Continue a run from its newest whole checkpoint.

    Raises:
        InputError: no run, or no whole checkpoint, there.
        ConfigError: the run is finished.
    """
    started = time.monotonic()
    run, config = RunDirectory.open(path.resolve())
    manifest = run.read_json(run.manifest)
    if manifest.get("status") == "finished":
        raise ConfigError(
            f"{path} is finished",
            fix=f"to train on from its adapter, start a new run with adapter.init_from={run.adapter}",
        )
    # Relative paths of the recipe, and a hub name's moving branch, mean what they meant when the run was started.
    if (origin := manifest.get("working_directory")) and Path(origin) != Path.cwd() and Path(origin).is_dir():
        warn(f"working in {origin}, where the run was started")
        os.chdir(origin)
    if revision := manifest.get("base", {}).get("revision"):
        config = replace(config, model=replace(config.model, revision=revision))
    if (run.path / EXPERTS).is_file():  # measured once: a resumed run adapts the experts that it started with
        config = replace(config, adapter=_with_select(config.adapter, str(run.path / EXPERTS)))
    with run.locked():
        session = open_session(config, resumed=True)
        with StopRequest() as stop:
            _execute(session, run, stop, started, write_report, resumed=True)
    return run.path


def _with_select(adapter: AdapterConfig, select: str) -> AdapterConfig:
    return replace(adapter, experts=replace(adapter.experts, select=select))


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
    trainer = _trainer(session, run, tracker, stop)
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


def _name_skipped_rows(session: Session, run: RunDirectory) -> None:
    """Write what was left out, row by row with the reason, to skipped_rows.jsonl."""
    skipped = [
        {"split": name, "where": row.where, "kind": row.kind, "reason": row.reason}
        for name, split in session.splits.items()
        for row in (*split.bad_rows, *split.dropped)
    ]
    if skipped:
        path = run.path / "skipped_rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in skipped))
        first = "; ".join(f"{row['where']}: {row['reason']}" for row in skipped[:3])
        warn(f"{len(skipped):,} rows are left out, all named in {path}: {first}")


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
    config, base, test = session.config, session.base, session.test
    evaluation = run.read_json(run.evaluation)
    if test is not None and "before" not in evaluation:
        with session.adapter.disabled():
            evaluation["before"] = evaluate_test_set(
                base, test, config, when="before", between_batches=lambda: _leave_if_asked(stop, run, trainer.save)
            )
        write_json(run.evaluation, evaluation)
    trainer.train(stop)
    _choose_best(session, trainer, run)
    check_unchanged(base)
    if test is not None:
        # The last step is saved already; saving now could store the best step's adapter under its name.
        evaluation["after"] = evaluate_test_set(
            base, test, config, when="after", between_batches=lambda: _leave_if_asked(stop, run, save=None)
        )
        write_json(run.evaluation, evaluation)
    if trainer.watch is not None:
        best = trainer.state.best_step if config.save.best_metric != "none" else None
        usage = trainer.step.router_loss.usage
        run.update_manifest(routing=trainer.watch.finish(best or trainer.state.step, usage))
    _write_adapter(session, run)
    run.update_manifest(read_back=_read_back(session, run))


def _leave_if_asked(stop: StopRequest, run: RunDirectory, save: Callable[[], None] | None) -> None:
    """Save and leave if a signal came: evaluations are long, and who stops a machine does not wait for them."""
    if stop.signal_number is None:
        return
    if save is not None:
        save()
    raise Interrupted(
        "stopped by a signal while evaluating; everything is saved",
        signal_number=stop.signal_number,
        fix=f"go on with `finetune train --resume {run.path}`",
    )


def _sitting(trainer: Trainer, earlier: dict[str, Any], started: float) -> dict[str, Any]:
    """What manifest.json says at the end of a sitting: figures over all sittings of the run."""
    minutes = (time.monotonic() - started) / 60
    return {
        "audit": trainer.audit_lines,
        "loop": asdict(trainer.state),
        "minutes": round(earlier.get("minutes", 0.0) + minutes, 2),
        "peak_memory_gib": round(max(earlier.get("peak_memory_gib", 0.0), memory_gib(trainer.base.device)), 3),
    }


def _trainer(session: Session, run: RunDirectory, tracker: Tracker, stop: StopRequest) -> Trainer:
    config, base = session.config, session.base
    validation: Callable[[], float] | None = None
    if "validation" in session.splits:
        samples = validation_subset(session.splits["validation"].samples, config.evaluate.validation_rows)

        def validation() -> float:
            return held_out_loss(
                base.model,
                samples,
                config.data.max_length,
                task="validation",
                between_batches=lambda: _leave_if_asked(stop, run, trainer.save),
            ).mean

    watch = None
    if config.evaluate.routing_samples:
        split = next(session.splits[name] for name in ("test", "validation", "train") if name in session.splits)
        watch = RoutingWatch(
            config,
            base,
            session.adapter,
            split,
            run,
            tracker,
            session.accelerator,
            lambda: _leave_if_asked(stop, run, trainer.save),
        )
    fingerprint = session.splits["train"].fingerprint
    trainer = Trainer(
        config, base, session.adapter, session.plan, session.accelerator, run, tracker, validation, fingerprint, watch
    )
    return trainer


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
    location, config = session.location, session.config.adapter
    name = location.name if location.revision else str(location.directory.resolve())
    base: dict[str, Any] = {
        "base_name": name,
        "base_revision": location.revision,
        "base_identity": session.base.identity,
        "base_held_as": session.base.held_as,
    }
    write_adapter(run.adapter, session.adapter, config, **base)
    say(f"adapter: {run.adapter}")
    if is_worth_it(session.adapter):
        compact = run.path / "adapter_compact"
        shutil.rmtree(compact, ignore_errors=True)
        num_experts = session.base.checkpoint.shape.num_experts
        write_compact(compact, session.adapter, num_experts, rslora=config.rslora, facts=base)
        say(f"adapter, compact form: {compact}")


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
    try:
        result = read_back(base, session.adapter, run.adapter, split.samples[: export.read_back_rows])
    except MachineError as error:
        if export.read_back == "always":
            raise
        warn(f"the adapter was not read back with stock PEFT: {error.what}")
        return {"skipped": error.what}
    (say if result.conclusive else warn)(result.describe())
    return asdict(result)
