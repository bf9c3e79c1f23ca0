"""Preference tuning: losses of pairs of answers to one prompt, with the frozen base as the reference.

The reference's log-probabilities come from the same micro-batches in the same layout, with the adapter disabled. So
before the first update rewards are exactly 0 and the loss has a known value, which `check_first_step` holds it to.

Shape legend: N trained tokens of a micro-batch, A answers, P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.adapters.lora import Adapter
from finetune.config.schema import DpoConfig, PreferenceConfig
from finetune.data.batches import Batch
from finetune.data.groups import AnswerTokens, answer_tokens
from finetune.errors import CheckError
from finetune.kernels.loss_head import token_nll
from finetune.objectives.base import LOSS, Policy, Ranks, Term
from finetune.objectives.preference_losses import PairLogps, first_loss, likelihood_factor, pair_losses

CHOSEN_TOKENS = "chosen_tokens"
LARGEST_REWARD = "rewards/largest"
FIRST_LOSS_TOLERANCE = 1e-6  # relative; a float32 sum over a step's pairs


@dataclass(frozen=True, eq=False)
class Reference:
    """Log-probabilities of a micro-batch by the reference: float32 [N], one per trained token."""

    logps: Tensor


class Preference:
    """The mean over a step's pairs of a preference loss, plus the chosen answers' likelihood where a loss has it.

    Args:
        config: kind, losses and factors.
    """

    def __init__(self, config: PreferenceConfig) -> None:
        self.config = config
        self.beta = config.beta
        self.has_reference = isinstance(config, DpoConfig) and config.reference != "none"

    def weights(self, batch: Batch) -> dict[str, float]:
        """Pairs, and trained tokens of their chosen answers; an answer of several pairs counts in each."""
        tokens = answer_tokens(batch)
        counts = torch.bincount(tokens.answer, minlength=tokens.num_answers)
        return {LOSS: len(tokens.better), CHOSEN_TOKENS: float(counts[tokens.better].sum())}

    @torch.no_grad()
    def prepare(
        self, batches: Sequence[Batch], policy: Policy, adapter: Adapter | None, world: Ranks
    ) -> Sequence[Reference | None]:
        """Compute the reference's log-probabilities of every micro-batch."""
        if not self.has_reference:
            return [None] * len(batches)
        if adapter is None:
            raise ValueError("the reference is the model without its adapter, and there is none to disable")
        with adapter.disabled():
            return [Reference(_logps(policy, batch, answer_tokens(batch))) for batch in batches]

    def terms(
        self, policy: Policy, batch: Batch, totals: Mapping[str, float], context: Reference | None
    ) -> dict[str, Term]:
        """The batch's share of the loss, and figures of its pairs to log."""
        tokens = answer_tokens(batch)
        logps = _logps(policy, batch, tokens)
        reference = torch.zeros_like(logps) if context is None else context.logps
        device = logps.device
        answer, better, worse = (part.to(device) for part in (tokens.answer, tokens.better, tokens.worse))
        counts = torch.bincount(answer, minlength=tokens.num_answers).to(logps.dtype)

        def of_answers(values: Tensor) -> Tensor:
            return values.new_zeros(tokens.num_answers).index_add(0, answer, values)

        sums, reference_sums = of_answers(logps), of_answers(reference)
        pairs = PairLogps(
            sums[better], sums[worse], reference_sums[better], reference_sums[worse], counts[better], counts[worse]
        )
        loss = pair_losses(pairs, self.config).sum() / totals[LOSS]
        nll = -pairs.chosen.sum() / totals[CHOSEN_TOKENS]
        factor = likelihood_factor(self.config)
        terms = {LOSS: Term(loss + factor * nll if factor else loss)}
        with torch.no_grad():
            on_last = of_answers(torch.where(tokens.is_last.to(device), logps - reference, torch.zeros_like(logps)))
            logged = self._figures(pairs, on_last[better] - on_last[worse])
            terms |= {name: Term(value.sum() / totals[LOSS]) for name, value in logged.items()}
            terms["nll/chosen"] = Term(nll.detach())
            largest = torch.stack([pairs.gain_chosen.abs(), pairs.gain_rejected.abs()]) * self.beta
            terms[LARGEST_REWARD] = Term(largest.max() if largest.numel() else loss.new_zeros(()), "max")
        return terms

    def _figures(self, pairs: PairLogps, on_last: Tensor) -> dict[str, Tensor]:
        """Figures of each pair, [P] each, whose means over the step are logged."""
        chosen, rejected = self.beta * pairs.gain_chosen, self.beta * pairs.gain_rejected
        return {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
            "rewards/margins_on_end_tokens": self.beta * on_last,
            "logps/chosen": pairs.chosen,
            "logps/rejected": pairs.rejected,
            "length_margin": pairs.chosen_tokens - pairs.rejected_tokens,
        }

    def check_first_step(self, terms: Mapping[str, float]) -> str:
        """Check that rewards are 0 and the loss has its value while model and reference are the same.

        Raises:
            CheckError: they are not: the reference is not the model that training starts from.
        """
        kind = self.config.kind
        if not self.has_reference:
            return f"first step: {kind} has no reference here, so neither rewards nor loss have a value to check"
        wanted = first_loss(self.config)
        found = f"largest reward {terms[LARGEST_REWARD]:g}, loss {terms[LOSS]:.6f}"
        if terms[LARGEST_REWARD] != 0 or (
            wanted is not None and abs(terms[LOSS] - wanted) > FIRST_LOSS_TOLERANCE * wanted
        ):
            raise CheckError(
                f"the first step is not where {kind} starts: {found}",
                why="model and reference are the same before the first update, so all rewards are 0"
                + (f" and the loss is {wanted:.6f}" if wanted is not None else ""),
                fix="please report this with the run's config.yaml; what it would train is not what was asked for",
            )
        expected = "" if wanted is None else f" (expected {wanted:.6f})"
        return f"first step: rewards exactly 0, loss {terms[LOSS]:.6f}{expected}"


def _logps(policy: Policy, batch: Batch, tokens: AnswerTokens) -> Tensor:
    """Log-probabilities of the trained tokens of a batch's answers, float32 [N]."""
    hidden = policy.hidden_states(batch).flatten(0, 1)
    return -token_nll(hidden[tokens.before.to(hidden.device)], policy.head, tokens.targets.to(hidden.device))
