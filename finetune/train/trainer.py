"""The training loop: micro-steps, one optimiser step, checks before the update, evaluation and saves on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from finetune import log
from finetune.adapters.audit import audit_gradients
from finetune.adapters.lora import Adapter
from finetune.config.schema import RunConfig
from finetune.data.batches import Batch, BatchPlan
from finetune.errors import CheckError, InputError, Interrupted
from finetune.files import seed_of
from finetune.model.build import Base
from finetune.model.forward import checkpoint_activations
from finetune.train.checkpoint import Checkpoint, CheckpointWriter
from finetune.train.engines.base import Engine
from finetune.train.failures import NotFinite, digest_of, write_evidence
from finetune.train.metrics import LossSpikes, MetricsLog, Tracker, memory_gib
from finetune.train.optim import learning_rate
from finetune.train.routing_watch import RoutingWatch
from finetune.train.run_directory import RunDirectory
from finetune.train.step import OptimiserStep, StepFigures
from finetune.train.watchdog import StopRequest, Watchdog

MOST_SKIPPED = 10  # steps in a row; after that something else is wrong than a few rows

ValidationLoss = Callable[[], float]
"""Scores the validation samples with the model as it is: nats per trained token."""


@dataclass(frozen=True)
class LoopState:
    """Where a run stands; together with adapter and optimiser it is all that resuming needs.

    Attributes:
        step: optimiser steps made.
        tokens, trained_tokens: seen so far, without padding.
        seconds: spent training, over all sittings.
        best_loss, best_step: best validation loss and when; None before the first evaluation.
        evaluations_since_best: for early stopping.
        validated: the last step whose validation is done; a signal may have cut a later one short.
        audited: factors whose audit passed, such as "b" or "ba".
        skipped_in_a_row: steps left out since the last update, because their numbers were not finite.
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


def seed_step(seed: int, step: int, process: int) -> None:
    """Seed torch's generators (dropout draws from them) for one step.

    What a step draws then follows from its number: a resumed run repeats it bit for bit without a generator's state in
    the checkpoint, and a recomputed or skipped evaluation in between changes nothing.
    """
    torch.manual_seed(seed_of(seed, "step", step, "process", process))


