"""One optimiser step: micro-steps forward and backward, the checks before the update, the update."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune import log
from finetune.adapters.lora import Adapter
from finetune.config.schema import TrainerConfig
from finetune.data.batches import Batch
from finetune.errors import CapacityError, CheckError, is_out_of_memory
from finetune.model.build import Base
from finetune.model.forward import hidden_states, record_router, shift_labels
from finetune.model.offload import CheckpointOffload
from finetune.train.engines.base import Engine
from finetune.train.failures import NotFinite, OutOfMemory, named_rows
from finetune.train.router_loss import RouterLoss, StepRouting, language_loss


@dataclass(frozen=True)
class StepFigures:
    """What one optimiser step measured.

    Attributes:
        loss: weighted mean NLL in nats per trained token, over the whole step.
        balance: router balance against its target, mean over the step's tokens; 1 where routing is as wanted.
        router_z: router z-loss, mean over the step's tokens.
        gradient_norm: before clipping.
        tokens, trained_tokens: without padding, of all processes.
    """

    loss: float
    balance: float
    router_z: float
    gradient_norm: float
    tokens: int
    trained_tokens: int


class OptimiserStep:
    """Callable that makes one step.

    The language loss is the sum of weight x NLL over the whole step (all micro-steps, all processes) divided by the sum
    of weights, so that 8 micro-steps of 1 row equal 1 of 8, ragged and partial ones included. The terms on the
    router are those of `finetune.train.router_loss`.

    Args:
        config: coefficients, and what to do when memory runs out.
        base: frozen, with the adapter attached.
        engine: holds the adapter and its optimiser, and knows who takes part.
        adapter: needed for the balance target `base` alone.

    Attributes:
        parts: batches that each micro-step is made in; doubled when memory ran out.
    """

    def __init__(self, config: TrainerConfig, base: Base, engine: Engine, adapter: Adapter | None = None) -> None:
        self.config, self.base, self.engine, self.processes = config, base, engine, engine.processes
        self.parts = 1
        self.router_loss = RouterLoss(config, base, adapter, engine.accelerator)
        coefficients = (1.0, config.router_balance_coefficient, config.router_z_loss_coefficient)
        self._coefficients = torch.tensor(coefficients, device=base.device)
        self.offload: AbstractContextManager[object] = nullcontext()
        if config.activation_offload:
            self.offload = CheckpointOffload(base.device, base.checkpoint.arch.hidden, base.compute_dtype)

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
            CapacityError: another process is out of memory, and smaller micro-steps are not wanted or not possible.
        """
        self.base.model.train()
        total_weight = self._total_weight(batches, number)
        while True:
            begin()
            pieces = [piece for batch in batches for piece in batch.parts(self.parts)]
            try:
                sums = self._accumulate(pieces, total_weight, beat)
                break
            except OutOfMemory as error:
                self._make_smaller(batches, error.cause)
        beat("exchanging gradients")
        self.engine.exchange()
        figures = self._figures(batches, torch.stack(sums).sum(0), self.engine.gradient_norm())
        if not all(map(math.isfinite, (figures.loss, figures.balance, figures.router_z, figures.gradient_norm))):
            self.engine.drop()
            what = f"step {number} is not finite: loss {figures.loss}, gradient norm {figures.gradient_norm}"
            raise NotFinite(what, sums, pieces, self.processes)
        before_update()
        self.engine.update(rate)
        return figures

    def _accumulate(self, pieces: list[Batch], total_weight: float, beat: Callable[[str], None]) -> list[Tensor]:
        """Forward and backward of all micro-steps: each one's shares of the step's terms.

        Raises:
            OutOfMemory: in this process or another.
        """
        routing = self.router_loss.prepare(pieces)
        sums: list[Tensor] = []
        failure: BaseException | None = None
        for place, batch in enumerate(pieces):
            beat(f"micro-step {place + 1} of {len(pieces)}")
            try:
                last = place + 1 == len(pieces)
                terms = self.engine.forward(self._micro_step(place, total_weight, routing), batch, last=last)
                # World average their gradients; each term is already a share of the whole step's, so undo that.
                self.engine.backward((terms * self._coefficients).sum() * self.processes.count)
            except (MemoryError, RuntimeError) as error:
                # Without retry the others are waiting inside a layer, and cannot be asked.
                if not is_out_of_memory(error) or not self.engine.can_retry:
                    raise
                failure = error.with_traceback(None)  # it holds tensors
                break
            sums.append(terms.detach())
        beat("waiting for the others")
        if self.processes.largest(int(failure is not None)):
            raise OutOfMemory(failure)
        return sums

    def _micro_step(self, place: int, total_weight: float, routing: StepRouting) -> Callable[[Batch], Tensor]:
        """A micro-step's forward pass: shares of the step's language loss, balance loss and z-loss, float32 [3]."""
        model, device = self.base.model, self.base.device

        def forward(batch: Batch) -> Tensor:
            where, targets, weights = shift_labels(batch.input_ids, batch.weights, batch.segments)
            with record_router(model) as tape, self.offload:
                hidden = hidden_states(model, batch.input_ids, batch.positions, batch.segments)
            head = model.lm_head.weight
            loss = language_loss(hidden, head, where.to(device), targets.to(device), weights.to(device))
            balance, router_z = self.router_loss.shares(tape.layers, batch, routing, place)
            return torch.stack([loss / total_weight, balance, router_z])

        return forward

    def _make_smaller(self, batches: list[Batch], cause: BaseException | None) -> None:
        """Halve the rows of a micro-step, in every process.

        Raises:
            CapacityError: that is not wanted or not possible; where memory ran out the error itself is raised.
        """
        self.engine.drop()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        who = [str(rank) for rank, failed in enumerate(self.processes.gather(cause is not None)) if failed]
        most_rows = self.processes.largest(max(len(batch.example_ids) for batch in batches))
        if not self.config.halve_micro_batch_on_oom or self.parts >= most_rows:
            raise cause or CapacityError(f"process {', '.join(who)} is out of memory", fix="see what it wrote")
        self.parts *= 2
        where = f"process {', '.join(who)} is " if self.processes.count > 1 else ""
        log.warning(
            f"{where}out of memory: micro-steps are made in {self.parts} parts from here on; steps stay the same"
        )

    def _figures(self, batches: list[Batch], terms: Tensor, norm: float) -> StepFigures:
        loss, balance, router_z, tokens, trained = self.processes.sums(
            *terms.tolist(),
            sum(batch.num_tokens for batch in batches),
            sum(int(batch.weights.count_nonzero()) for batch in batches),
        )
        return StepFigures(loss, balance, router_z, norm, int(tokens), int(trained))

    def _total_weight(self, batches: list[Batch], number: int) -> float:
        (total,) = self.processes.sums(sum(batch.weight_sum for batch in batches))
        if total == 0:
            raise CheckError(
                f"step {number} has no trained token: its loss would be 0 / 0",
                why=f"samples: {named_rows(batches)}",
                fix="look at the loss weights of the data",
            )
        return total
