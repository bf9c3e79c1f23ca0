"""Which samples each epoch takes of each source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from finetune.config.schema import SourceConfig


def epoch_sizes(sizes: Sequence[int], weights: Sequence[float], temperature: float) -> list[float]:
    """How many samples an epoch takes of each source, as fractions that the epochs share out.

    A source gives size x weight; temperature raises these to 1 / temperature and scales them so that their sum stays.

    Args:
        sizes: samples of each source.
        weights: how often an epoch takes each of a source's samples.
        temperature: 1 changes nothing; large values make all sources that have samples equal.

    >>> epoch_sizes([900, 100], [1, 1], 1.0)
    [900.0, 100.0]
    >>> epoch_sizes([900, 100], [1, 1], 2.0)
    [750.0, 250.0]
    """
    plain = np.array(sizes, dtype=np.float64) * np.array(weights, dtype=np.float64)
    if temperature == 1.0 or not plain.any():
        return [float(size) for size in plain]
    tempered = np.where(plain > 0, plain, 1) ** (1 / temperature) * (plain > 0)
    return [float(size) for size in tempered * (plain.sum() / tempered.sum())]


class Mixture:
    """Says which samples an epoch takes; no state, so any epoch can be asked for.

    Each source is an endless sequence of passes, each pass all its samples in an order of its own; an epoch takes the
    next stretch of it. So over any number of epochs a source's samples are taken equally often, give or take one.

    Args:
        source_sizes: samples of each source; their numbers run on from source to source.
        sources: the recipe's, for their weights.
        temperature: see `epoch_sizes`.
        seed: the run's seed.
    """

    def __init__(
        self, source_sizes: Mapping[str, int], sources: Mapping[str, SourceConfig], temperature: float, seed: int
    ) -> None:
        self._sizes, self._seed = list(source_sizes.values()), seed
        weights = [sources[name].weight for name in source_sizes]
        self._takes = epoch_sizes(self._sizes, weights, temperature)
        self._plain = self._takes == [float(size) for size in self._sizes]

    def samples(self, epoch: int) -> NDArray[np.int64]:
        """Numbers of the samples of one epoch (from 0); a sample stands in it as often as it is to be seen."""
        if self._plain:
            return np.arange(sum(self._sizes))
        starts = np.cumsum([0, *self._sizes])
        stretches = [
            starts[source] + self._stretch(source, round(epoch * take), round((epoch + 1) * take))
            for source, take in enumerate(self._takes)
            if self._sizes[source]
        ]
        return np.concatenate(stretches)

    def _stretch(self, source: int, first: int, end: int) -> NDArray[np.int64]:
        size = self._sizes[source]
        passes = range(first // size, -(-end // size))
        orders = [np.random.default_rng([self._seed, source, number]).permutation(size) for number in passes]
        taken = np.concatenate([np.zeros(0, dtype=np.int64), *orders])
        return taken[first - passes.start * size :][: end - first]