class Trainer:
    """Trains an adapter over a frozen base.

    Args:
        config: the whole run.
        base: frozen, with `adapter` attached.
        plan: which rows each step takes.
        engine: holds the adapter and its optimiser, and knows who takes part.
        run: where figures and checkpoints go.
        tracker: an outside tracker.
        validation_loss: None when there is nothing to validate on.
        data_fingerprint: stored in checkpoints; resuming on other data is refused.
        hangs: told of every step and micro-step.
        watch: looks at routing after each validation. None: not wanted.
    """

    def __init__(
        self,
        config: RunConfig,
        base: Base,
        adapter: Adapter,
        plan: BatchPlan,
        engine: Engine,
        run: RunDirectory,
        tracker: Tracker,
        validation_loss: ValidationLoss | None,
        data_fingerprint: str,
        hangs: Watchdog,
        watch: RoutingWatch | None = None,
    ) -> None:
        self.config, self.base, self.adapter, self.plan = config, base, adapter, plan
        self.engine, self.processes, self.run, self.tracker = engine, engine.processes, run, tracker
        self.validation_loss, self.data_fingerprint = validation_loss, data_fingerprint
        self.hangs, self.watch = hangs, watch
        self.metrics = MetricsLog(run.metrics, writes=run.writes)
        self.writer = CheckpointWriter(run.checkpoints, config.save.keep, background=config.save.background)
        self.step = OptimiserStep(config.trainer, base, engine, adapter)
        self.state = LoopState()
        self.spikes = LossSpikes([])
        self.audit_lines: list[str] = []
        if config.trainer.activation_checkpointing:
            checkpoint_activations(base.model)

    def train(self, stop: StopRequest) -> LoopState:
        """Run to the end, an early stop or a signal.

        Raises:
            CheckError: loss or gradient is not finite, or the audit failed; no update was made from it.
            Interrupted: a signal came; a checkpoint was saved.
            MachineError: a checkpoint could not be written.
        """
        total = self.plan.total_steps
        epoch_steps: tuple[int, list[Any]] = (-1, [])
        asked = 0
        with self.writer, log.Progress("training", total, "steps") as progress:
            progress.start_at(self.state.step)
            stopped_early = self.state.step > 0 and self._evaluate_and_save(total)
            while self.state.step < total and not stopped_early:
                epoch, index = self.plan.position(self.state.step)
                if epoch_steps[0] != epoch:
                    epoch_steps = (epoch, self.plan.steps(epoch))
                batches = [self.plan.batch(micro) for micro in epoch_steps[1][index]]
                self._make_step(batches, epoch, progress)
                self.writer.check()
                stopped_early = self._evaluate_and_save(total)
                asked = self.processes.largest(stop.signal_number or 0)
                if asked:
                    break
        if asked:
            self.save()
            raise Interrupted(
                f"stopped by a signal after step {self.state.step} of {total}; everything is saved",
                signal_number=asked,
                fix=f"go on with `finetune train --resume {self.run.path}`",
            )
        self.processes.largest(0)  # from here on every process may read what process 0 has written
        return self.state

    def _make_step(self, batches: list[Batch], epoch: int, progress: log.Progress) -> None:
        """One step, counted, unless its numbers are not finite and the recipe says to skip such a step."""
        started, step = time.monotonic(), self.state.step
        rate = learning_rate(step, self.plan.total_steps, self.config.trainer)
        try:
            figures = self.step(
                batches,
                rate,
                step + 1,
                begin=lambda: seed_step(self.config.seed, step, self.processes.rank),
                before_update=self._audit,
                beat=lambda doing: self.hangs.beat(f"step {step + 1}, {doing}"),
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
        self._count(figures, rate, epoch, time.monotonic() - started, progress)

    def _keep_evidence(self, error: NotFinite, batches: list[Batch], rate: float) -> None:
        """Write what it takes to see the same numbers again: each process's rows, and the adapter before the update."""
        directory = self.run.path / "nonfinite" / f"step-{self.state.step + 1:08d}"
        adapter = self.engine.adapter_tensors()
        facts = {"error": str(error), "rows": error.culprits, "learning_rate": rate, "seed": self.config.seed}
        write_evidence(directory, self.processes.rank, batches, adapter if self.run.writes else None, facts)
        self.processes.wait()
        log.info(f"the step's rows and the adapter before it are in {directory}")

    def _audit(self) -> None:
        """B on the first step; A on the second, when an update has moved B away from zero (the rate is never zero)."""
        audited = self.state.audited
        due = "b" if not audited else "a" if audited == "b" else None
        if due is None:
            return
        result = audit_gradients(self.base.model, self.adapter, due, gradient_of=self.engine.gradient)
        log.info(result.describe())
        self.audit_lines.append(result.describe())
        self.state = replace(self.state, audited=audited + due)

    def _count(self, figures: StepFigures, rate: float, epoch: int, seconds: float, progress: log.Progress) -> None:
        state = self.state = replace(
            self.state,
            step=self.state.step + 1,
            tokens=self.state.tokens + figures.tokens,
            trained_tokens=self.state.trained_tokens + figures.trained_tokens,
            seconds=self.state.seconds + seconds,
            skipped_in_a_row=0,
        )
        speed, memory = figures.tokens / seconds, memory_gib(self.base.device)
        self.metrics.append(
            "step",
            state.step,
            epoch=epoch,
            loss=figures.loss,
            balance_loss=figures.balance,
            router_z_loss=figures.router_z,
            learning_rate=rate,
            gradient_norm=figures.gradient_norm,
            tokens=figures.tokens,
            trained_tokens=figures.trained_tokens,
            tokens_per_second=round(speed, 1),
            memory_gib=round(memory, 3),
        )
        if (usual := self.spikes.usual_if_spike(figures.loss)) is not None:
            self.metrics.append("spike", state.step, loss=figures.loss, usual=usual)
            log.warning(f"step {state.step}: the loss jumped to {figures.loss:.4f}; {usual:.4f} was usual")
        shown = {"loss": figures.loss, "balance_loss": figures.balance, "router_z_loss": figures.router_z}
        shown |= {"gradient_norm": figures.gradient_norm, "learning_rate": rate}
        shown |= {"tokens_per_second": speed, "memory_gib": memory}
        self.tracker.log(shown, state.step)
        details = f"loss {figures.loss:.4f}, lr {rate:.2e}, {speed:,.0f} tokens/s, {memory:.2f} GiB"
        progress.show(state.step, details, force=state.step % self.config.logging.every_steps == 0)

    def _evaluate_and_save(self, total: int) -> bool:
        """Do what is due after a step; True when early stopping says to end."""
        step, evaluate, save = self.state.step, self.config.evaluate, self.config.save
        improved = False
        due = evaluate.every_steps is not None and step % evaluate.every_steps == 0
        if self.validation_loss is not None and (due or step == total) and self.state.validated != step:
            improved = self._evaluate()
        keeps_best = save.best_metric != "none" and improved
        if keeps_best or step == total or (save.every_steps is not None and step % save.every_steps == 0):
            self.save(wait=False)
        patience = self.config.trainer.early_stop_patience
        if patience is not None and self.state.evaluations_since_best >= patience:
            log.info(f"early stop at step {step}: no better validation loss in {patience} evaluations")
            self.save()
            return True
        return False

    def _evaluate(self) -> bool:
        """Validate, and say whether it is the best so far."""
        assert self.validation_loss is not None
        self.base.model.eval()
        self.hangs.beat(f"validation after step {self.state.step}")
        loss = float(self.processes.broadcast(self.validation_loss()))
        if not math.isfinite(loss):
            raise CheckError(f"validation loss after step {self.state.step} is {loss}")
        if self.watch is not None:
            self.watch.look(self.state.step)
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

    def save(self, *, wait: bool = True) -> None:
        """Write a checkpoint of this moment and remove the ones no longer kept; `wait` until it is on disk.

        Process 0 writes for all.
        """
        self.hangs.beat(f"saving after step {self.state.step}")
        optimizer, adapter = self.engine.optimizer_tensors(), self.engine.adapter_tensors()
        self.processes.assert_same("the adapter", digest_of(adapter))
        if not self.run.writes:
            return
        facts = {
            "loop": asdict(self.state),
            "audit": self.audit_lines,
            "data_fingerprint": self.data_fingerprint,
            "base_identity": self.base.identity,
        }
        self.writer.save(self.state.step, Checkpoint(adapter, optimizer, facts), self._best_to_keep())
        if wait:
            self.writer.wait()

    def _best_to_keep(self) -> int | None:
        return self.state.best_step if self.config.save.best_metric != "none" else None

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint.

        Raises:
            InputError: it belongs to other data or another base.
        """
        for fact, now in (("data_fingerprint", self.data_fingerprint), ("base_identity", self.base.identity)):
            if checkpoint.state[fact] != now:
                raise InputError(
                    f"the checkpoint's {fact.replace('_', ' ')} is not this run's",
                    why=f"{checkpoint.state[fact][:12]} was saved, {now[:12]} is here",
                    fix="restore the data and base it was started with, or start a new run",
                )
        self.engine.load(checkpoint.adapter, checkpoint.optimizer)
        self.state = LoopState(**checkpoint.state["loop"])
        self.audit_lines = list(checkpoint.state["audit"])
        self.metrics.cut_after(self.state.step)
        self.spikes = LossSpikes(self.metrics.losses())

    def load_adapter(self, checkpoint: Checkpoint) -> None:
        """Set the adapter's parameters to a checkpoint's."""
        self.engine.load(checkpoint.adapter, None)
