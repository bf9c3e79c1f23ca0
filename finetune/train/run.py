"""A run from start to end: scores before, training, scores after, the adapter on disk, its read-back, a report.

`train` is the one way in, for a new run, a run directory whose ranks are just starting, and a run that stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from finetune import log
from finetune.adapters.read_back import live_logits
from finetune.config.compose import ComposedConfig
from finetune.config.expert_selection import write_expert_scores
from finetune.config.schema import RunConfig
from finetune.config.validate import dump_yaml
from finetune.data.preview import as_json
from finetune.errors import ConfigError, InputError
from finetune.evaluate.summary import measure_test_set
from finetune.figures import Model
from finetune.files import write_json, write_text
from finetune.model.build import check_unchanged
from finetune.results import BaseName, Evaluation, read_evaluation
from finetune.train.checkpoint import checkpoint_path, load_checkpoint, load_newest, remove_after
from finetune.train.finalize import Result, read_back_examples, why_not_read_back, write_result
from finetune.train.metrics import memory_gib
from finetune.train.run_directory import Run
from finetune.train.session import Session, manifest_record, open_session
from finetune.train.trainer import Trainer, TrainerState
from finetune.train.watchdog import StopRequest
from finetune.train.world import World, explain_lost_ranks, open_world

WriteReport = Callable[[Path], object]
"""Writes the report of a run directory, finished or not."""


def train(source: ComposedConfig | Run, write_report: WriteReport) -> Path:
    """Train a recipe from the start, or continue a run, alone or as one of the ranks that a launcher has started.

    Args:
        source: a composed recipe, whose run directory is created once data and base are checked; or an existing run. A
            run that has begun continues from its newest complete checkpoint. Its `config` may differ from the stored
            one in `distributed` (`finetune.config.validate.resumed_config`).
        write_report: called at the end, however the run ends.

    Returns:
        The run directory.

    Raises:
        ConfigError: the run is finished.
        InputError: the run has begun and has no complete checkpoint.
    """
    started = time.monotonic()
    resumed = isinstance(source, Run) and _has_begun(source)
    config = _config_to_resume(source) if isinstance(source, Run) and resumed else source.config
    if isinstance(source, ComposedConfig) and config.name is not None:
        Run.check_new(Path(config.output_dir) / config.name)
    with open_world(config) as world, ExitStack() as lock:
        if isinstance(source, Run):
            run = replace(source, config=config, writes=world.is_main)
            lock.enter_context(run.locked())
            session = open_session(config, world, resumed=resumed)
        else:
            world.assert_same("the configuration", dump_yaml(config))
            session = open_session(config, world)
            run = _create(source, world)
            lock.enter_context(run.locked())
        log.info(f"run directory: {run.path}")
        with StopRequest() as stop:  # until there is something to save, signals end the command as usual
            if not resumed:
                _record_start(session, run)
            _execute(session, run, stop, started, write_report, resumed=resumed)
    return run.path


def _has_begun(run: Run) -> bool:
    status = run.status
    if status == "finished":
        raise ConfigError(
            f"{run.path} is finished",
            fix=f"to continue training from its adapter, start a new run with adapter.init_from={run.adapter}",
        )
    return status is not None


def _config_to_resume(run: Run) -> RunConfig:
    """The recipe of a run that has begun, pinned to the revision of the base and to the experts it began with."""
    config = run.config
    if revision := run.read_manifest().get("base", {}).get("revision"):
        config = replace(config, model=replace(config.model, revision=revision))
    if run.expert_scores.is_file():
        experts, file = config.adapter.experts, str(run.expert_scores)
        rank_by = "uniform" if experts.rank_by == "uniform" else file
        experts = replace(experts, select=file, rank_by=rank_by)
        config = replace(config, adapter=replace(config.adapter, experts=experts))
    return config


def _create(composed: ComposedConfig, world: World) -> Run:
    """Create the run directory on rank 0 for all ranks."""
    config = composed.config
    path = None
    if world.is_main:
        path = str(Run.create(config, composed.recipe_name, composed.overrides).path)
    return Run(Path(world.broadcast(path)), config, writes=world.is_main)


def _record_start(session: Session, run: Run) -> None:
    """Write what is known before the first step."""
    run.update_manifest(**manifest_record(session))
    if not run.writes:
        return
    _write_skipped_records(session, run)
    write_json(run.path / "sample.json", as_json(session.splits["train"].examples[0]))
    if session.scores is not None:
        write_expert_scores(run.expert_scores, session.scores)


def _write_skipped_records(session: Session, run: Run) -> None:
    """Write every record that was left out, with the reason, to skipped_rows.jsonl."""
    skipped = [
        {"split": name, "where": record.where, "kind": record.kind, "reason": record.reason}
        for name, split in session.splits.items()
        for record in (*split.stats.bad_records, *split.stats.dropped)
    ]
    if skipped:
        path = run.path / "skipped_rows.jsonl"
        write_text(path, "".join(json.dumps(record) + "\n" for record in skipped))
        first = "; ".join(f"{record['where']}: {record['reason']}" for record in skipped[:3])
        log.warning(f"{len(skipped):,} records are left out, all listed in {path}: {first}")


@dataclass(frozen=True)
class SessionSummary:
    """The entries of manifest.json at the end of a session, over all sessions of the run.

    Attributes:
        audit: results of the gradient audits.
        warnings: each once, in order.
        loop: counters of the run.
        minutes: wall time.
        peak_memory_gib: highest of all sessions.
    """

    audit: list[str]
    warnings: list[str]
    loop: TrainerState
    minutes: float
    peak_memory_gib: float

    @classmethod
    def of(cls, run: Run) -> SessionSummary:
        """The summary of a run's earlier sessions."""
        stored = run.read_manifest()
        minutes, peak = stored.get("minutes", 0.0), stored.get("peak_memory_gib", 0.0)
        return cls([], stored.get("warnings", []), TrainerState(), minutes, peak)

    def extended(self, trainer: Trainer, seconds: float) -> SessionSummary:
        """The summary with one more session."""
        return SessionSummary(
            audit=trainer.audit_lines,
            warnings=list(dict.fromkeys([*self.warnings, *log.warnings_so_far()])),
            loop=trainer.state,
            minutes=round(self.minutes + seconds / 60, 2),
            peak_memory_gib=round(max(self.peak_memory_gib, memory_gib(trainer.base.device)), 3),
        )


