"""Made-up pairs and steps of a tiny model on them, shared by the preference tests and scripts/trl_preference.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from router_runs import SMALL, new_base, shake
from torch import Tensor

from finetune.adapters.attach import attach_adapter
from finetune.config.schema import PreferenceConfig, TrainerConfig
from finetune.data.groups import Pair
from finetune.data.harmony.render import Example
from finetune.model.forward import checkpoint_activations
from finetune.objectives.preference import Preference
from finetune.train.engines.base import single_engine
from finetune.train.optim import make_optimizer
from finetune.train.step import OptimiserStep, StepStats

LEARNING_RATE = 1e-3
PAIRS_PER_STEP = 4
Group = tuple[list[Example], list[Pair]]


def made_groups(count: int, answers: int = 2, *, prompts: tuple[int, int] = (20, 170), seed: int = 3) -> list[Group]:
    """Records of random tokens; the first answer is better than all others. The tiny base's window is 128 tokens."""
    rng = np.random.default_rng(seed)
    groups: list[Group] = []
    for number in range(count):
        prompt = rng.integers(0, 199_998, int(rng.integers(*prompts)))
        made = []
        for place in range(answers):
            ids = np.concatenate([prompt, rng.integers(0, 199_998, int(rng.integers(2, 12)))]).astype(np.int32)
            weights = np.zeros(len(ids), dtype=np.float32)
            weights[len(prompt) :] = 1
            score = float(place == 0)
            made.append(Example(ids, weights, f"r{number}", f"f:{number}", shared=len(prompt), score=score))
        groups.append((made, [(0, place) for place in range(1, answers)]))
    return groups


class PreferenceRun:
    """A tiny base with an adapter, and optimiser steps of a preference objective.

    Attributes:
        gradients: of the last step, before the update.
    """

    def __init__(
        self, directory: Path, objective: PreferenceConfig, *, shaken: bool = True, checkpointed: bool = False
    ) -> None:
        self.base = new_base(directory)
        self.adapter = attach_adapter(self.base, SMALL, seed=0)
        if shaken:  # so that every factor has a gradient and no reward is 0
            shake(self.adapter.parameters(), 0.02)
        if checkpointed:
            checkpoint_activations(self.base.model)
        config = TrainerConfig(router_balance_coefficient=0, max_grad_norm=0)
        parameters = self.adapter.parameters()
        engine = single_engine(parameters, make_optimizer(parameters, config), config)
        self.step = OptimiserStep(config, self.base, engine, self.adapter, Preference(objective))
        self.gradients: dict[str, Tensor] = {}

    def __call__(self, batches: list) -> StepStats:  # type: ignore[type-arg]
        def keep() -> None:
            parameters = self.adapter.parameters()
            self.gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}

        return self.step(batches, LEARNING_RATE, 1, before_update=keep)


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference of two sets of gradients, relative to the largest gradient."""
    assert one.keys() == other.keys() and one
    largest = max(float(value.abs().max()) for value in other.values())
    return max(float((one[name] - other[name]).abs().max()) for name in one) / largest


def double(value: list[float]) -> Tensor:
    """A float64 tensor."""
    return torch.tensor(value, dtype=torch.float64)
