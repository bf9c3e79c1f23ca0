"""Supervised fine-tuning: the weighted mean negative log-likelihood of the trained tokens.

Shape legend: B sequences, S tokens per sequence, D hidden, V vocabulary, N trained tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from finetune.adapters.lora import Adapter
from finetune.data.batches import Batch
from finetune.kernels.loss_head import token_nll
from finetune.model.forward import shift_labels
from finetune.objectives.base import LOSS, Policy, Ranks, Term


class Sft:
    """Sum of weight x NLL over the step's trained tokens, divided by the sum of their weights; in nats."""

    def weights(self, batch: Batch) -> dict[str, float]:
        """The sum of the batch's loss weights."""
        return {LOSS: batch.weight_sum}

    def prepare(
        self, batches: Sequence[Batch], policy: Policy, adapter: Adapter | None, world: Ranks
    ) -> Sequence[None]:
        """Nothing to prepare."""
        return [None] * len(batches)

    def check_first_step(self, terms: Mapping[str, float]) -> str:
        """Nothing is known of a first step's loss."""
        return ""

    def terms(self, policy: Policy, batch: Batch, totals: Mapping[str, float], context: None) -> dict[str, Term]:
        """The batch's share of the loss."""
        return {LOSS: Term(weighted_nll(policy.hidden_states(batch), policy.head, batch) / totals[LOSS])}


def weighted_nll(hidden: Tensor, head: Tensor, batch: Batch) -> Tensor:
    """Sum of weight x NLL over a batch's trained tokens: not a mean, the step's total weight divides it.

    Args:
        hidden: [B, S, D], final normed hidden states.
        head: [V, D], frozen.
        batch: the tokens and their loss weights.

    Returns:
        A float32 scalar in nats.
    """
    where, targets, weights = (
        part.to(hidden.device) for part in shift_labels(batch.input_ids, batch.weights, batch.segments)
    )
    return (token_nll(hidden.flatten(0, 1)[where], head, targets) * weights).sum()
