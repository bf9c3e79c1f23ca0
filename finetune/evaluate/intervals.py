"""Intervals around measured figures, so that a difference can be told from luck."""

from __future__ import annotations

from collections.abc import Callable
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
