"""The terms on the router that a step adds to the language loss: balance against a target, and the z-loss.

A balance loss is a product of how often experts are chosen (without gradient) and how probable they are. Once the first
is known for all of a step, the rest is a plain sum over tokens; so the scope `step` takes one forward pass without
gradient over all micro-steps, adds the counts up over processes, and each micro-step's term is then exact, whatever the
accumulation. Both scopes average over the step's tokens, so micro-steps of padding alone count for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from finetune.adapters.lora import Adapter
from finetune.config.schema import TrainerConfig
from finetune.data.batches import PADDING_SEGMENT, Batch
from finetune.evaluate.routing import RoutingCounter
from finetune.model.build import Base
from finetune.model.forward import hidden_states
from finetune.model.router import Routing, record_routing
from finetune.train.losses import balance_sum, balance_weights, choice_counts, z_sum


@dataclass(frozen=True)
class StepRouting:
    """What is known of a step before its first backward pass.

    Attributes:
        tokens: of the whole step without padding, over all processes.
        weights: of each layer's experts [layers, E], for the scope `step`; None where each micro-step has its own.
        base_chosen: the base's choices in each of this process's micro-steps, [layers, E] each; None unless needed.
    """

    tokens: float
    weights: Tensor | None = None
    base_chosen: tuple[Tensor, ...] | None = None


class RouterLoss:
    """Balance and z-loss of a step, micro-step by micro-step; `usage` counts what was chosen in all of them.

    Args:
        config: scope, target and coefficients.
        base: the live model.
        adapter: switched off for the base's own routing; only the target `base` needs it.
        accelerator: adds up over processes.
    """

    def __init__(self, config: TrainerConfig, base: Base, adapter: Adapter | None, accelerator: Accelerator) -> None:
        if config.router_balance_target == "base" and adapter is None:
            raise ValueError("the base's own routing takes an adapter that can be switched off")
        self.config, self.base, self.adapter, self.accelerator = config, base, adapter, accelerator
        shape = base.checkpoint.shape
        self.usage = RoutingCounter(shape.num_layers, shape.num_experts, 1, base.device)

    def prepare(self, batches: Sequence[Batch]) -> StepRouting:
        """Look at a whole step before its first backward pass; call it with the model in training mode.

        Args:
            batches: this process's micro-steps; every process has equally many.
        """
        local = torch.tensor(sum(batch.num_tokens for batch in batches), dtype=torch.float64, device=self.base.device)
        tokens = float(self.accelerator.reduce(local, "sum").item())
        config = self.config
        if not config.router_balance_coefficient:
            return StepRouting(tokens)
        base_chosen = None
        if config.router_balance_target == "base":
            base_chosen = tuple(self._counts(batch, adapted=False) for batch in batches)
        if config.router_balance_scope == "microbatch":
            return StepRouting(tokens, None, base_chosen)
        # The pass draws the same dropout masks as the micro-steps will, so it counts the choices that they will make.
        with torch.random.fork_rng([self.base.device] if self.base.device.type == "cuda" else []):
            chosen = torch.stack([self._counts(batch, adapted=True) for batch in batches]).sum(0)
        total = self.accelerator.reduce(chosen, "sum")
        of_base = None if base_chosen is None else self.accelerator.reduce(torch.stack(base_chosen).sum(0), "sum")
        return StepRouting(tokens, balance_weights(total, of_base))

    def shares(self, layers: Sequence[Routing], batch: Batch, step: StepRouting, number: int) -> tuple[Tensor, Tensor]:
        """A micro-step's shares of the step's balance loss and z-loss; over all micro-steps they add up to them.

        Without a coefficient a share has no gradient: it is computed to be seen.

        Args:
            layers: routing of the micro-step, with gradient.
            batch: the micro-step.
            step: of `prepare`.
            number: of the micro-step within this process's, from 0.
        """
        rows = real_tokens(batch).to(self.base.device)
        self.usage.add(layers, rows)
        weights = step.weights
        if weights is None:
            base_chosen = None if step.base_chosen is None else step.base_chosen[number]
            weights = balance_weights(choice_counts(layers, rows), base_chosen)
        with torch.set_grad_enabled(self.config.router_balance_coefficient != 0):
            balance = balance_sum(layers, rows, weights) / step.tokens
        with torch.set_grad_enabled(self.config.router_z_loss_coefficient != 0):
            return balance, z_sum(layers, rows) / step.tokens

    @torch.no_grad()
    def _counts(self, batch: Batch, *, adapted: bool) -> Tensor:
        switched = nullcontext() if adapted or self.adapter is None else self.adapter.disabled()
        with switched, record_routing(self.base.model) as tape:
            hidden_states(self.base.model, batch.input_ids, batch.positions, batch.segments)
        return choice_counts(tape.layers, real_tokens(batch).to(self.base.device))


def real_tokens(batch: Batch) -> Tensor:
    """Numbers of a batch's flattened tokens that are not padding: int64 [N]."""
    return (batch.segments != PADDING_SEGMENT).reshape(-1).nonzero()[:, 0]
