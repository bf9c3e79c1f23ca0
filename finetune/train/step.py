"""One optimiser step: micro-steps forward and backward, the checks before the update, the update."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from finetune.adapters.lora import Adapter
from finetune.config.schema import TrainerConfig
from finetune.data.batches import Batch
from finetune.errors import CheckError
from finetune.model.build import Base
from finetune.model.forward import hidden_states
from finetune.model.offload import CheckpointOffload
from finetune.model.predictions import predicted_tokens
from finetune.model.router import record_routing
from finetune.train.losses import language_loss
from finetune.train.router_loss import RouterLoss, StepRouting

SAMPLES_NAMED = 12


@dataclass(frozen=True)
class StepFigures:
    """What one optimiser step measured.

    Attributes:
        loss: weighted mean NLL in nats per trained token, over the whole step.
        balance: router balance against its target, mean over the step's tokens; 1 where routing is as wanted.
        router_z: router z-loss, mean over the step's tokens.
        gradient_norm: before clipping.
        tokens, trained_tokens: without padding, of this process.
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
        config: coefficients and clipping.
        base, parameters, optimizer, accelerator: what is trained, and by what.
        adapter: needed for the balance target `base` alone.
    """

    def __init__(
        self,
        config: TrainerConfig,
        base: Base,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        adapter: Adapter | None = None,
    ) -> None:
        self.config, self.base, self.parameters = config, base, parameters
        self.optimizer, self.accelerator = optimizer, accelerator
        self.router_loss = RouterLoss(config, base, adapter, accelerator)
        coefficients = (1.0, config.router_balance_coefficient, config.router_z_loss_coefficient)
        self._coefficients = torch.tensor(coefficients, device=base.device)
        self.offload: AbstractContextManager[object] = nullcontext()
        if config.activation_offload:
            self.offload = CheckpointOffload(base.device, base.checkpoint.shape.hidden, base.compute_dtype)

    def __call__(
        self, batches: list[Batch], rate: float, number: int, *, before_update: Callable[[], None] = lambda: None
    ) -> StepFigures:
        """Accumulate gradients over micro-steps and update once.

        Args:
            batches: this process's micro-steps.
            rate: learning rate of this step.
            number: of the step from 1, for messages.
            before_update: called when all gradients are there and finite.

        Raises:
            CheckError: no token of the step is trained, or loss or gradients are not finite; no update was made.
        """
        self.base.model.train()
        total_weight = self._total_weight(batches, number)
        routing = self.router_loss.prepare(batches)
        sums = []
        for place, batch in enumerate(batches):
            terms = self._micro_step(batch, place, total_weight, routing)
            # Processes average their gradients; each term is already a share of the whole step's, so undo that.
            self.accelerator.backward((terms * self._coefficients).sum() * self.accelerator.num_processes)
            sums.append(terms.detach())
        loss, balance, router_z = self.accelerator.reduce(torch.stack(sums).sum(0), "sum").tolist()
        norm = self.accelerator.clip_grad_norm_(self.parameters.values(), self.config.max_gradient_norm or math.inf)
        figures = StepFigures(
            loss=loss,
            balance=balance,
            router_z=router_z,
            gradient_norm=float(norm),
            tokens=sum(batch.num_tokens for batch in batches),
            trained_tokens=sum(int(batch.weights.count_nonzero()) for batch in batches),
        )
        _refuse_not_finite(figures, batches, number)
        before_update()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return figures

    def _micro_step(self, batch: Batch, place: int, total_weight: float, routing: StepRouting) -> Tensor:
        """A micro-step's shares of the step's language loss, balance loss and z-loss: float32 [3]."""
        model, device = self.base.model, self.base.device
        where, targets, weights = predicted_tokens(batch.input_ids, batch.weights, batch.segments)
        with record_routing(model) as tape, self.offload:
            hidden = hidden_states(model, batch.input_ids, batch.positions, batch.segments)
        loss = language_loss(hidden, model.lm_head.weight, where.to(device), targets.to(device), weights.to(device))
        balance, router_z = self.router_loss.shares(tape.layers, batch, routing, place)
        return torch.stack([loss / total_weight, balance, router_z])

    def _total_weight(self, batches: list[Batch], number: int) -> float:
        local = torch.tensor(sum(batch.weight_sum for batch in batches), dtype=torch.float64, device=self.base.device)
        total = float(self.accelerator.reduce(local, "sum").item())
        if total == 0:
            raise CheckError(
                f"step {number} has no trained token: its loss would be 0 / 0",
                why=f"samples: {_named(batches)}",
                fix="look at the loss weights of the data",
            )
        return total


def _refuse_not_finite(figures: StepFigures, batches: list[Batch], number: int) -> None:
    """Look before the update: through clipping, one NaN gradient would make every parameter NaN."""
    if all(math.isfinite(value) for value in (figures.loss, figures.balance, figures.router_z, figures.gradient_norm)):
        return
    raise CheckError(
        f"step {number} is not finite: loss {figures.loss}, gradient norm {figures.gradient_norm}",
        why=f"no update was made from it; its samples: {_named(batches)}",
        fix="lower trainer.learning_rate, or look at those samples; resume from the last checkpoint",
    )


def _named(batches: list[Batch]) -> str:
    ids = [name for batch in batches for row in batch.sample_ids for name in row]
    return ", ".join(ids[:SAMPLES_NAMED]) + (" ..." if len(ids) > SAMPLES_NAMED else "")
