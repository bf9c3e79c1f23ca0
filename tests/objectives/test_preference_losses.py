"""Every preference loss against its formula in float64, and its value while model and reference are the same."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from preference_runs import double

from finetune.config.schema import CpoConfig, DpoConfig, OrpoConfig, PreferenceConfig, SimpoConfig
from finetune.objectives.preference_losses import PairLogps, first_loss, likelihood_factor, pair_losses

CHOSEN, REJECTED = -7.25, -9.5
REFERENCE_CHOSEN, REFERENCE_REJECTED = -8.0, -8.75
CHOSEN_TOKENS, REJECTED_TOKENS = 5, 3
BETA, SMOOTHING = 0.3, 0.2


def sigma(value: float) -> float:
    return 1 / (1 + math.exp(-value))


CHOSEN_REWARD, REJECTED_REWARD = BETA * (CHOSEN - REFERENCE_CHOSEN), BETA * (REJECTED - REFERENCE_REJECTED)
MARGIN = CHOSEN_REWARD - REJECTED_REWARD
PER_TOKEN = (CHOSEN - REFERENCE_CHOSEN) / CHOSEN_TOKENS - (REJECTED - REFERENCE_REJECTED) / REJECTED_TOKENS
PC, PR = math.exp(CHOSEN / CHOSEN_TOKENS), math.exp(REJECTED / REJECTED_TOKENS)
FORMULAS: list[tuple[PreferenceConfig, Callable[[], float]]] = [
    (DpoConfig(beta=BETA), lambda: -math.log(sigma(MARGIN))),
    (
        DpoConfig(beta=BETA, label_smoothing=SMOOTHING),
        lambda: -(1 - SMOOTHING) * math.log(sigma(MARGIN)) - SMOOTHING * math.log(sigma(-MARGIN)),
    ),
    (DpoConfig(loss="hinge", beta=BETA), lambda: max(0.0, 1 - MARGIN)),
    (DpoConfig(loss="ipo", beta=BETA), lambda: (PER_TOKEN - 1 / (2 * BETA)) ** 2),
    (
        DpoConfig(loss="robust", beta=BETA, label_smoothing=SMOOTHING),
        lambda: (
            (-(1 - SMOOTHING) * math.log(sigma(MARGIN)) + SMOOTHING * math.log(sigma(-MARGIN))) / (1 - 2 * SMOOTHING)
        ),
    ),
    (DpoConfig(loss="apo_zero", beta=BETA), lambda: 1 - sigma(CHOSEN_REWARD) + sigma(REJECTED_REWARD)),
    (DpoConfig(loss="apo_down", beta=BETA), lambda: sigma(CHOSEN_REWARD) + 1 - sigma(MARGIN)),
    (DpoConfig(loss="sigmoid_norm", beta=BETA), lambda: -math.log(sigma(BETA * PER_TOKEN))),
    (
        DpoConfig(loss_weight=0.5, add={"hinge": 2.0, "sft": 1.0}, beta=BETA),
        lambda: -0.5 * math.log(sigma(MARGIN)) + 2 * max(0.0, 1 - MARGIN),
    ),
    (OrpoConfig(beta=BETA), lambda: -BETA * math.log(sigma(math.log(PC / (1 - PC)) - math.log(PR / (1 - PR))))),
    (
        SimpoConfig(beta=2.0, gamma=0.7),
        lambda: -math.log(sigma(2 * (CHOSEN / CHOSEN_TOKENS - REJECTED / REJECTED_TOKENS) - 0.7)),
    ),
    (CpoConfig(beta=BETA), lambda: -math.log(sigma(BETA * (CHOSEN - REJECTED)))),
]


def pair(shift: float = 0.0, *, equal: bool = False) -> PairLogps:
    """One pair; `equal`: the reference gives what the model gives."""
    reference = (CHOSEN, REJECTED) if equal else (REFERENCE_CHOSEN, REFERENCE_REJECTED)
    values = (CHOSEN + shift, REJECTED, *reference, CHOSEN_TOKENS, REJECTED_TOKENS)
    return PairLogps(*(double([value]) for value in values))


@pytest.mark.parametrize(("config", "formula"), FORMULAS)
def test_a_loss_is_its_formula(config: PreferenceConfig, formula: Callable[[], float]) -> None:
    assert pair_losses(pair(), config).item() == pytest.approx(formula(), rel=1e-12)
    assert pair_losses(pair(0.01), config).item() != pytest.approx(formula(), rel=1e-6), "another pair, another loss"


@pytest.mark.parametrize("config", [config for config, _ in FORMULAS if isinstance(config, DpoConfig)])
def test_the_first_loss_is_known(config: DpoConfig) -> None:
    found, wanted = pair_losses(pair(equal=True), config).item(), first_loss(config)
    if "sft" in config.losses:
        assert wanted is None and likelihood_factor(config) == 1
    else:
        assert wanted == pytest.approx(found, rel=1e-12)
        assert pair_losses(pair(), config).item() != pytest.approx(found, rel=1e-3)


def test_losses_without_a_reference_have_no_known_first_value() -> None:
    assert all(first_loss(config) is None for config in (OrpoConfig(), SimpoConfig(), CpoConfig()))
    assert first_loss(DpoConfig(reference="none")) is None
    assert [likelihood_factor(config) for config in (OrpoConfig(), SimpoConfig(), CpoConfig(alpha=0.5))] == [1, 0, 0.5]


def test_odds_of_nearly_certain_answers_are_finite() -> None:
    """Mean probabilities of 1 - 1e-6, where 1 - p in float32 has one digit left."""
    values = torch.tensor([[-1e-6], [-2e-6], [0.0], [0.0], [1.0], [1.0]])
    found = pair_losses(PairLogps(*values), OrpoConfig(beta=1.0)).item()
    assert found == pytest.approx(-math.log(sigma(math.log(2))), rel=1e-3)
