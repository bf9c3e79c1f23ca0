"""Plan the sequences of every optimiser step of every epoch.

Micro-batches are assigned to ranks in turn, so that the steps are the same for any number of ranks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from finetune.config.schema import DataConfig, TrainerConfig
from finetune.data.batches import Batch, collate, padding_batch
from finetune.data.example_table import example_lengths
from finetune.data.groups import Groups, collate_groups
from finetune.data.harmony.render import Example
from finetune.data.packing import Mixture, pack

T = TypeVar("T")

PackedSequence = list[int]
"""Numbers of the examples in one sequence, or of the groups of examples where answers are compared."""
MicroBatch = list[PackedSequence]
"""Sequences in one forward and backward pass."""
Step = list[MicroBatch]
"""Micro-batches whose gradients make one optimiser step."""


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
        groups: which examples are answers to be compared; a group is never divided. None: each example stands alone.
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
        groups: Groups | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size} ranks")
        self.examples, self._trainer, self._seed = examples, trainer, seed
        self._rank, self._world_size = rank, world_size
        self._capacity, self._pack = config.max_length, config.pack
        self.groups, self.share_prompts = groups, config.share_prompts
        self.lengths: Sequence[int] = example_lengths(examples)
        if groups is not None:
            self.lengths = groups.lengths(examples, share_prompts=config.share_prompts)
        self._mixture = None
        if source_sizes is not None:
            sizes = source_sizes if groups is None else _groups_of_sources(source_sizes, groups)
            self._mixture = Mixture(sizes, config.train, config.mix_temperature, seed)

    def sequences(self, epoch: int) -> list[PackedSequence]:
        """The sequences of one epoch (from 0) in training order, of all ranks; every chosen example is in one."""
        indices = self._mixture.examples(epoch) if self._mixture else np.arange(len(self.lengths))
        rng = np.random.default_rng([self._seed, epoch])
        if not self._pack:
            return [[int(indices[place])] for place in rng.permutation(len(indices))]
        sequences = pack([self.lengths[index] for index in indices.tolist()], self._capacity, rng)
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
        if self.groups is None:
            return collate([[self.examples[index] for index in sequence] for sequence in micro_batch])
        members, pairs = self.groups.members, self.groups.pairs
        sequences = [
            [([self.examples[number] for number in members[group]], pairs[group]) for group in sequence]
            for sequence in micro_batch
        ]
        return collate_groups(sequences, share_prompts=self.share_prompts)


def _chunks(items: list[T], size: int) -> list[list[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _groups_of_sources(source_sizes: Mapping[str, int], groups: Groups) -> dict[str, int]:
    """How many groups each source has, from how many examples it has."""
    ends = np.cumsum(list(source_sizes.values()))
    first = np.array([numbers[0] for numbers in groups.members], dtype=np.int64)
    counts = np.bincount(np.searchsorted(ends, first, side="right"), minlength=len(ends))
    return dict(zip(source_sizes, counts.tolist(), strict=True))
