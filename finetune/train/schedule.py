"""The learning rate as a function of the step: no state to save or to lose."""

from __future__ import annotations

import math

from finetune.config.schema import TrainerConfig


def warmup_steps(total_steps: int, config: TrainerConfig) -> int:
    """Steps spent rising to the peak, at least one when there is a warm-up at all."""
    return math.ceil(config.warmup_ratio * total_steps)


def learning_rate(step: int, total_steps: int, config: TrainerConfig) -> float:
    """The rate of optimiser step `step` (from 0) out of `total_steps`.

    The warm-up starts at peak / warm-up steps, not at zero: step 0 already moves the adapter, so the audit of A on
    step 1 means something. After it the rate falls to `min_lr_ratio` of the peak at the last step.
    """
    peak, rising = config.learning_rate, warmup_steps(total_steps, config)
    if step < rising:
        return peak * (step + 1) / rising
    final = peak * config.min_lr_ratio
    progress = (step - rising) / max(1, total_steps - 1 - rising)
    match config.schedule:
        case "constant":
            return peak
        case "linear":
            return peak + (final - peak) * progress
        case "cosine":
            return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2
