"""How far two float32 results may lie apart in a test: never a number, always what rounding explains.

An absolute limit holds on the machine on which it was chosen. Rounding depends on the scale of the numbers, on how many
are added and on what the model does to them, and the order of sums on the processor. Two sources are told apart:

The model. `finetune.model.noise.rounding_noise` perturbs what every matrix product of a model reads and gives what
comes of it, in whatever a test compares: logits, nats of an answer, a gradient, the adapter after some updates. Both
computations compared must be within it of each other.

The sum at the end. A perturbed model does not show that a loss is itself a float32 sum. Of n numbers x, added in any
order, the partial sums are at most S = sum |x|, each addition is off by up to eps / 2 of its partial sum, the signs of
n such errors are as good as random, and two computations differ by the errors of both: about eps sqrt(n) S, which
`sum_noise` gives. (The bound that always holds is eps n S; torch adds in blocks and is far below either.) A mean is a
sum divided by n: with S = its size it is the same.

A gradient passes two such sums backward, which a perturbed forward pass does not show either: over the vocabulary,
where it leaves the head (sum over v of (p_v - 1[v is the target]) W_v), and over tokens, in the gradient of each
factor. Their terms have signs as good as random, so partial sums and the result are of one size, and the result is off
by eps sqrt(n) of itself: `gradient_sum_noise`. Under MKL's SSE2 branch, which adds one after another, the equality of
whole steps was off by ten times of what AVX-512 gives, and this part is what covers it.

Both are noise, not faults: each test that uses them also shows a fault that is far beyond.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from finetune.adapters.lora import Adapter
from finetune.data.batches import Batch
from finetune.model.build import Base
from finetune.model.noise import rounding_noise
from finetune.train.step import StepStats

EPS = torch.finfo(torch.float32).eps
Gradients = dict[str, Tensor]


def sum_noise(size: float, terms: int) -> float:
    """Of a float32 sum of `terms` numbers whose absolute values sum to `size`."""
    return EPS * math.sqrt(terms) * abs(size)


def gradient_sum_noise(model: nn.Module, tokens: int) -> float:
    """Of a gradient's element, as a share of it, from the sums over vocabulary and tokens."""
    return sum_noise(1, len(model.lm_head.weight)) + sum_noise(1, tokens)


def apart(computed: Tensor, reference: Tensor) -> float:
    """Largest absolute difference of any two elements, in float64."""
    return (computed.double() - reference.double()).abs().max().item()


def relatively_apart(computed: Tensor, reference: Tensor) -> float:
    """The same, as a share of the reference's largest element."""
    return apart(computed, reference) / reference.abs().max().item()


def nats_noise(model: nn.Module, compute: Callable[[], NDArray[np.float64]], tokens: int) -> float:
    """Of log-likelihoods that are sums over at most `tokens` tokens, float32 within each."""
    scores = compute()
    noise = rounding_noise(model, lambda: torch.from_numpy(compute()), apart, reference=torch.from_numpy(scores))
    return noise + sum_noise(float(np.abs(scores).max()), tokens)


def log_probability_noise(model: nn.Module, logits: Callable[[], Tensor]) -> float:
    """Of the log-probabilities of float32 logits, normalised in float64."""
    with torch.no_grad():
        return rounding_noise(model, lambda: logits().double().log_softmax(-1), apart)


class Steps(Protocol):
    """One optimiser step of an adapter on a tiny base, which keeps its gradients."""

    base: Base
    adapter: Adapter
    gradients: Gradients

    def __call__(self, batches: list[Batch]) -> StepStats: ...


@dataclass(frozen=True)
class StepNoise:
    """What rounding explains of an optimiser step.

    Attributes:
        terms: by name, of each of its figures (`loss`, the router's losses).
        gradients: of any element of an adapter's gradients, as a share of its tensor's largest element.
        mean: of the mean over a tensor, as the same share: a drift to one side.
    """

    terms: dict[str, float]
    gradients: float
    mean: float

    @property
    def loss(self) -> float:
        """Of the objective's loss."""
        return self.terms["loss"]


def step_with_noise(run: Steps, batches: list[Batch]) -> tuple[StepStats, StepNoise]:
    """Make the step; then make it again with noise. `run.gradients` are those of the step itself.

    Activations must not be checkpointed: what is computed again would get other noise.
    """
    parameters = run.adapter.parameters()
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    results: list[tuple[StepStats, Gradients]] = []

    def compute() -> Tensor:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(start[name])
        results.append((run(batches), run.gradients))
        return torch.tensor(results[-1][0].loss)

    rounding_noise(run.base.model, compute)
    (stats, gradients), *noisy = results
    run.gradients = gradients
    terms = {
        name: max(abs(other.terms[name] - value) for other, _ in noisy) + sum_noise(value, stats.tokens)
        for name, value in stats.terms.items()
    }
    sums = gradient_sum_noise(run.base.model, stats.tokens)
    elements = min(gradient.numel() for gradient in gradients.values())  # a mean of independent errors is smaller
    return stats, StepNoise(
        terms,
        max(largest_share(other, gradients) for _, other in noisy) + sums,
        max(largest_drift(other, gradients) for _, other in noisy) + sums / math.sqrt(elements),
    )


def largest_share(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Largest difference of two sets of gradients, as a share of each tensor's largest element."""
    assert one.keys() == other.keys() and one
    return max(float((one[name] - other[name]).abs().max() / (other[name].abs().max() + 1e-12)) for name in one)


def largest_drift(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Largest mean difference, as the same share."""
    assert one.keys() == other.keys() and one
    return max(float((one[n] - other[n]).mean().abs() / (other[n].abs().max() + 1e-12)) for n in one)