def _execute(
    session: Session, run: Run, stop: StopRequest, started: float, write_report: WriteReport, *, resumed: bool
) -> None:
    """Train and finish; manifest and report record how it ended, whatever happens."""
    trainer = Trainer(session, run, stop)
    if resumed:
        _restore(trainer, run)
    earlier = SessionSummary.of(run)
    run.update_manifest(status="running", stopped_by=None, processes=trainer.engine.describe())
    status, stopped_by = "finished", None
    try:
        with trainer.watchdog, explain_lost_ranks(session.world):
            result = _train_and_evaluate(session, trainer, run)
        session.world.destroy()
        if run.writes:  # this takes long, and rank 0 needs no other rank for it
            write_result(session, run, result)
    except BaseException as error:
        first_line = (str(error).splitlines() or [""])[0]
        status, stopped_by = "stopped", f"{type(error).__name__}: {first_line}".removesuffix(": ")
        raise
    finally:
        summary = earlier.extended(trainer, time.monotonic() - started)
        run.update_manifest(status=status, stopped_by=stopped_by, **asdict(summary))
        trainer.tracker.close()
        try:
            if run.writes:
                write_report(run.path)
        except Exception as error:  # what ended the run matters more than a report that cannot be written
            log.warning(f"no report: {type(error).__name__}: {error}")


def _restore(trainer: Trainer, run: Run) -> None:
    """Continue from the newest complete checkpoint.

    Raises:
        InputError: there is none, or it holds another adapter than config.yaml describes, other data or another base.
    """
    world = trainer.world
    newest = load_newest(run.checkpoints) if world.is_main else None
    step = int(world.broadcast(newest[0] if newest else None))
    checkpoint = newest[1] if newest else load_checkpoint(checkpoint_path(run.checkpoints, step))
    saved = {name: list(tensor.shape) for name, tensor in checkpoint.adapter.items()}
    now = {name: list(tensor.shape) for name, tensor in trainer.engine.parameters.items()}
    if saved != now:
        name = next(name for name in sorted(saved | now) if saved.get(name) != now.get(name))
        raise InputError(
            f"the checkpoint of step {step} does not hold the adapter that {run.config_file} describes",
            why=f"{name} is {saved.get(name, 'absent')} there and {now.get(name, 'absent')} here",
            fix="make config.yaml as it was when the run was started",
        )
    trainer.restore(checkpoint)
    if run.writes:
        remove_after(run.checkpoints, step)
    log.info(f"resuming after step {step} of {trainer.source.total_steps}")


def _train_and_evaluate(session: Session, trainer: Trainer, run: Run) -> Result:
    """Scores before, training, scores after: all that needs every rank.

    The adapter is written after all of it: a run that was stopped has none that could be taken for its result.
    """
    config, base, test, world = session.config, session.base, session.test, session.world
    names = BaseName(str(base.checkpoint.directory), base.identity)
    notes = list(test.notes) if test else []
    new = Evaluation("adapter", names, config.evaluate.confidence, notes, {}, [], None, None)
    evaluation: Evaluation = world.broadcast(read_evaluation(run.evaluation)) or new

    def evaluate(model: Model, *, save: bool) -> None:
        nonlocal evaluation
        if test is None:
            return

        def between_batches() -> None:
            trainer.watchdog.heartbeat(f"evaluating the {model}")
            trainer.stop_if_asked(save=save)

        before = evaluation.test.pairs if evaluation.test else None
        confidence = config.evaluate.confidence
        figures = measure_test_set(base, test, model, confidence, between_batches=between_batches, before=before)
        evaluation = evaluation.updated(model, world.broadcast(figures))
        run.write_evaluation(evaluation)

    if not evaluation.has("base"):
        with session.adapter.disabled():
            evaluate("base", save=True)
    trainer.train()
    _choose_best(trainer, run)
    trainer.watchdog.heartbeat("checking the base")
    check_unchanged(base)
    # The last step is saved already; saving now could store the best step's adapter under its name.
    evaluate("adapter", save=False)
    if trainer.routing is not None:
        best = trainer.state.best_step if config.save.best_metric != "none" else None
        summary = trainer.routing.finish(best or trainer.state.step, trainer.step.usage)
        run.update_manifest(routing=asdict(summary))
    trainer.watchdog.heartbeat("gathering the adapter")
    skipped: str | None = world.broadcast(why_not_read_back(session))
    live = live_logits(base, session.adapter, read_back_examples(session)) if skipped is None else None
    return Result(trainer.engine.adapter_tensors(), live, skipped)


def _choose_best(trainer: Trainer, run: Run) -> None:
    """Load the best checkpoint's adapter when the recipe says so."""
    best = trainer.state.best_step
    if trainer.config.save.best_metric == "none" or best is None:
        return
    if best != trainer.state.step:
        trainer.load_adapter(load_checkpoint(checkpoint_path(run.checkpoints, best)))
    log.info(f"adapter of step {best}: best validation loss {trainer.state.best_loss:.4f}")
    run.update_manifest(adapter_of_step=best)
