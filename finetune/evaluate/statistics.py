"""Intervals around measured figures, so that a difference can be told from luck."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import comb
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 2000


def wilson_interval(num_right: int, num_rows: int, confidence: float) -> tuple[float, float]:
    """Wilson's score interval of a proportion; unlike the textbook one it stays sensible near 0 and 1.

    Source: Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    if num_rows == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = num_right / num_rows
    scale = 1 + z**2 / num_rows
    middle = (share + z**2 / (2 * num_rows)) / scale
    half = z / scale * (share * (1 - share) / num_rows + z**2 / (4 * num_rows**2)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap_ratio_interval(
    numerators: NDArray[np.float64], denominators: NDArray[np.float64], confidence: float, *, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of sum(numerators) / sum(denominators), resampling whole samples.

    Args:
        numerators, denominators: float64 [n], such as each sample's weighted NLL and its weight.
        confidence: level, such as 0.95.
        seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    ratios = np.empty(NUM_RESAMPLES)
    for resample in range(NUM_RESAMPLES):  # one at a time: all at once would take gigabytes for 100,000 samples
        drawn = rng.integers(len(numerators), size=len(numerators))
        ratios[resample] = numerators[drawn].sum() / denominators[drawn].sum()
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def paired_ratio_interval(
    before: NDArray[np.float64],
    after: NDArray[np.float64],
    weights: NDArray[np.float64],
    confidence: float,
    *,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of (sum(after) - sum(before)) / sum(weights), resampling rows and keeping pairs.

    Args:
        before, after: float64 [n], such as each sample's NLL under two models, or 1 where an answer was right.
        weights: float64 [n], the denominators they share.
        confidence: level, such as 0.95.
        seed: of the resampling.
    """
    return bootstrap_ratio_interval(after - before, weights, confidence, seed=seed)


def bootstrap_intervals(
    figures: Callable[[NDArray[np.int64]], NDArray[np.float64]],
    num_rows: int,
    confidence: float,
    *,
    kind: Literal["percentile", "reflected"] = "percentile",
    seed: int = 0,
) -> NDArray[np.float64]:
    """Bootstrap intervals of figures that are no ratio of sums, resampling rows.

    Args:
        figures: from the numbers of the drawn rows, int64 [n], to float64 [K]; NaN where a draw says nothing.
        num_rows: n.
        confidence: level, such as 0.95.
        kind: `reflected` turns the percentiles about the measured value (Davison and Hinkley 1997, "basic"). It suits
            figures that every draw makes larger on average, such as a calibration error: chance differences within
            bins count as error, those of the rows and those of the draw on top.
        seed: of the resampling.

    Returns:
        float64 [K, 2], lower and upper ends; NaN where no draw said anything.
    """
    rng = np.random.default_rng(seed)
    drawn = np.array([figures(rng.integers(num_rows, size=num_rows)) for _ in range(NUM_RESAMPLES)])
    ends = np.full((drawn.shape[1], 2), np.nan)
    told = ~np.isnan(drawn).all(0)
    ends[told] = np.nanquantile(drawn[:, told], [(1 - confidence) / 2, (1 + confidence) / 2], axis=0).T
    if kind == "reflected":
        measured = figures(np.arange(num_rows))
        ends = 2 * measured[:, None] - ends[:, ::-1]
    return ends


# What a table of label scores says: which label wins, how well each is found, and whether confidence can be believed.
#
# Shape legend: n records, C labels.

NUM_BINS = 10
Normalisation = Literal["raw", "per_token"]


@dataclass(frozen=True, eq=False)
class Classification:
    """Which label each record got.

    Attributes:
        labels: the candidates.
        right, chosen: int64 [n], indices of each record's own label and of the likeliest one.
        confidence: float64 [n], probability of the chosen label among the candidates.
    """

    labels: tuple[str, ...]
    right: NDArray[np.int64]
    chosen: NDArray[np.int64]
    confidence: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        labels: tuple[str, ...],
        log_likelihood: NDArray[np.float64],
        right: NDArray[np.int64],
        per_token: tuple[NDArray[np.float64], NDArray[np.int64]] | None = None,
    ) -> Classification:
        """Choose by likelihood.

        Args:
            labels: the candidates.
            log_likelihood: float64 [n, C], nats of each whole answer.
            right: int64 [n].
            per_token: float64 [n], nats of what all answers begin with, and int64 [C], each answer's tokens beyond
                that: then likelihood per own token decides, which does not favour short answers. What is shared must
                not be divided: an unlikely header would weigh less on longer answers. None: raw.
        """
        scores = log_likelihood
        if per_token is not None:
            shared, tokens = per_token
            scores = (log_likelihood - shared[:, None]) / tokens
        probabilities = np.exp(scores - scores.max(1, keepdims=True))
        probabilities /= probabilities.sum(1, keepdims=True)
        return cls(labels, right, scores.argmax(1), probabilities.max(1))

    @property
    def is_right(self) -> NDArray[np.bool_]:
        """bool [n]."""
        return self.chosen == self.right

    @property
    def accuracy(self) -> float:
        """Share of records whose own label was chosen."""
        return float(self.is_right.mean())

    @property
    def confusion(self) -> NDArray[np.int64]:
        """int64 [C, C]: row is the record's own label, column the chosen one."""
        table = np.zeros((len(self.labels), len(self.labels)), dtype=np.int64)
        np.add.at(table, (self.right, self.chosen), 1)
        return table

    @property
    def f1(self) -> NDArray[np.float64]:
        """float64 [C]: each label's F1, 0 where it neither stands nor was chosen."""
        table = self.confusion
        sums = table.sum(0) + table.sum(1)
        return 2 * table.diagonal() / np.maximum(sums, 1)

    @property
    def macro_f1(self) -> float:
        """Mean F1 over the labels that stand or were chosen, each counting the same however rare."""
        table = self.confusion
        return float(self.f1[(table.sum(0) + table.sum(1)) > 0].mean())

    @property
    def calibration_error(self) -> float:
        """Expected calibration error: |accuracy - confidence| in NUM_BINS equal bins, weighted by their records.

        Source: Guo et al. 2017, arXiv:1706.04599.
        """
        return sum(count / len(self.right) * abs(right - sure) for count, right, sure in self.reliability())

    @property
    def bins(self) -> NDArray[np.int64]:
        """int64 [n]: the confidence bin of each record."""
        return np.minimum((self.confidence * NUM_BINS).astype(np.int64), NUM_BINS - 1)

    def reliability(self) -> list[tuple[int, float, float]]:
        """Of each confidence bin that has records: how many, their accuracy, their mean confidence."""
        return [
            (int(here.sum()), float(self.is_right[here].mean()), float(self.confidence[here].mean()))
            for here in (self.bins == number for number in range(NUM_BINS))
            if here.any()
        ]

    def most_confused(self, count: int) -> list[tuple[str, str, int]]:
        """The pairs (own label, chosen label) that were mixed up most often, with how often."""
        table = self.confusion.copy()
        np.fill_diagonal(table, 0)
        order = np.argsort(-table, axis=None, kind="stable")[:count]
        pairs = (divmod(int(place), len(self.labels)) for place in order)
        return [(self.labels[own], self.labels[got], int(table[own, got])) for own, got in pairs if table[own, got]]


def mcnemar(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> tuple[int, int, float]:
    """Exact McNemar test: do two models answer the same records differently well?

    Args:
        before, after: bool [n], right or not.

    Returns:
        Records only `before` had right, records only `after` had right, and the two-sided p-value.
    """
    lost, gained = int((before & ~after).sum()), int((~before & after).sum())
    total, fewer = lost + gained, min(lost, gained)
    if total == 0:
        return 0, 0, 1.0
    tail = sum(comb(total, k) for k in range(fewer + 1))
    return lost, gained, min(1.0, 2 * tail / 2**total)
