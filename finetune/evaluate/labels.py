"""Label accuracy by likelihood: which of a set's answers does the model find likeliest after the prompt?

The prompt is computed once and every answer continues it: a sequence contains the prompt and, side by side, all
answers, each seeing the prompt and itself only. What all answers begin with, such as the final channel's header, moves
into the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GptOssForCausalLM

from finetune import log
from finetune.config.schema import DataConfig
from finetune.data.harmony.render import render_answer, render_prompt
from finetune.data.sources import Record
from finetune.errors import CheckError, InputError
from finetune.evaluate.likelihood import BetweenBatches, Group, score_groups

SEQUENCE_TOKENS = 4096


@dataclass(frozen=True, eq=False)
class LabelScores:
    """Scores of every label for every record.

    Attributes:
        labels: the candidates, sorted.
        log_likelihood: float64 [n, labels], nats of the whole answer including its end token.
        right: int64 [n], index of each record's own answer.
        shared: float64 [n], nats of what all answers begin with, the final channel's header; included in
            `log_likelihood`.
    """

    labels: tuple[str, ...]
    log_likelihood: NDArray[np.float64]
    right: NDArray[np.int64]
    shared: NDArray[np.float64]

    @property
    def accuracy(self) -> float:
        """Share of records whose own answer is the likeliest."""
        return int((self.log_likelihood.argmax(1) == self.right).sum()) / len(self.right)


@torch.no_grad()
def score_labels(
    model: GptOssForCausalLM,
    records: Sequence[Record],
    labels: Sequence[str],
    config: DataConfig,
    *,
    task: str = "label accuracy",
    between_batches: BetweenBatches = lambda: None,
    progress: log.Progress | None = None,
) -> LabelScores:
    """Log-likelihood of every label after every record's prompt.

    Args:
        model: in evaluation mode.
        records: with answers that are among `labels`.
        labels: candidate answers, at least two.
        config: conversation date and reasoning effort of the prompts.
        task: title of the progress line.
        between_batches: see `BetweenBatches`.
        progress: a line to advance by the records instead of one of its own.

    Raises:
        CheckError: a score is not finite.
        InputError: a record's answer is not among the labels.
    """
    labels = tuple(labels)
    right = np.array([_label_number(record, labels) for record in records])
    answers = [render_answer(label) for label in labels]
    shared = _common_prefix(answers)
    scores, shared_nats = np.zeros((len(records), len(labels))), np.zeros(len(records))
    pending: list[tuple[int, list[int]]] = []
    with nullcontext(progress) if progress else log.Progress(task, len(records), "records") as line:
        for number, record in enumerate(records):
            pending.append((number, render_prompt(record, config) + answers[0][:shared]))
            tokens = sum(len(prompt) for _, prompt in pending) + len(pending) * sum(len(a) - shared for a in answers)
            if tokens >= SEQUENCE_TOKENS or number == len(records) - 1:
                between_batches()
                groups = [Group(prompt, [a[shared:] for a in answers], shared) for _, prompt in pending]
                for (place, _), found in zip(pending, score_groups(model, groups), strict=True):
                    scores[place], shared_nats[place] = found.log_likelihood, found.shared
                line.advance(len(pending))
                pending = []
    _check_finite(scores, records, labels)
    return LabelScores(labels, scores, right, shared_nats)


def own_tokens(labels: Sequence[str]) -> NDArray[np.int64]:
    """int64 [labels]: tokens of each answer beyond what all begin with; the end token counts, the header does not."""
    answers = [render_answer(label) for label in labels]
    return np.array([len(answer) for answer in answers]) - _common_prefix(answers)


def _label_number(record: Record, labels: tuple[str, ...]) -> int:
    if record.answer not in labels:
        raise InputError(f"{record.where}: answer {record.answer!r} is not among the {len(labels)} labels")
    return labels.index(record.answer)


def _check_finite(scores: NDArray[np.float64], records: Sequence[Record], labels: tuple[str, ...]) -> None:
    bad = np.argwhere(~np.isfinite(scores))
    if len(bad):
        record, label = bad[0]
        raise CheckError(
            f"{records[record].where}: the log-likelihood of {labels[label]!r} is {scores[record, label]}",
            why=f"the model's numbers left the range of its dtype, in {len(np.unique(bad[:, 0])):,} of "
            f"{len(records):,} records scored together",
            fix="check the base, the adapter and these records",
        )


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Tokens that all sequences begin with, leaving each at least one of its own."""
    length = 0
    for tokens in zip(*(sequence[:-1] for sequence in sequences), strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length
