"""The training loop: one optimiser step after the other, with validation, checkpoints and metrics between them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol

import torch

from finetune import log
from finetune.adapters.audit import audit_gradients
from finetune.config.derive import deepspeed_settings
from finetune.config.validate import to_plain
from finetune.data.batches import Batch
from finetune.data.harmony.render import Example
from finetune.data.plan import BatchPlan, Step
from finetune.errors import CheckError, InputError, Interrupted
from finetune.evaluate.evalset import validation_examples
from finetune.evaluate.likelihood import held_out_loss
from finetune.files import seed_of, write_json
from finetune.model.forward import checkpoint_activations
from finetune.objectives.base import make_objective
from finetune.records import parse_record
from finetune.train.checkpoint import STATE, Checkpoint, CheckpointWriter
from finetune.train.engines.base import open_engine
from finetune.train.failures import NotFinite, digest_of, write_evidence
from finetune.train.metrics import LossSpikes, MetricsLog, Tracker, memory_gib
from finetune.train.optim import learning_rate
from finetune.train.routing_watch import RoutingWatch
from finetune.train.run_directory import Run
from finetune.train.session import Session
from finetune.train.step import OptimiserStep, StepStats
from finetune.train.watchdog import StopRequest, Watchdog

MOST_SKIPPED = 10  # steps in a row; after that the cause is not a few records


@dataclass(frozen=True)
class TrainerState:
    """Counters of a run; with adapter and optimiser, all that resuming needs.

    Attributes:
        step: optimiser steps made.
        tokens, trained_tokens: seen so far, without padding.
        seconds: spent training, over all sessions of the run.
        best_loss, best_step: best validation loss and its step; None before the first validation.
        evaluations_since_best: for early stopping.
        validated: the last step whose validation is done; a signal may have interrupted a later one.
        audited: factors whose audit passed, such as "b" or "ba".
        skipped_in_a_row: steps skipped since the last update, because their numbers were not finite.
    """

    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    validated: int = 0
    audited: str = ""
    skipped_in_a_row: int = 0


class StepSource(Protocol):
    """Gives the micro-batches of each step; those of one step may depend on the model as the step before left it."""

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""

    def step(self, number: int) -> tuple[int, list[Batch]]:
        """Epoch, and this rank's micro-batches, of step `number` from 0; every rank has equally many micro-batches."""


