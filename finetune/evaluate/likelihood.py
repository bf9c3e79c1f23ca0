"""Log-likelihoods: held-out loss of examples, and of answers after prompts, many in one packed sequence.

Answers are scored in groups: a prompt and, side by side, all answers to it, each seeing the prompt and itself only
(`plan_attention`'s prefixes). Label scoring and the evaluation harness both use groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GptOssForCausalLM

from finetune import log
from finetune.data.batches import collate
from finetune.data.harmony.render import Example
from finetune.data.packing import pack
from finetune.kernels.loss_head import answer_scores, token_nll
from finetune.model.forward import hidden_states, shift_labels

BetweenBatches = Callable[[], None]
"""Called between two forward passes; raises to stop early, such as after a signal."""

# Held-out loss


@dataclass(frozen=True, eq=False)
class HeldOutLoss:
    """Losses of examples, in their order.

    Attributes:
        nll: float64 [n], weight x NLL summed over each example's trained tokens, in nats.
        weight: float64 [n], the sum of those weights.
    """

    nll: NDArray[np.float64]
    weight: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """Nats per trained token over all examples."""
        return float(self.nll.sum() / self.weight.sum())


@dataclass(frozen=True, eq=False)
class PredictedStates:
    """The hidden states that predict the trained tokens of some examples.

    Attributes:
        hidden: [N, D], final normed hidden states.
        targets: int64 [N], on hidden's device.
        weights: float64 [N], loss weights.
        example: int64 [N], number of the example that each token belongs to.
    """

    hidden: Tensor
    targets: Tensor
    weights: NDArray[np.float64]
    example: NDArray[np.int64]


@torch.no_grad()
def predicted_states(
    model: GptOssForCausalLM,
    examples: Sequence[Example],
    row_tokens: int,
    task: str,
    between_batches: BetweenBatches,
    progress: log.Progress | None = None,
) -> Iterator[PredictedStates]:
    """Run examples in packed sequences and yield the predicting states. Arguments as in `held_out_loss`."""
    sequences = pack([len(example.ids) for example in examples], row_tokens, np.random.default_rng(0))
    with nullcontext(progress) if progress else log.Progress(task, len(examples), "examples") as line:
        for sequence in sequences:
            between_batches()
            batch = collate([[examples[number] for number in sequence]])
            hidden = hidden_states(model, batch.input_ids, batch.positions, batch.segments)
            where, targets, weights = shift_labels(batch.input_ids, batch.weights, batch.segments)
            yield PredictedStates(
                hidden[0, where.to(hidden.device)],
                targets.to(hidden.device),
                weights.double().numpy(),
                np.array(sequence)[batch.segments[0, where].numpy()],
            )
            line.advance(len(sequence))


@torch.no_grad()
def held_out_loss(
    model: GptOssForCausalLM,
    examples: Sequence[Example],
    row_tokens: int,
    *,
    task: str = "held-out loss",
    between_batches: BetweenBatches = lambda: None,
    progress: log.Progress | None = None,
) -> HeldOutLoss:
    """Score examples with the model as it is.

    Args:
        model: in evaluation mode.
        examples: at least one.
        row_tokens: tokens in a packed sequence, at least the longest example.
        task: title of the progress line.
        between_batches: see `BetweenBatches`.
        progress: a line to advance by the examples instead of one of its own.
    """
    nll, weight = np.zeros(len(examples)), np.zeros(len(examples))
    for found in predicted_states(model, examples, row_tokens, task, between_batches, progress):
        losses = token_nll(found.hidden, model.lm_head.weight, found.targets)
        np.add.at(nll, found.example, losses.double().cpu().numpy() * found.weights)
        np.add.at(weight, found.example, found.weights)
    return HeldOutLoss(nll, weight)


# Answers after prompts


@dataclass(frozen=True)
class Group:
    """A prompt and the answers that may follow it.

    Attributes:
        prompt: token ids, more than `num_scored`.
        answers: token ids of each, at least one.
        num_scored: tokens at the prompt's end that all answers begin with: they count in each answer's likelihood.

    Raises:
        ValueError: nothing is left of the prompt to predict the first scored token from.
    """

    prompt: Sequence[int]
    answers: Sequence[Sequence[int]]
    num_scored: int = 0

    def __post_init__(self) -> None:
        if len(self.prompt) <= self.num_scored:
            raise ValueError(
                f"a prompt of {len(self.prompt)} tokens, {self.num_scored} of them scored, predicts nothing"
            )


@dataclass(frozen=True, eq=False)
class GroupScores:
    """Scores of a group's answers.

    Attributes:
        log_likelihood: float64 [answers], nats of all of an answer's tokens, including the shared ones.
        is_greedy: bool [answers], each of its tokens is the likeliest at its place.
        shared: nats of the `num_scored` tokens alone; 0 if there are none.
    """

    log_likelihood: NDArray[np.float64]
    is_greedy: NDArray[np.bool_]
    shared: float


@torch.no_grad()
def score_groups(model: GptOssForCausalLM, groups: Sequence[Group]) -> list[GroupScores]:
    """Score groups, all in one sequence of tokens.

    Args:
        model: in evaluation mode.
        groups: together they are as long as the sequence.
    """
    sequence = _Sequence()
    spans = [sequence.add(group) for group in groups]
    columns = (sequence.ids, sequence.positions, sequence.segments, sequence.prefixes)
    hidden = hidden_states(model, *(torch.tensor([values]) for values in columns))[0]
    # All answers' first tokens are predicted by the same hidden state: its 201,088 logits are needed once.
    needed, rows = torch.tensor(sequence.predictors, device=hidden.device).unique(return_inverse=True)
    targets = torch.tensor(sequence.targets, device=hidden.device)
    likelihood, likeliest = answer_scores(hidden[needed], model.lm_head.weight, rows, targets)
    nats, greedy = likelihood.double().cpu().numpy(), likeliest.cpu().numpy()
    return [
        GroupScores(
            np.array([nats[shared].sum() + nats[own].sum() for own in answers]),
            np.array([bool(greedy[shared].all() and greedy[own].all()) for own in answers]),
            float(nats[shared].sum()),
        )
        for shared, answers in spans
    ]


@dataclass
class _Sequence:
    """Tokens of groups side by side, and which hidden state predicts which scored token."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    prefixes: list[int] = field(default_factory=list)
    predictors: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    num_segments: int = 0

    def add(self, group: Group) -> tuple[slice, list[slice]]:
        """Add a group; returns where its shared tokens and each answer's own are among the targets."""
        segment = self.num_segments
        self._extend(group.prompt, 0, segment, segment)
        prompt_end = len(self.ids) - 1
        shared = self._score(group.prompt[len(group.prompt) - group.num_scored :], prompt_end - group.num_scored)
        answers = []
        for number, answer in enumerate(group.answers, 1):
            answers.append(self._score(answer, prompt_end, len(self.ids)))
            self._extend(answer, len(group.prompt), segment + number, segment)
        self.num_segments += len(group.answers) + 1
        return shared, answers

    def _score(self, tokens: Sequence[int], before: int, first: int | None = None) -> slice:
        """Mark tokens as scored: the first is predicted at `before`, the others from `first` (or `before` + 1) on."""
        start = len(self.targets)
        following = before + 1 if first is None else first
        self.predictors += [before, *range(following, following + len(tokens) - 1)] if tokens else []
        self.targets += tokens
        return slice(start, len(self.targets))

    def _extend(self, tokens: Sequence[int], first_position: int, segment: int, prefix: int) -> None:
        self.ids += tokens
        self.positions += range(first_position, first_position + len(tokens))
        self.segments += [segment] * len(tokens)
        self.prefixes += [prefix] * len(tokens)
