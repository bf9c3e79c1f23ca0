"""End to end: data, base, adapter, before-figures, training, after-figures, adapter on disk, read-back, report."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from finetune import log
from finetune.adapters.read_back import live_logits
from finetune.config.compose import ComposedConfig
from finetune.config.derive import deepspeed_settings
from finetune.config.expert_selection import write_expert_scores
from finetune.config.schema import AdapterConfig, RunConfig
from finetune.config.validate import dump_yaml, to_plain
from finetune.data.preview import as_json
from finetune.errors import ConfigError, InputError, Interrupted
from finetune.evaluate.evalset import evenly_spread
from finetune.evaluate.likelihood import held_out_loss
from finetune.evaluate.summary import measure_test_set
from finetune.files import write_json
from finetune.model.build import check_unchanged
from finetune.results import BaseName, Evaluation, Model, read_evaluation
from finetune.train.checkpoint import checkpoint_path, load_checkpoint, load_newest, remove_after
from finetune.train.engines.base import Engine, open_engine
from finetune.train.finalize import Result, read_back_samples, why_not_read_back, write_result
from finetune.train.metrics import Tracker, memory_gib
from finetune.train.routing_watch import RoutingWatch
from finetune.train.run_directory import RunDirectory, prepare_run
from finetune.train.session import Session, open_session, session_facts
from finetune.train.trainer import Trainer
from finetune.train.watchdog import StopRequest, Watchdog
from finetune.train.world import World, closing, explain_lost_ranks, open_world

EXPERTS = "experts.json"  # which experts are adapted, unless all are
WriteReport = Callable[[Path], object]
"""Given the run directory, whether the run finished or not."""


def train(composed: ComposedConfig, write_report: WriteReport) -> Path:
    """Run a recipe from the start, alone or as one of the processes that a launcher has started.

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
    processes = open_world(config)
    with closing(processes):
        processes.assert_same("the configuration", dump_yaml(config))
        session = open_session(config, processes)  # until there is something to save, signals end the command as usual
        made = prepare_run(config, composed.recipe_name, composed.overrides) if processes.is_first else None
        run = RunDirectory(Path(processes.broadcast(str(made.path if made else None))), writes=processes.is_first)
        _begin(session, run, started, write_report)
    return run.path


def train_prepared(path: Path, write_report: WriteReport) -> Path:
    """Run what `prepare_run` left in a directory, as one of the processes that `launch` has started."""
    started = time.monotonic()
    prepared, config = RunDirectory.open(path)
    processes = open_world(config)
    with closing(processes):
        run = replace(prepared, writes=processes.is_first)
        _begin(open_session(config, processes), run, started, write_report)
    return run.path


def _begin(session: Session, run: RunDirectory, started: float, write_report: WriteReport) -> None:
    log.info(f"run directory: {run.path}")
    with StopRequest() as stop, run.locked():
        run.update_manifest(**session_facts(session))
        if run.writes:
            _name_skipped_rows(session, run)
            write_json(run.path / "sample.json", as_json(session.splits["train"].examples[0]))
            if session.affinity is not None:
                write_expert_scores(run.path / EXPERTS, session.affinity)
        _execute(session, run, stop, started, write_report, resumed=False)


def resume(path: Path, write_report: WriteReport, config: RunConfig | None = None) -> Path:
    """Continue a run from its newest whole checkpoint, alone or as one of the processes that were started.

    Args:
        path: the run's directory.
        write_report: see `WriteReport`.
        config: its configuration, with the processes that now carry it out (`finetune.config.validate`). None: the
            same as before.

    Raises:
        InputError: no run, or no whole checkpoint, there.
        ConfigError: the run is finished.
    """
    started = time.monotonic()
    run, stored = RunDirectory.open(path.resolve())
    config = config or stored
    manifest = run.read_json(run.manifest)
    if manifest.get("status") == "finished":
        raise ConfigError(
            f"{path} is finished",
            fix=f"to train on from its adapter, start a new run with adapter.init_from={run.adapter}",
        )
    processes = open_world(config)
    with closing(processes):
        run = replace(run, writes=processes.is_first)
        # Relative paths of the recipe, and a hub name's moving branch, mean what they meant when the run was started.
        if (origin := manifest.get("working_directory")) and Path(origin) != Path.cwd() and Path(origin).is_dir():
            log.warning(f"working in {origin}, where the run was started")
            os.chdir(origin)
        if revision := manifest.get("base", {}).get("revision"):
            config = replace(config, model=replace(config.model, revision=revision))
        if (run.path / EXPERTS).is_file():  # measured once: a resumed run adapts the experts that it started with
            config = replace(config, adapter=_with_choice(config.adapter, str(run.path / EXPERTS)))
        with run.locked():
            session = open_session(config, processes, resumed=True)
            with StopRequest() as stop:
                _execute(session, run, stop, started, write_report, resumed=True)
    return run.path


