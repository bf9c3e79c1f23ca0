"""Losses of pairs of answers, as functions of log-probabilities: sums over tokens, or means.

Everything is float32 (float64 for float64 inputs) [P], one value per pair. Sources are named in
`finetune/config/schema_objective.py`; tests/objectives/test_preference_losses.py has each once more, as a formula.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.config.schema import CpoConfig, DpoConfig, OrpoConfig, PreferenceConfig, SimpoConfig
from finetune.config.schema_objective import DpoLoss


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of the answers of P pairs, and what the reference gives them.

    Attributes:
        chosen, rejected: [P], sums over the answers' tokens.
        reference_chosen, reference_rejected: [P], likewise of the reference, without gradient; 0 without a reference.
        chosen_tokens, rejected_tokens: [P], numbers of those tokens.
    """

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def gain_chosen(self) -> Tensor:
        """[P], what the chosen answers gained over the reference."""
        return self.chosen - self.reference_chosen

    @property
    def gain_rejected(self) -> Tensor:
        """[P], what the rejected answers gained over the reference."""
        return self.rejected - self.reference_rejected


def pair_losses(pairs: PairLogps, config: PreferenceConfig) -> Tensor:
    """The preference loss of each pair, without likelihood terms: [P].

    Args:
        pairs: their log-probabilities.
        config: kind, losses and factors.
    """
    match config:
        case DpoConfig():
            parts = [factor * _dpo(pairs, name, config) for name, factor in config.losses.items() if name != "sft"]
            return torch.stack(parts).sum(0) if parts else torch.zeros_like(pairs.chosen)
        case OrpoConfig():
            chosen, rejected = _means(pairs)
            # log(p / (1 - p)) of the mean probability of a token; expm1 keeps 1 - p exact where p is near 1.
            odds = (chosen - rejected) - (_log_one_minus_exp(chosen) - _log_one_minus_exp(rejected))
            return -config.beta * F.logsigmoid(odds)
        case SimpoConfig():
            chosen, rejected = _means(pairs)
            return -F.logsigmoid(config.beta * (chosen - rejected) - config.gamma)
        case CpoConfig():
            return _smoothed(config.beta * (pairs.chosen - pairs.rejected), config.label_smoothing)


def likelihood_factor(config: PreferenceConfig) -> float:
    """The factor of the chosen answers' mean negative log-likelihood per token in the loss."""
    match config:
        case DpoConfig():
            return config.losses.get("sft", 0.0)
        case OrpoConfig():
            return 1.0
        case CpoConfig():
            return config.alpha
        case SimpoConfig():
            return 0.0


def first_loss(config: PreferenceConfig) -> float | None:
    """The loss of every pair while model and reference are the same; None if it depends on the data."""
    if not isinstance(config, DpoConfig) or config.reference == "none" or "sft" in config.losses:
        return None
    values = {"sigmoid": math.log(2), "hinge": 1.0, "ipo": 1 / (4 * config.beta**2), "robust": math.log(2)}
    values |= {"apo_zero": 1.0, "apo_down": 1.0, "sigmoid_norm": math.log(2)}
    return sum(factor * values[name] for name, factor in config.losses.items())


def _dpo(pairs: PairLogps, name: DpoLoss, config: DpoConfig) -> Tensor:
    beta, smoothing = config.beta, config.label_smoothing
    chosen, rejected = pairs.gain_chosen, pairs.gain_rejected
    margin = beta * (chosen - rejected)
    match name:
        case "sigmoid":
            return _smoothed(margin, smoothing)
        case "robust":
            wanted, swapped = F.logsigmoid(margin), F.logsigmoid(-margin)
            return (-(1 - smoothing) * wanted + smoothing * swapped) / (1 - 2 * smoothing)
        case "hinge":
            return (1 - margin).relu()
        case "ipo":
            per_token = chosen / pairs.chosen_tokens - rejected / pairs.rejected_tokens
            return (per_token - 1 / (2 * beta)).square()
        case "apo_zero":
            return (1 - (beta * chosen).sigmoid()) + (beta * rejected).sigmoid()
        case "apo_down":
            return (beta * chosen).sigmoid() + (1 - margin.sigmoid())
        case "sigmoid_norm":
            return _smoothed(beta * (chosen / pairs.chosen_tokens - rejected / pairs.rejected_tokens), smoothing)
        case "sft":
            raise ValueError("`sft` is a likelihood term, see likelihood_factor")


def _smoothed(margin: Tensor, smoothing: float) -> Tensor:
    """-log sigma(margin), or its mean over the two orders where a share of the pairs is taken to be swapped."""
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def _means(pairs: PairLogps) -> tuple[Tensor, Tensor]:
    return pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens


def _log_one_minus_exp(value: Tensor) -> Tensor:
    """log(1 - exp(value)) for values below 0."""
    return (-torch.expm1(value)).log()
