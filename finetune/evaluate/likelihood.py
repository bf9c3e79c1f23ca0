"""Held-out loss: mean NLL per trained token, sample by sample, on packed rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GptOssForCausalLM

from finetune import log
from finetune.data.batches import collate
from finetune.data.pack import pack
from finetune.data.render import Sample
from finetune.evaluate.intervals import bootstrap_ratio_interval
from finetune.kernels.loss_head import token_nll
from finetune.model.forward import hidden_states
from finetune.model.predictions import predicted_tokens

BetweenBatches = Callable[[], None]
"""Called between two forward passes; raises to leave early (a signal came)."""


@dataclass(frozen=True, eq=False)
class HeldOutLoss:
    """Losses of samples, in their order.

    Attributes:
        nll: float64 [n], weight x NLL summed over each sample's trained tokens, in nats.
        weight: float64 [n], the sum of those weights.
    """

    nll: NDArray[np.float64]
    weight: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """Nats per trained token over all samples."""
        return float(self.nll.sum() / self.weight.sum())

    def interval(self, confidence: float) -> tuple[float, float] | None:
        """Bootstrap interval of the mean, resampling samples; None of one sample, which says nothing of others."""
        return bootstrap_ratio_interval(self.nll, self.weight, confidence) if len(self.nll) > 1 else None


@dataclass(frozen=True, eq=False)
class PredictedStates:
    """What predicts the trained tokens of some samples.

    Attributes:
        hidden: [N, D], final normed hidden states.
        targets: int64 [N], on hidden's device.
        weights: float64 [N], loss weights.
        sample: int64 [N], number of the sample that each token is of.
    """

    hidden: Tensor
    targets: Tensor
    weights: NDArray[np.float64]
    sample: NDArray[np.int64]


@torch.no_grad()
def predicted_states(
    model: GptOssForCausalLM,
    samples: Sequence[Sample],
    row_tokens: int,
    task: str,
    between_batches: BetweenBatches,
    progress: log.Progress | None = None,
) -> Iterator[PredictedStates]:
    """Run samples in packed rows; row by row what predicts their trained tokens. Arguments as in `held_out_loss`."""
    rows = pack([len(sample.ids) for sample in samples], row_tokens, np.random.default_rng(0))
    with nullcontext(progress) if progress else log.Progress(task, len(samples), "samples") as line:
        for row in rows:
            between_batches()
            batch = collate([[samples[number] for number in row]])
            hidden = hidden_states(model, batch.input_ids, batch.positions, batch.segments)
            where, targets, weights = predicted_tokens(batch.input_ids, batch.weights, batch.segments)
            yield PredictedStates(
                hidden[0, where.to(hidden.device)],
                targets.to(hidden.device),
                weights.double().numpy(),
                np.array(row)[batch.segments[0, where].numpy()],
            )
            line.advance(len(row))


@torch.no_grad()
def held_out_loss(
    model: GptOssForCausalLM,
    samples: Sequence[Sample],
    row_tokens: int,
    *,
    task: str = "held-out loss",
    between_batches: BetweenBatches = lambda: None,
    progress: log.Progress | None = None,
) -> HeldOutLoss:
    """Score samples with the model as it is.

    Args:
        model: in evaluation mode.
        samples: at least one.
        row_tokens: tokens in a packed row, at least the longest sample.
        task: what the progress line says.
        between_batches: see `BetweenBatches`.
        progress: a line to advance by the samples instead of one of its own.
    """
    nll, weight = np.zeros(len(samples)), np.zeros(len(samples))
    for found in predicted_states(model, samples, row_tokens, task, between_batches, progress):
        losses = token_nll(found.hidden, model.lm_head.weight, found.targets)
        np.add.at(nll, found.sample, losses.double().cpu().numpy() * found.weights)
        np.add.at(weight, found.sample, found.weights)
    return HeldOutLoss(nll, weight)