def _with_choice(adapter: AdapterConfig, file: str) -> AdapterConfig:
    """The recipe with the experts, and their ranks, that a file has."""
    rank_by = "uniform" if adapter.experts.rank_by == "uniform" else file
    return replace(adapter, experts=replace(adapter.experts, select=file, rank_by=rank_by))


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
    engine = open_engine(session.config, session.base, session.adapter, session.accelerator, session.processes)
    log.info(f"processes: {engine.describe()}")
    if run.writes and (settings := deepspeed_settings(session.config)):
        write_json(run.path / "deepspeed.json", settings)
    hangs = Watchdog(session.processes, session.config.distributed.timeout_s)
    trainer = _trainer(session, engine, run, tracker, stop, hangs)
    if resumed:
        _restore(trainer, session, run)
    earlier = run.read_json(run.manifest)
    run.update_manifest(status="running", stopped_by=None, processes=engine.describe())
    ending: dict[str, Any] = {"status": "finished"}
    try:
        with hangs, explain_lost_ranks(session.processes):
            result = _train_and_evaluate(session, trainer, run, stop)
        session.processes.leave()
        if run.writes:  # long, and process 0 needs no other for it
            write_result(session, run, result)
    except BaseException as error:
        first_line = (str(error).splitlines() or [""])[0]
        ending = {"status": "stopped", "stopped_by": f"{type(error).__name__}: {first_line}".removesuffix(": ")}
        raise
    finally:
        run.update_manifest(**ending, **session_summary(trainer, earlier, started))
        tracker.close()
        try:
            if run.writes:
                write_report(run.path)
        except Exception as error:  # what ended the run matters more than a report that cannot be written
            log.warning(f"no report: {type(error).__name__}: {error}")


def _name_skipped_rows(session: Session, run: RunDirectory) -> None:
    """Write what was left out, row by row with the reason, to skipped_rows.jsonl."""
    skipped = [
        {"split": name, "where": row.where, "kind": row.kind, "reason": row.reason}
        for name, split in session.splits.items()
        for row in (*split.stats.bad_records, *split.stats.dropped)
    ]
    if skipped:
        path = run.path / "skipped_rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in skipped))
        first = "; ".join(f"{row['where']}: {row['reason']}" for row in skipped[:3])
        log.warning(f"{len(skipped):,} rows are left out, all named in {path}: {first}")


def _restore(trainer: Trainer, session: Session, run: RunDirectory) -> None:
    """Go on from the newest whole checkpoint.

    Raises:
        InputError: there is none, or it holds another adapter than config.yaml describes.
        CheckError: it belongs to other data or another base.
    """
    processes = session.processes
    newest = load_newest(run.checkpoints) if processes.is_first else None
    step = int(processes.broadcast(newest[0] if newest else None))
    checkpoint = newest[1] if newest else load_checkpoint(checkpoint_path(run.checkpoints, step))
    saved = {name: list(tensor.shape) for name, tensor in checkpoint.adapter.items()}
    now = {name: list(tensor.shape) for name, tensor in trainer.engine.parameters.items()}
    if saved != now:
        name = next(name for name in sorted(saved | now) if saved.get(name) != now.get(name))
        raise InputError(
            f"the checkpoint of step {step} does not hold the adapter that {run.config} describes",
            why=f"{name} is {saved.get(name, 'absent')} there and {now.get(name, 'absent')} here",
            fix="make config.yaml as it was when the run was started",
        )
    trainer.restore(checkpoint)
    if run.writes:
        remove_after(run.checkpoints, step)
    log.info(f"resuming after step {step} of {session.plan.total_steps}")


