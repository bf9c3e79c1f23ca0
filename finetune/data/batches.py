"""From samples to the tensors of a micro-step, and the plan of which rows each optimiser step of each epoch takes.

Micro-steps are dealt to processes in turn, so that together they make the same steps however many processes there are.

Shapes: B rows, L tokens in the longest row of the batch, rounded up to `LENGTH_MULTIPLE`.
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

Row = list[int]
"""Numbers of the samples that share a packed row."""
MicroStep = list[Row]
"""Rows in one forward and backward."""
Step = list[MicroStep]
"""Micro-steps whose gradients make one optimiser step."""


@dataclass(frozen=True, eq=False)
class Batch:
    """The rows of one micro-step.

    Attributes:
        input_ids: int64 [B, L].
        weights: float32 [B, L], as in `Example`: the loss weight of predicting this token from those before it; 0 at
            the start of each sample, so no sample is predicted from another, and on padding.
        positions: int64 [B, L], from 0 in each sample and again in the padding.
        segments: int64 [B, L], number of the sample within its row from 0; -1 on padding. Tokens attend within their
            segment only.
        example_ids: the records' ids, sequence by sequence.
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
        """How many parts the batch can be split into."""
        return len(self.example_ids) if self.group_sizes is None else len(self.group_sizes)

    @property
    def num_tokens(self) -> int:
        """How many tokens are not padding."""
        return int((self.segments != PADDING_SEGMENT).sum())

    @property
    def weight_sum(self) -> float:
        """Sum of the loss weights: this micro-step's share of the optimiser step's denominator."""
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


def collate(rows: Sequence[Sequence[Example]], pad_id: int = PAD_ID) -> Batch:
    """Lay samples side by side into rows and pad the rows to one length.

    Args:
        rows: the samples of each row, in order; at least one row, and one sample in each.
        pad_id: token id of the padding.

    Raises:
        ValueError: no row, an empty row, or a sample whose first token has a weight: nothing precedes it.
    """
    if not rows or not all(rows):
        raise ValueError("a batch needs at least one row, and every row a sample")
    if any(sample.weights[0] != 0 for row in rows for sample in row):
        raise ValueError("a sample's first token cannot be trained: nothing precedes it")
    longest = max(sum(len(sample.ids) for sample in row) for row in rows)
    shape = (len(rows), math.ceil(longest / LENGTH_MULTIPLE) * LENGTH_MULTIPLE)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    weights = np.zeros(shape, dtype=np.float32)
    positions = np.zeros(shape, dtype=np.int64)
    segments = np.full(shape, PADDING_SEGMENT, dtype=np.int64)
    for number, row in enumerate(rows):
        start = 0
        for segment, sample in enumerate(row):
            span = (number, slice(start, start + len(sample.ids)))
            input_ids[span], weights[span], segments[span] = sample.ids, sample.weights, segment
            positions[span] = np.arange(len(sample.ids))
            start += len(sample.ids)
        positions[number, start:] = np.arange(shape[1] - start)
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(weights),
        torch.from_numpy(positions),
        torch.from_numpy(segments),
        tuple(tuple(sample.id for sample in row) for row in rows),
    )


class BatchPlan:
    """Which rows every optimiser step takes, and which of them are this process's.

    It holds no random state: each epoch's rows follow from (seed, epoch) alone, so a resumed run asks for the step at
    which it stopped and gets the same one. Packing shuffles first, so epochs may differ by a row and a step.

    Args:
        samples: the training samples, in the order of the sources.
        config: `max_length`, `pack`, and the sources' weights and temperature.
        trainer: `micro_batch_size`, `gradient_accumulation_steps` (of each process), `epochs` and `max_steps`.
        seed: the run's seed.
        source_sizes: samples of each source (`Split.source_sizes`). None: every sample once an epoch.
        rank: number of this process, from 0.
        world_size: how many processes there are.
    """

    def __init__(
        self,
        samples: Sequence[Example],
        config: DataConfig,
        trainer: TrainerConfig,
        seed: int,
        *,
        source_sizes: Mapping[str, int] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size} processes")
        self.samples, self._trainer, self._seed = samples, trainer, seed
        self._rank, self._world_size = rank, world_size
        self._capacity, self._pack = config.max_length, config.pack
        self._lengths: Sequence[int] = example_lengths(samples)
        self._mixture = None
        if source_sizes is not None:
            self._mixture = Mixture(source_sizes, config.train, config.mix_temperature, seed)

    def rows(self, epoch: int) -> list[Row]:
        """The rows of one epoch (from 0) in training order, of all processes; every sample taken stands in one."""
        numbers = self._mixture.samples(epoch) if self._mixture else np.arange(len(self._lengths))
        rng = np.random.default_rng([self._seed, epoch])
        if not self._pack:
            return [[int(numbers[place])] for place in rng.permutation(len(numbers))]
        rows = pack([self._lengths[number] for number in numbers.tolist()], self._capacity, rng)
        return [[int(numbers[place]) for place in row] for row in rows]

    def global_steps(self, epoch: int) -> list[Step]:
        """The optimiser steps of one whole epoch, of all processes; the last may be smaller.

        `gradient_accumulation_steps` counts those of each process: 2 processes of 4 make the same steps as 1 of 8.
        """
        gradient_accumulation_steps = _chunks(self.rows(epoch), self._trainer.micro_batch_size)
        return _chunks(gradient_accumulation_steps, self._trainer.gradient_accumulation_steps * self._world_size)

    def steps(self, epoch: int) -> list[Step]:
        """This process's share of each of an epoch's steps: every `world_size`-th micro-step from `rank` on.

        World exchange gradients, so all have equally many micro-steps in a step. Where the last step's do not go
        round, those left without get one that is empty (`batch` makes padding of it).

        Packs anew (60 ms for 4,369 samples), so ask once an epoch, not once a step.
        """
        shares = []
        for step in self.global_steps(epoch):
            padded = step + [[]] * (-len(step) % self._world_size)
            shares.append(padded[self._rank :: self._world_size])
        return shares

    @functools.cached_property
    def steps_per_epoch(self) -> tuple[int, ...]:
        """Optimiser steps that the run takes in each epoch; a fraction of an epoch is rounded up to whole steps."""
        counts: list[int] = []
        left_over = math.inf if self._trainer.max_steps is None else self._trainer.max_steps
        for epoch in range(math.ceil(self._trainer.epochs)):
            if not left_over:  # packing the epochs that max_steps leaves out would take as long as the others
                break
            share = min(1.0, self._trainer.epochs - epoch)
            # 0.1 x 30 is 3.0000000000000004 in floats and must not become a fourth step.
            count = int(min(math.ceil(share * len(self.global_steps(epoch)) - 1e-9), left_over))
            left_over -= count
            if count:
                counts.append(count)
        return tuple(counts)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return sum(self.steps_per_epoch)

    def position(self, step: int) -> tuple[int, int]:
        """Where the run stands after `step` optimiser steps.

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

    def batch(self, micro_step: MicroStep) -> Batch:
        """The tensors of one of `steps(epoch)`'s micro-steps; an empty one is a row of padding."""
        if not micro_step:
            return _padding()
        return collate([[self.samples[number] for number in row] for row in micro_step])


def _padding() -> Batch:
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
