"""The protocol of training objectives: what one optimiser step minimises.

A step is several micro-batches on several ranks. An objective first declares the denominators of its terms, which are
summed over the whole step; each micro-batch then contributes its share of every term, and the shares add up. So a step
has the same loss and gradient however its sequences are split over micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor
from transformers import GptOssForCausalLM

from finetune.adapters.lora import Adapter
from finetune.config.schema import CpoConfig, DpoConfig, ObjectiveConfig, OrpoConfig, SftConfig, SimpoConfig
from finetune.data.batches import Batch
from finetune.model.forward import hidden_states

LOSS = "loss"
"""Name of the term that is minimised; all other terms of an objective are logged only."""


@dataclass(frozen=True)
class Term:
    """A named number of a step, as far as one micro-batch contributes to it.

    Attributes:
        value: float32 scalar on the model's device; a share of the whole step's value where it is summed. Only `loss`
            needs a gradient.
        reduce: how micro-batches and ranks are combined.
    """

    value: Tensor
    reduce: Literal["sum", "max"] = "sum"


@dataclass(frozen=True)
class Policy:
    """The model in training, as objectives see it.

    Attributes:
        model: the frozen base with the adapter attached.
        offload: context of the forward pass, which may store activation checkpoints on the host.
    """

    model: GptOssForCausalLM
    offload: AbstractContextManager[object] = field(default_factory=nullcontext)

    @property
    def head(self) -> Tensor:
        """The output embedding [V, D], frozen."""
        head: Tensor = self.model.lm_head.weight
        return head

    def hidden_states(self, batch: Batch) -> Tensor:
        """Final normed hidden states [B, S, D] of a batch, in the compute dtype, on the model's device."""
        with self.offload:
            return hidden_states(self.model, batch.input_ids, batch.positions, batch.segments, batch.prefixes)


class Ranks(Protocol):
    """The ranks of a run, as far as an objective's `prepare` may use them (`finetune.train.world.World`)."""

    def all_reduce_sum(self, *values: float) -> list[float]:
        """The sum over ranks of each value, in float64. Every rank calls it."""


class Objective(Protocol):
    """The loss of an optimiser step.

    `weights` and `prepare` are called for every step before its first backward pass, `terms` for every micro-batch.
    """

    def weights(self, batch: Batch) -> dict[str, float]:
        """A micro-batch's part of each denominator, such as its trained tokens or pairs; `loss` among them.

        The names are the same for every batch, padding included; the step's sums are the `totals` of `terms`.
        """

    def prepare(self, batches: Sequence[Batch], policy: Policy, adapter: Adapter | None, world: Ranks) -> Sequence[Any]:
        """Compute what `terms` needs beside the batch, such as reference log-probabilities.

        Args:
            batches: this rank's micro-batches of the step; every rank has equally many.
            policy: the model in training.
            adapter: `adapter.disabled()` gives the base, the reference model. None in a step outside of a run.
            world: for sums over ranks; if one rank calls it, all must.

        Returns:
            One context per micro-batch, passed to `terms`.
        """

    def check_first_step(self, terms: Mapping[str, float]) -> str:
        """Check the values that a first step must have because the adapter changes nothing yet.

        Args:
            terms: of the whole first step.

        Returns:
            One line on what was checked, or why nothing is; empty for objectives without a reference by nature.

        Raises:
            CheckError: a value is another.
        """

    def terms(self, policy: Policy, batch: Batch, totals: Mapping[str, float], context: Any) -> dict[str, Term]:
        """A micro-batch's shares of the step's terms: `loss` first, then numbers to log.

        It calls `policy.hidden_states(batch)` exactly once: the router's terms are computed from that forward pass.
        The names are the same for every batch; they go to metrics.jsonl and the tracker as they are.

        Args:
            policy: the model in training.
            batch: the micro-batch.
            totals: sums of `weights` over all micro-batches and ranks of the step.
            context: this micro-batch's, of `prepare`.
        """


def make_objective(config: ObjectiveConfig) -> Objective:
    """Make the objective that a recipe names."""
    match config:
        case SftConfig():
            from finetune.objectives.sft import Sft

            return Sft()
        case DpoConfig() | OrpoConfig() | SimpoConfig() | CpoConfig():
            from finetune.objectives.preference import Preference

            return Preference(config)