def _train_and_evaluate(session: Session, trainer: Trainer, run: RunDirectory, stop: StopRequest) -> Result:
    """Before-figures, training, after-figures: all that needs every process.

    The adapter is written after all of it: a run that was stopped has none that could be taken for its result.
    """
    config, base, test, processes = session.config, session.base, session.test, session.processes
    names = BaseName(str(base.checkpoint.directory), base.identity)
    notes = list(test.notes) if test else []
    new = Evaluation("adapter", names, config.evaluate.confidence, notes, {}, [], None, None)
    evaluation: Evaluation = processes.broadcast(read_evaluation(run.evaluation)) or new

    def evaluate(model: Model, save: Callable[[], None] | None) -> None:
        nonlocal evaluation
        if test is None:
            return

        def between() -> None:
            trainer.hangs.beat(f"evaluating the {model}")
            _leave_if_asked(stop, run, save, processes)

        figures = measure_test_set(base, test, model, config.evaluate.confidence, between_batches=between)
        evaluation = evaluation.updated(model, processes.broadcast(figures))
        run.write_evaluation(evaluation)

    if not evaluation.has("base"):
        with session.adapter.disabled():
            evaluate("base", trainer.save)
    trainer.train(stop)
    _choose_best(session, trainer, run)
    trainer.hangs.beat("checking the base")
    check_unchanged(base)
    # The last step is saved already; saving now could store the best step's adapter under its name.
    evaluate("adapter", None)
    if trainer.watch is not None:
        best = trainer.state.best_step if config.save.best_metric != "none" else None
        usage = trainer.step.router_loss.usage
        run.update_manifest(routing=trainer.watch.finish(best or trainer.state.step, usage))
    trainer.hangs.beat("gathering the adapter")
    skipped: str | None = processes.broadcast(why_not_read_back(session))
    live = live_logits(base, session.adapter, read_back_samples(session)) if skipped is None else None
    return Result(trainer.engine.adapter_tensors(), live, skipped)


def _leave_if_asked(stop: StopRequest, run: RunDirectory, save: Callable[[], None] | None, processes: World) -> None:
    """Save and leave if a signal came to any process: evaluations are long, and who stops a machine does not wait."""
    asked = processes.largest(stop.signal_number or 0)
    if not asked:
        return
    if save is not None:
        save()
    raise Interrupted(
        "stopped by a signal while evaluating; everything is saved",
        signal_number=asked,
        fix=f"go on with `finetune train --resume {run.path}`",
    )


def session_summary(trainer: Trainer, earlier: dict[str, Any], started: float) -> dict[str, Any]:
    """What manifest.json says at the end of a sitting: figures over all sittings of the run."""
    minutes = (time.monotonic() - started) / 60
    return {
        "audit": trainer.audit_lines,
        "warnings": list(dict.fromkeys([*earlier.get("warnings", []), *log.warnings_so_far()])),
        "loop": asdict(trainer.state),
        "minutes": round(earlier.get("minutes", 0.0) + minutes, 2),
        "peak_memory_gib": round(max(earlier.get("peak_memory_gib", 0.0), memory_gib(trainer.base.device)), 3),
    }


def _trainer(
    session: Session, engine: Engine, run: RunDirectory, tracker: Tracker, stop: StopRequest, hangs: Watchdog
) -> Trainer:
    config, base = session.config, session.base
    validation: Callable[[], float] | None = None

    def between() -> None:
        hangs.beat("validating")
        _leave_if_asked(stop, run, trainer.save, session.processes)

    if "validation" in session.splits:
        samples = evenly_spread(session.splits["validation"].examples, config.evaluate.validation_examples)

        def validation() -> float:
            return held_out_loss(
                base.model, samples, config.data.max_length, task="validation", between_batches=between
            ).mean

    watch = None
    if config.evaluate.routing_examples:
        split = next(session.splits[name] for name in ("test", "validation", "train") if name in session.splits)
        watch = RoutingWatch(
            config,
            base,
            session.adapter,
            split,
            run,
            tracker,
            session.accelerator,
            between,
        )
    fingerprint = session.splits["train"].stats.fingerprint
    trainer = Trainer(
        config, base, session.adapter, session.plan, engine, run, tracker, validation, fingerprint, hangs, watch
    )
    return trainer


def _choose_best(session: Session, trainer: Trainer, run: RunDirectory) -> None:
    """Go back to the best checkpoint's adapter when the recipe says so."""
    best = trainer.state.best_step
    if session.config.save.best_metric == "none" or best is None:
        return
    if best != trainer.state.step:
        trainer.load_adapter(load_checkpoint(checkpoint_path(run.checkpoints, best)))
    log.info(f"adapter of step {best}: best validation loss {trainer.state.best_loss:.4f}")
    run.update_manifest(adapter_of_step=best)
