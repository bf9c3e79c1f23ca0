"""Before against after: the same test rows scored by the base and by base + adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from finetune import log
from finetune.config.schema import RunConfig
from finetune.data.harmony.render import Example
from finetune.errors import CheckError
from finetune.evaluate.evalset import EvalSet
from finetune.evaluate.labels import score_labels
from finetune.evaluate.likelihood import BetweenBatches, held_out_loss
from finetune.evaluate.statistics import bootstrap_ratio_interval
from finetune.model.build import Base


def evaluate_test_set(
    base: Base, test: EvalSet, config: RunConfig, *, when: str, between_batches: BetweenBatches
) -> dict[str, Any]:
    """Score the test rows with the model as it is now.

    Returns:
        Plain figures for evaluation.json: rows, loss with interval (None with one row), and accuracy with interval if
        labels are scored.

    Raises:
        CheckError: a loss or a label's score is not finite.
    """
    base.model.eval()
    confidence = config.evaluate.confidence
    loss = held_out_loss(
        base.model, test.samples, config.data.max_length, task=f"test loss {when}", between_batches=between_batches
    )
    bad = next((row for row, value in enumerate(loss.nll) if not math.isfinite(value)), None)
    if bad is not None:
        raise CheckError(
            f"the test loss {when} training is {loss.nll[bad]} on {test.records[bad].where}",
            why="the model's numbers left the range of its dtype",
            fix="lower trainer.learning_rate" if when == "after" else "check the base and the test rows",
        )
    figures: dict[str, Any] = {
        "rows": len(test.samples),
        "loss": loss.mean,
        "loss_interval": bootstrap_ratio_interval(test.by_record(loss.nll), test.by_record(loss.weight), confidence),
        "confidence": confidence,
    }
    if test.labels is not None:
        records = [test.records[row] for row in test.first_examples]
        scores = score_labels(
            base.model, records, test.labels, config.data, task=f"labels {when}", between_batches=between_batches
        )
        figures |= {
            "accuracy": scores.accuracy,
            "accuracy_interval": scores.interval(confidence),
            "num_labels": len(test.labels),
            "best_constant_accuracy": scores.best_constant,
        }
    log.info(f"{when}: {describe_figures(figures)}")
    return figures


def describe_figures(figures: dict[str, Any]) -> str:
    """Figures as one line: loss and accuracy with their intervals."""
    ends = figures["loss_interval"]
    text = f"test loss {figures['loss']:.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "")
    if "accuracy" in figures:
        low, high = figures["accuracy_interval"]
        text += f", accuracy {figures['accuracy']:.3f} [{low:.3f}, {high:.3f}] over {figures['num_labels']} labels"
    return f"{text} on {figures['rows']} rows" if ends else f"{text} on one row, which gives no interval"


def validation_subset(samples: Sequence[Example], count: int | None) -> tuple[Example, ...]:
    """The validation samples used each time: evenly spread over the split, so that they do not depend on a seed."""
    if count is None or count >= len(samples):
        return tuple(samples)
    return tuple(samples[number * len(samples) // count] for number in range(count))
