"""Log-likelihood of answers after prompts, each prompt computed once: many groups of them in one row of tokens.

A group is a prompt and, side by side, all answers to it, each seeing the prompt and itself only (`plan_attention`'s
prefixes). Label scoring and the evaluation harness both stand on this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GptOssForCausalLM

from finetune.kernels.loss_head import answer_scores
from finetune.model.forward import hidden_states


@dataclass(frozen=True)
class Group:
    """A prompt and what may follow it.

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

    @property
    def num_tokens(self) -> int:
        """Room it takes in a row."""
        return len(self.prompt) + sum(map(len, self.answers))


@dataclass(frozen=True, eq=False)
class GroupScores:
    """Scores of a group's answers.

    Attributes:
        log_likelihood: float64 [answers], nats of all of an answer's tokens, the shared ones among them.
        is_greedy: bool [answers], each of its tokens is the likeliest at its place.
        shared: nats of the `num_scored` tokens alone; 0 if there are none.
    """

    log_likelihood: NDArray[np.float64]
    is_greedy: NDArray[np.bool_]
    shared: float


@torch.no_grad()
def score_row(model: GptOssForCausalLM, groups: Sequence[Group]) -> list[GroupScores]:
    """Score groups, everything in one row of tokens.

    Args:
        model: in evaluation mode.
        groups: their tokens together are the row's length.
    """
    row = _Row()
    spans = [row.add(group) for group in groups]
    tensors = (torch.tensor([values]) for values in (row.ids, row.positions, row.segments, row.prefixes))
    hidden = hidden_states(model, *tensors)[0]
    # All answers' first tokens are predicted by the same hidden state: its 201,088 logits are needed once.
    needed, rows = torch.tensor(row.predictors, device=hidden.device).unique(return_inverse=True)
    targets = torch.tensor(row.targets, device=hidden.device)
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
class _Row:
    """Tokens of groups side by side, and which hidden state predicts which scored token."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    prefixes: list[int] = field(default_factory=list)
    predictors: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    num_segments: int = 0

    def add(self, group: Group) -> tuple[slice, list[slice]]:
        """Lay out a group; where its shared and each answer's own tokens stand among the targets."""
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
        """Note tokens as scored: the first is predicted at `before`, the others from `first` (or `before` + 1) on."""
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
