"""Lay out examples as the tensors of a micro-batch, and plan the sequences of every optimiser step of every epoch.

Micro-batches are assigned to ranks in turn, so that the steps are the same for any number of ranks.

Shapes: B sequences, L tokens in the longest sequence of the batch, rounded up to `LENGTH_MULTIPLE`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from finetune.config.schema import DataConfig, TrainerConfig
from finetune.data.example_table import example_lengths
from finetune.data.harmony.render import Example
from finetune.data.harmony.tokenizer import PAD_ID
from finetune.data.packing import Mixture, pack

T = TypeVar("T")

LENGTH_MULTIPLE = 8
PADDING_SEGMENT = -1

PackedSequence = list[int]
"""Indices of the examples in one sequence."""
MicroBatch = list[PackedSequence]
"""Sequences in one forward and backward pass."""
Step = list[MicroBatch]
"""Micro-batches whose gradients make one optimiser step."""


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
    """

    input_ids: torch.Tensor
    weights: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor
    example_ids: tuple[tuple[str, ...], ...]
    group_sizes: tuple[int, ...] | None = None

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
        )


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


class BatchPlan:
    """Plans the sequences of every optimiser step, and this rank's share of them.

    It has no random state: each epoch's sequences follow from (seed, epoch) alone, so a resumed run asks for the step
    at which it stopped and gets the same one. Packing shuffles first, so epochs may differ by a sequence and a step.

    Args:
        examples: the training examples, in the order of the sources.
        config: `max_length`, `pack`, and the sources' weights and temperature.
        trainer: `micro_batch_size`, `gradient_accumulation_steps` (per rank), `epochs` and `max_steps`.
        seed: the run's seed.
        source_sizes: examples of each source (`SplitStats.source_sizes`). None: every example once per epoch.
        rank: this process's rank.
        world_size: number of ranks.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        config: DataConfig,
        trainer: TrainerConfig,
        seed: int,
        *,
        source_sizes: Mapping[str, int] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size} ranks")
        self.examples, self._trainer, self._seed = examples, trainer, seed
        self._rank, self._world_size = rank, world_size
        self._capacity, self._pack = config.max_length, config.pack
        self._lengths: Sequence[int] = example_lengths(examples)
        self._mixture = None
        if source_sizes is not None:
            self._mixture = Mixture(source_sizes, config.train, config.mix_temperature, seed)

    def sequences(self, epoch: int) -> list[PackedSequence]:
        """The sequences of one epoch (from 0) in training order, of all ranks; every chosen example is in one."""
        indices = self._mixture.examples(epoch) if self._mixture else np.arange(len(self._lengths))
        rng = np.random.default_rng([self._seed, epoch])
        if not self._pack:
            return [[int(indices[place])] for place in rng.permutation(len(indices))]
        sequences = pack([self._lengths[index] for index in indices.tolist()], self._capacity, rng)
        return [[int(indices[place]) for place in sequence] for sequence in sequences]

    def global_steps(self, epoch: int) -> list[Step]:
        """The optimiser steps of one whole epoch, of all ranks; the last may be smaller.

        `gradient_accumulation_steps` counts those of each rank: 2 ranks with 4 make the same steps as 1 with 8.
        """
        micro_batches = _chunks(self.sequences(epoch), self._trainer.micro_batch_size)
        return _chunks(micro_batches, self._trainer.gradient_accumulation_steps * self._world_size)

    def steps(self, epoch: int) -> list[Step]:
        """This rank's share of each step of an epoch: every `world_size`-th micro-batch from `rank` on.

        Ranks reduce gradients together, so all have equally many micro-batches in a step. Where the last step's cannot
        be divided evenly, the other ranks get an empty one (`batch` makes padding of it).

        Packs again on every call (60 ms for 4,369 examples): call it once per epoch, not once per step.
        """
        shares = []
        for step in self.global_steps(epoch):
            padded = step + [[]] * (-len(step) % self._world_size)
            shares.append(padded[self._rank :: self._world_size])
        return shares

    @functools.cached_property
    def steps_per_epoch(self) -> tuple[int, ...]:
        """Optimiser steps of the run in each epoch; a fraction of an epoch is rounded up to whole steps."""
        counts: list[int] = []
        remaining = math.inf if self._trainer.max_steps is None else self._trainer.max_steps
        for epoch in range(math.ceil(self._trainer.epochs)):
            if not remaining:  # packing the epochs that max_steps leaves out would take as long as the others
                break
            share = min(1.0, self._trainer.epochs - epoch)
            # 0.1 x 30 is 3.0000000000000004 in floats and must not become a fourth step.
            count = int(min(math.ceil(share * len(self.global_steps(epoch)) - 1e-9), remaining))
            remaining -= count
            if count:
                counts.append(count)
        return tuple(counts)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return sum(self.steps_per_epoch)

    def position(self, step: int) -> tuple[int, int]:
        """The run's position after `step` optimiser steps.

        Returns:
            (epoch, index): the next step is `steps(epoch)[index]`. After the last step it is (number of epochs, 0).

        Raises:
            ValueError: `step` is negative or beyond `total_steps`.
        """
        if not 0 <= step <= self.total_steps:
            raise ValueError(f"step {step} is not from 0 to {self.total_steps}")
        for epoch, count in enumerate(self.steps_per_epoch):
            if step < count:
                return epoch, step
            step -= count
        return len(self.steps_per_epoch), 0

    def batch(self, micro_batch: MicroBatch) -> Batch:
        """The tensors of one of `steps(epoch)`'s micro-batches; an empty one becomes a sequence of padding."""
        if not micro_batch:
            return padding_batch()
        return collate([[self.examples[index] for index in sequence] for sequence in micro_batch])


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


def _chunks(items: list[T], size: int) -> list[list[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
