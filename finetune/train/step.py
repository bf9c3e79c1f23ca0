"""One optimiser step: micro-steps forward and backward, the checks before the update, the update."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.config.schema import TrainerConfig
from finetune.console import warn
from finetune.data.batches import PADDING_SEGMENT, Batch
from finetune.errors import CapacityError, CheckError
from finetune.model.build import Base
from finetune.model.forward import hidden_states
from finetune.model.offload import CheckpointOffload
from finetune.model.predictions import predicted_tokens
from finetune.model.router import record_routing
from finetune.train.engine import Engine
from finetune.train.losses import balance_loss, language_loss
from finetune.train.processes import Processes

SAMPLES_NAMED = 12
_SMALLER = (
    "shorten data.max_length, lower trainer.rows_per_micro_step (or set trainer.halve_micro_batch_on_oom=true), or "
    "lower model.experts_per_chunk"
)


@dataclass(frozen=True)
class StepFigures:
    """What one optimiser step measured.

    Attributes:
        loss: weighted mean NLL in nats per trained token, over the whole step.
        balance: router balance, mean of the micro-steps; 1 at uniform routing.
        gradient_norm: before clipping.
        tokens, trained_tokens: without padding, of all processes.
    """

    loss: float
    balance: float
    gradient_norm: float
    tokens: int
    trained_tokens: int


class OptimiserStep:
    """Callable that makes one step.

    The language loss is the sum of weight x NLL over the whole step (all micro-steps, all processes) divided by the sum
    of weights, so that 8 micro-steps of 1 row equal 1 of 8, ragged and partial ones included; the balance loss is the
    micro-steps' mean.

    Args:
        config: clipping, balance loss, what to do about numbers that are not finite and about memory.
        base: frozen, with the adapter attached.
        engine: holds the adapter and its optimiser, and knows who takes part.

    Attributes:
        parts: batches that each micro-step is made in; doubled when memory ran out.
    """

    def __init__(self, config: TrainerConfig, base: Base, engine: Engine) -> None:
        self.config, self.base, self.engine, self.processes = config, base, engine, engine.processes
        self.parts = 1
        self.offload: AbstractContextManager[object] = nullcontext()
        if config.activation_offload:
            self.offload = CheckpointOffload(base.device, base.checkpoint.shape.hidden, base.compute_dtype)

    def __call__(
        self,
        batches: list[Batch],
        rate: float,
        number: int,
        *,
        begin: Callable[[], None] = lambda: None,
        before_update: Callable[[], None] = lambda: None,
        beat: Callable[[str], None] = lambda _: None,
    ) -> StepFigures:
        """Accumulate gradients over micro-steps and update once.

        Args:
            batches: this process's micro-steps.
            rate: learning rate of this step.
            number: of the step from 1, for messages.
            begin: seeds torch; called again when the step is begun again.
            before_update: called when all gradients are there and finite.
            beat: told what is being done.

        Raises:
            CheckError: no token of the step is trained.
            NotFinite: loss or gradients are not; no update was made.
            CapacityError: a process is out of memory, and smaller micro-steps are not wanted or not possible.
        """
        self.base.model.train()
        total_weight = self._total_weight(batches, number)
        while True:
            begin()
            try:
                pieces = [piece for batch in batches for piece in batch.parts(self.parts)]
                losses, balances = self._accumulate(pieces, total_weight, beat)
                break
            except _OutOfMemoryError as error:
                self._make_smaller(batches, error.text)
        beat("exchanging gradients")
        self.engine.exchange()
        norm = self.engine.gradient_norm()
        figures = self._figures(batches, losses, balances, norm)
        if not all(math.isfinite(value) for value in (figures.loss, figures.balance, figures.gradient_norm)):
            self.engine.drop()
            raise NotFinite(figures, number, losses, pieces, self.processes)
        before_update()
        self.engine.update(rate)
        return figures

    def _accumulate(
        self, pieces: list[Batch], total_weight: float, beat: Callable[[str], None]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Forward and backward of all micro-steps: their losses and balances, already shares of the step's."""
        losses: list[Tensor] = []
        balances: list[Tensor] = []
        failure = ""
        for number, batch in enumerate(pieces):
            beat(f"micro-step {number + 1} of {len(pieces)}")
            try:
                loss, balance = self.engine.forward(self._micro_step, batch, last=number + 1 == len(pieces))
                loss, balance = loss / total_weight, balance / len(pieces)
                # Processes average their gradients; the loss is already a share of the whole step's, so undo that.
                total = loss * self.processes.count + self.config.router_balance_coefficient * balance
                self.engine.backward(total)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                failure = (str(error).splitlines() or ["out of memory"])[0]
                break  # the traceback holds tensors; what is to be done about it happens outside
            losses.append(loss.detach())
            balances.append(balance.detach())
        if failure and not self.engine.can_retry:  # the others are waiting inside a layer and cannot be asked
            raise CapacityError(f"process {self.processes.rank} is out of memory: {failure}", fix=_SMALLER)
        beat("waiting for the others")
        if self.processes.largest(int(bool(failure))):
            raise _OutOfMemoryError(failure)
        return losses, balances

    def _make_smaller(self, batches: list[Batch], failure: str) -> None:
        """Halve the rows of a micro-step, everywhere."""
        self.engine.drop()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        failures = self.processes.gather(failure)
        who = [str(rank) for rank, text in enumerate(failures) if text]
        text = next(text for text in failures if text)
        where = f"process {', '.join(who)} is " if self.processes.count > 1 else ""
        most_rows = self.processes.largest(max(len(batch.sample_ids) for batch in batches))
        if not self.config.halve_micro_batch_on_oom or self.parts >= most_rows:
            why = None if not self.config.halve_micro_batch_on_oom else "a micro-step is down to one row"
            raise CapacityError(f"{where}out of memory: {text}", why=why, fix=_SMALLER)
        self.parts *= 2
        warn(
            f"{where}out of memory ({text}): each micro-step is made in {self.parts} parts from here on; steps stay "
            "the same"
        )

    def _figures(self, batches: list[Batch], losses: list[Tensor], balances: list[Tensor], norm: float) -> StepFigures:
        loss, balance, tokens, trained = self.processes.sums(
            torch.stack(losses).sum().item(),
            torch.stack(balances).sum().item() / self.processes.count,
            sum(batch.num_tokens for batch in batches),
            sum(int(batch.weights.count_nonzero()) for batch in batches),
        )
        return StepFigures(loss, balance, norm, int(tokens), int(trained))

    def _micro_step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Summed language loss, and balance loss, of one micro-step."""
        model, device = self.base.model, self.base.device
        where, targets, weights = predicted_tokens(batch.input_ids, batch.weights, batch.segments)
        with record_routing(model) as tape, self.offload:
            hidden = hidden_states(model, batch.input_ids, batch.positions, batch.segments)
        loss = language_loss(hidden, model.lm_head.weight, where.to(device), targets.to(device), weights.to(device))
        real_tokens = (batch.segments != PADDING_SEGMENT).reshape(-1).to(device)
        return loss, balance_loss(tape.layers, real_tokens)

    def _total_weight(self, batches: list[Batch], number: int) -> float:
        (total,) = self.processes.sums(sum(batch.weight_sum for batch in batches))
        if total == 0:
            raise CheckError(
                f"step {number} has no trained token: its loss would be 0 / 0",
                why=f"samples: {_named(batches)}",
                fix="look at the loss weights of the data",
            )
        return total


class NotFinite(CheckError):
    """A step whose loss or gradient is not finite, seen before the update: through clipping, one NaN makes all NaN.

    Attributes:
        culprits: by process, the ids of the rows in micro-steps whose own loss was not finite; all of the step's where
            only the gradient was not.
    """

    def __init__(
        self, figures: StepFigures, number: int, losses: list[Tensor], batches: list[Batch], processes: Processes
    ) -> None:
        mine = [batch for batch, loss in zip(batches, losses, strict=True) if not torch.isfinite(loss)]
        found = processes.gather(_ids(mine))
        if not any(found):
            found = processes.gather(_ids(batches))
        self.culprits: dict[int, list[str]] = {rank: ids for rank, ids in enumerate(found) if ids}
        named = "; ".join(
            (f"process {rank}: " if processes.count > 1 else "") + _first_of(ids) for rank, ids in self.culprits.items()
        )
        super().__init__(
            f"step {number} is not finite: loss {figures.loss}, gradient norm {figures.gradient_norm}",
            why=f"no update was made from it; its samples: {named}",
            fix="lower trainer.learning_rate, or look at those samples; resume from the last checkpoint",
        )


class _OutOfMemoryError(Exception):
    """Some process ran out of memory in this step. `text`: this one's message, empty if it was another."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is torch's word for too little memory, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _ids(batches: list[Batch]) -> list[str]:
    return [name for batch in batches for row in batch.sample_ids for name in row]


def _named(batches: list[Batch]) -> str:
    return _first_of(_ids(batches))


def _first_of(ids: list[str]) -> str:
    return ", ".join(ids[:SAMPLES_NAMED]) + (" ..." if len(ids) > SAMPLES_NAMED else "")
