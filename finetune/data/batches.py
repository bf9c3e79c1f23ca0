"""Lay out examples as the tensors of a micro-batch.

Shapes: B sequences, L tokens in the longest sequence of the batch, rounded up to `LENGTH_MULTIPLE`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from finetune.data.harmony.render import Example
from finetune.data.harmony.tokenizer import PAD_ID

LENGTH_MULTIPLE = 8
PADDING_SEGMENT = -1


@dataclass(frozen=True)
class Answer:
    """One of several answers to a prompt, as it lies in a sequence.

    Attributes:
        record: number of its record within the sequence.
        before: place of the token that the answer's first token is predicted from, the prompt's last.
        start, stop: the answer's tokens are at `start` up to `stop`.
        better_than: the answers of the same record, by number, that it forms a pair with as the better one.
    """

    record: int
    before: int
    start: int
    stop: int
    better_than: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Batch:
    """The sequences of one micro-batch.

    Attributes:
        input_ids: int64 [B, L].
        weights: float32 [B, L], as in `Example`: the loss weight of predicting this token from those before it; 0 at
            the start of each example, so no example is predicted from another, and on padding.
        positions: int64 [B, L], from 0 in each example and again in the padding.
        segments: int64 [B, L], index of the example within its sequence; -1 on padding. Tokens attend within their
            segment only.
        example_ids: the records' ids, per sequence.
        group_sizes: how many sequences each group has, in order, where groups (such as the pairs of a preference loss)
            must stay in one micro-batch. None: every sequence is a group.
        prefixes: int64 [B, L], the segment that each token's segment continues, itself where it continues none: answers
            side by side continue their prompt. None: no segment continues another.
        answers: of each sequence, where answers that are compared lie. None: nothing is compared.
    """

    input_ids: torch.Tensor
    weights: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor
    example_ids: tuple[tuple[str, ...], ...]
    group_sizes: tuple[int, ...] | None = None
    prefixes: torch.Tensor | None = None
    answers: tuple[tuple[Answer, ...], ...] | None = None

    @property
    def num_groups(self) -> int:
        """Number of parts that the batch can be split into."""
        return len(self.example_ids) if self.group_sizes is None else len(self.group_sizes)

    @property
    def num_tokens(self) -> int:
        """Number of tokens that are not padding."""
        return int((self.segments != PADDING_SEGMENT).sum())

    @property
    def weight_sum(self) -> float:
        """Sum of the loss weights: this micro-batch's part of the optimiser step's denominator."""
        return float(self.weights.sum(dtype=torch.float64))

    def parts(self, count: int) -> list[Batch]:
        """The same sequences in `count` batches, as evenly as whole groups go; fewer if there are fewer groups."""
        count, sizes = min(count, self.num_groups), self.group_sizes
        made, group, start = [], 0, 0
        for number in range(count):
            next_group = group + self.num_groups // count + (number < self.num_groups % count)
            of_part = None if sizes is None else sizes[group:next_group]
            end = start + (next_group - group if of_part is None else sum(of_part))
            part = slice(start, end)
            made.append(
                Batch(
                    self.input_ids[part],
                    self.weights[part],
                    self.positions[part],
                    self.segments[part],
                    self.example_ids[part],
                    of_part,
                    None if self.prefixes is None else self.prefixes[part],
                    None if self.answers is None else self.answers[part],
                )
            )
            group, start = next_group, end
        return made

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        return Batch(
            self.input_ids.to(device),
            self.weights.to(device),
            self.positions.to(device),
            self.segments.to(device),
            self.example_ids,
            self.group_sizes,
            None if self.prefixes is None else self.prefixes.to(device),
            self.answers,
        )

    def with_answers(self, answers: tuple[tuple[Answer, ...], ...]) -> Batch:
        """The same batch, with the places of its answers."""
        return replace(self, answers=answers)

    @property
    def num_pairs(self) -> int:
        """Number of pairs of answers that are compared."""
        return sum(len(answer.better_than) for answers in self.answers or () for answer in answers)


def collate(sequences: Sequence[Sequence[Example]], pad_id: int = PAD_ID) -> Batch:
    """Join the examples of each sequence and pad the sequences to one length.

    Args:
        sequences: the examples of each sequence, in order; at least one sequence, and one example in each.
        pad_id: token id of the padding.

    Raises:
        ValueError: no sequence, an empty sequence, or an example whose first token has a weight: nothing precedes it.
    """
    if not sequences or not all(sequences):
        raise ValueError("a batch needs at least one sequence, and every sequence an example")
    if any(example.weights[0] != 0 for sequence in sequences for example in sequence):
        raise ValueError("an example's first token cannot be trained: nothing precedes it")
    longest = max(sum(len(example.ids) for example in sequence) for sequence in sequences)
    shape = (len(sequences), math.ceil(longest / LENGTH_MULTIPLE) * LENGTH_MULTIPLE)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    weights = np.zeros(shape, dtype=np.float32)
    positions = np.zeros(shape, dtype=np.int64)
    segments = np.full(shape, PADDING_SEGMENT, dtype=np.int64)
    for number, sequence in enumerate(sequences):
        start = 0
        for segment, example in enumerate(sequence):
            span = (number, slice(start, start + len(example.ids)))
            input_ids[span], weights[span], segments[span] = example.ids, example.weights, segment
            positions[span] = np.arange(len(example.ids))
            start += len(example.ids)
        positions[number, start:] = np.arange(shape[1] - start)
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(weights),
        torch.from_numpy(positions),
        torch.from_numpy(segments),
        tuple(tuple(example.id for example in sequence) for sequence in sequences),
    )


def padding_batch() -> Batch:
    """A micro-batch of one sequence of padding, which trains nothing."""
    shape = (1, LENGTH_MULTIPLE)
    return Batch(
        torch.full(shape, PAD_ID),
        torch.zeros(shape),
        torch.arange(LENGTH_MULTIPLE).reshape(shape),
        torch.full(shape, PADDING_SEGMENT),
        ((),),
    )
