"""Spikes of the loss are detected, ordinary curves have none, and resuming changes nothing."""

from __future__ import annotations

import math
import random

import pytest

from finetune.train.metrics import FEWEST, LossSpikes


def falling(count: int, noise: float, seed: int = 0) -> list[float]:
    generator = random.Random(seed)
    return [1 + 2 * math.exp(-step / 100) + generator.gauss(0, noise) for step in range(count)]


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.2])
def test_a_noisy_falling_curve_has_no_spike(noise: float) -> None:
    spikes = LossSpikes([])
    assert [loss for loss in falling(2000, noise) if spikes.usual_if_spike(loss) is not None] == []


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.2])
def test_consecutive_jumps_are_all_detected(noise: float) -> None:
    losses = falling(300, noise)
    losses[200] += 3
    losses[210] += 3
    spikes = LossSpikes([])
    found = [step for step, loss in enumerate(losses) if spikes.usual_if_spike(loss) is not None]
    assert found == [200, 210]


def test_no_spike_before_there_is_a_history() -> None:
    spikes = LossSpikes([])
    found = [spikes.usual_if_spike(loss) for loss in [1.0] * (FEWEST - 1) + [100.0]]
    assert found == [None] * FEWEST
    spikes = LossSpikes([1.0] * FEWEST)
    assert spikes.usual_if_spike(100.0) == 1.0


def test_resuming_detects_the_same_spikes() -> None:
    losses = falling(300, 0.1)
    losses[150] += 3
    whole, first = LossSpikes([]), LossSpikes([])
    expected = [whole.usual_if_spike(loss) for loss in losses]
    found = [first.usual_if_spike(loss) for loss in losses[:149]]
    again = LossSpikes(losses[:149])
    found += [again.usual_if_spike(loss) for loss in losses[149:]]
    assert found == expected and expected[150] is not None