class PlannedSteps:
    """The steps of a data plan, which are known before the run."""

    def __init__(self, plan: BatchPlan) -> None:
        self.plan = plan
        self._epoch = -1
        self._steps: Sequence[Step] = []

    @property
    def total_steps(self) -> int:
        """See `StepSource`."""
        return self.plan.total_steps

    def step(self, number: int) -> tuple[int, list[Batch]]:
        """See `StepSource`."""
        epoch, index = self.plan.position(number)
        if epoch != self._epoch:
            self._epoch, self._steps = epoch, self.plan.steps(epoch)
        return epoch, [self.plan.batch(micro_batch) for micro_batch in self._steps[index]]


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators (dropout draws from them) for one step.

    The draws of a step depend on its number alone: a resumed run repeats them bit for bit without a generator's state
    in the checkpoint, and a repeated or skipped validation in between changes nothing.
    """
    torch.manual_seed(seed_of(seed, "step", step, "process", rank))


class Trainer:
    """Trains the adapter of a session, and writes metrics and checkpoints into a run.

    Args:
        session: data, base, adapter and ranks.
        run: where metrics and checkpoints are written.
        stop: signals that ask to stop.

    Attributes:
        engine: stores the adapter and its optimiser.
        state: counters of the run.
        watchdog: gets a heartbeat for every step and micro-batch.
        routing: measures routing after each validation; None: not wanted.
        audit_lines: results of the gradient audits.
    """

    def __init__(self, session: Session, run: Run, stop: StopRequest) -> None:
        config = session.config
        self.config, self.base, self.adapter, self.world = config, session.base, session.adapter, session.world
        self.run, self.stop = run, stop
        self.source: StepSource = PlannedSteps(session.plan)
        self.tracker = Tracker(session.accelerator, config.logging, to_plain(config), run.path)
        self.engine = open_engine(config, session.base, session.adapter, session.accelerator, session.world)
        log.info(f"engine: {self.engine.describe()}")
        if run.writes and (settings := deepspeed_settings(config)):
            write_json(run.path / "deepspeed.json", settings)
        self.watchdog = Watchdog(session.world, config.distributed.timeout_s)
        self.metrics = MetricsLog(run.metrics, writes=run.writes)
        self.writer = CheckpointWriter(run.checkpoints, config.save.keep, background=config.save.background)
        objective = make_objective(config.objective)
        self.step = OptimiserStep(config.trainer, session.base, self.engine, session.adapter, objective)
        self.data_fingerprint = session.splits["train"].stats.fingerprint
        self.validation: tuple[Example, ...] = ()
        if "validation" in session.splits:
            self.validation = validation_examples(session.splits["validation"], config.evaluate.validation_examples)
        self.routing: RoutingWatch | None = None
        if config.evaluate.routing_examples:
            self.routing = RoutingWatch(session, run, self.tracker, self._between_batches)
        self.state = TrainerState()
        self.spikes = LossSpikes([])
        self.audit_lines: list[str] = []
        if config.trainer.activation_checkpointing:
            checkpoint_activations(session.base.model)

    def train(self) -> None:
        """Run to the end, an early stop or a signal.

        Raises:
            CheckError: loss or gradient is not finite, or the audit failed; no update was made from it.
            Interrupted: a signal came; a checkpoint was saved.
            MachineError: a checkpoint could not be written.
        """
        total = self.source.total_steps
        asked = 0
        with self.writer, log.Progress("training", total, "steps") as progress:
            progress.start_at(self.state.step)
            stopped_early = self.state.step > 0 and self._evaluate_and_save(total)
            while self.state.step < total and not stopped_early:
                self._make_step(progress)
                self.writer.check()
                stopped_early = self._evaluate_and_save(total)
                asked = self._asked_to_stop()
                if asked:
                    break
        if asked:
            self.save()
            raise Interrupted(
                f"stopped by a signal after step {self.state.step} of {total}; everything is saved",
                signal_number=asked,
                fix=f"resume with `finetune train --resume {self.run.path}`",
            )
        self.world.barrier()  # from here on every rank may read what rank 0 has written

    def _make_step(self, progress: log.Progress) -> None:
        """Make and count one step; skip it if its numbers are not finite and the recipe says so."""
        self.run.check_in_place()
        step = self.state.step
        epoch, batches = self.source.step(step)
        started = time.monotonic()
        rate = learning_rate(step, self.source.total_steps, self.config.trainer)
        try:
            stats = self.step(
                batches,
                rate,
                step + 1,
                begin=lambda: seed_step(self.config.seed, step, self.world.rank),
                before_update=self._audit,
                heartbeat=lambda doing: self.watchdog.heartbeat(f"step {step + 1}, {doing}"),
            )
        except NotFinite as error:
            self._keep_evidence(error, batches, rate)
            if self.config.trainer.on_nonfinite == "stop" or self.state.skipped_in_a_row + 1 >= MOST_SKIPPED:
                raise
            log.warning(f"{error.what}; skipped. {error.why}")
            skipped = self.state.skipped_in_a_row + 1
            self.state = replace(self.state, step=step + 1, skipped_in_a_row=skipped)
            self.metrics.append("skipped", step + 1, epoch=epoch, samples=error.culprits)
            return
        nothing_trained = step == self.state.skipped_in_a_row  # all steps before were skipped, so no update was made
        if nothing_trained and (line := self.step.objective.check_first_step(stats.terms)):
            log.info(line)
            self.audit_lines.append(line)
        self._record(stats, rate, epoch, time.monotonic() - started, progress)

    def _keep_evidence(self, error: NotFinite, batches: list[Batch], rate: float) -> None:
        """Write what reproduces the same numbers: each rank's micro-batches, and the adapter before the update."""
        directory = self.run.path / "nonfinite" / f"step-{self.state.step + 1:08d}"
        adapter = self.engine.adapter_tensors()
        write_evidence(
            directory,
            error,
            batches,
            adapter if self.run.writes else None,
            rank=self.world.rank,
            learning_rate=rate,
            seed=self.config.seed,
        )
        self.world.barrier()
        log.info(f"the step's micro-batches and the adapter before it are in {directory}")

    def _audit(self) -> None:
        """Audit B on the first step; A on the second, when an update has made B nonzero (the rate is never zero)."""
        audited = self.state.audited
        due = "b" if not audited else "a" if audited == "b" else None
        if due is None:
            return
        result = audit_gradients(self.base.model, self.adapter, due, gradient_of=self.engine.gradient)
        log.info(result.describe())
        self.audit_lines.append(result.describe())
        self.state = replace(self.state, audited=audited + due)

    def _record(self, stats: StepStats, rate: float, epoch: int, seconds: float, progress: log.Progress) -> None:
        """Count a step and log it."""
        state = self.state = replace(
            self.state,
            step=self.state.step + 1,
            tokens=self.state.tokens + stats.tokens,
            trained_tokens=self.state.trained_tokens + stats.trained_tokens,
            seconds=self.state.seconds + seconds,
            skipped_in_a_row=0,
        )
        speed, memory = stats.tokens / seconds, memory_gib(self.base.device)
        self.metrics.append(
            "step",
            state.step,
            epoch=epoch,
            **stats.terms,
            learning_rate=rate,
            gradient_norm=stats.gradient_norm,
            tokens=stats.tokens,
            trained_tokens=stats.trained_tokens,
            tokens_per_second=round(speed, 1),
            memory_gib=round(memory, 3),
        )
        if (usual := self.spikes.usual_if_spike(stats.loss)) is not None:
            self.metrics.append("spike", state.step, loss=stats.loss, usual=usual)
            log.warning(f"step {state.step}: the loss jumped to {stats.loss:.4f}; {usual:.4f} was usual")
        shown = stats.terms | {"gradient_norm": stats.gradient_norm, "learning_rate": rate}
        self.tracker.log(shown | {"tokens_per_second": speed, "memory_gib": memory}, state.step)
        details = f"loss {stats.loss:.4f}, lr {rate:.2e}, {speed:,.0f} tokens/s, {memory:.2f} GiB"
        progress.show(state.step, details, force=state.step % self.config.logging.every_steps == 0)

    def _evaluate_and_save(self, total: int) -> bool:
        """Do what is due after a step; True when early stopping ends the training."""
        step, evaluate, save = self.state.step, self.config.evaluate, self.config.save
        improved = False
        due = evaluate.every_steps is not None and step % evaluate.every_steps == 0
        if self.validation and (due or step == total) and self.state.validated != step:
            improved = self._validate()
        keeps_best = save.best_metric != "none" and improved
        if keeps_best or step == total or (save.every_steps is not None and step % save.every_steps == 0):
            self.save(wait=False)
        patience = self.config.trainer.early_stop_patience
        if patience is not None and self.state.evaluations_since_best >= patience:
            log.info(f"early stop at step {step}: no better validation loss in {patience} evaluations")
            self.save()
            return True
        return False

    def _validate(self) -> bool:
        """Measure the validation loss; whether it is the best so far."""
        self.base.model.eval()
        self.watchdog.heartbeat(f"validation after step {self.state.step}")
        found = held_out_loss(
            self.base.model,
            self.validation,
            self.config.data.max_length,
            task="validation",
            between_batches=self._between_batches,
        )
        loss = float(self.world.broadcast(found.mean))
        if not math.isfinite(loss):
            raise CheckError(f"validation loss after step {self.state.step} is {loss}")
        if self.routing is not None:
            self.routing.measure(self.state.step)
        self.metrics.append("evaluation", self.state.step, validation_loss=loss)
        self.tracker.log({"validation_loss": loss}, self.state.step)
        improved = self.state.best_loss is None or loss < self.state.best_loss
        if improved:
            self.state = replace(self.state, best_loss=loss, best_step=self.state.step, evaluations_since_best=0)
        else:
            self.state = replace(self.state, evaluations_since_best=self.state.evaluations_since_best + 1)
        self.state = replace(self.state, validated=self.state.step)
        log.info(f"step {self.state.step}: validation loss {loss:.4f}{' (best so far)' if improved else ''}")
        return improved

    def _between_batches(self) -> None:
        self.watchdog.heartbeat("validating")
        self.stop_if_asked()

    def _asked_to_stop(self) -> int:
        """The signal that came to any rank, 0 if none did. Every rank calls it."""
        return self.world.all_reduce_max(self.stop.signal_number or 0)

    def stop_if_asked(self, *, save: bool = True) -> None:
        """Stop if a signal came to any rank: evaluations are long, and a machine about to stop does not wait for them.

        Args:
            save: a checkpoint first, unless the newest one is what is to be resumed from.

        Raises:
            Interrupted: a signal came.
        """
        signal_number = self._asked_to_stop()
        if not signal_number:
            return
        if save:
            self.save()
        raise Interrupted(
            "stopped by a signal while evaluating; everything is saved",
            signal_number=signal_number,
            fix=f"resume with `finetune train --resume {self.run.path}`",
        )

    def save(self, *, wait: bool = True) -> None:
        """Write a checkpoint and remove the ones no longer kept; `wait` until it is on disk. Rank 0 writes for all."""
        self.watchdog.heartbeat(f"saving after step {self.state.step}")
        optimizer, adapter = self.engine.optimizer_tensors(), self.engine.adapter_tensors()
        if self.world.world_size > 1:
            self.world.assert_same("the adapter", digest_of(adapter))
        if not self.run.writes:
            return
        state = {
            "loop": asdict(self.state),
            "audit": list(self.audit_lines),
            "data_fingerprint": self.data_fingerprint,
            "base_identity": self.base.identity,
        }
        best_to_keep = self.state.best_step if self.config.save.best_metric != "none" else None
        self.writer.save(self.state.step, Checkpoint(adapter, optimizer, state), best_to_keep)
        if wait:
            self.writer.wait()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint.

        Raises:
            InputError: it belongs to other data, another base or another adapter.
        """
        for name, now in (("data_fingerprint", self.data_fingerprint), ("base_identity", self.base.identity)):
            saved = str(checkpoint.state.get(name))
            if saved != now:
                raise InputError(
                    f"the checkpoint's {name.replace('_', ' ')} is not this run's",
                    why=f"{saved[:12]} was saved, {now[:12]} is here",
                    fix="restore the data and base it was started with, or start a new run",
                )
        self.engine.load(checkpoint.adapter, checkpoint.optimizer)
        where = f"the checkpoint's {STATE}"
        self.state = parse_record(TrainerState, checkpoint.state.get("loop"), f"{where}: loop")
        self.audit_lines = parse_record(list[str], checkpoint.state.get("audit"), f"{where}: audit")
        self.metrics.cut_after(self.state.step)
        self.spikes = LossSpikes(self.metrics.losses())

    def load_adapter(self, checkpoint: Checkpoint) -> None:
        """Set the adapter's parameters to a checkpoint's."""
        self.engine.load(checkpoint.adapter, None)
