"""Figures with their intervals, of the base, of base + adapter and of their difference on the same rows.

Shape legend: n records, C labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.evaluate.classification import NUM_BINS, Classification, mcnemar
from finetune.evaluate.intervals import bootstrap_intervals, paired_ratio_interval, wilson_interval

WHO = ("base", "adapter")


def with_interval(value: float, interval: Sequence[float] | None) -> dict[str, Any]:
    """A figure as it stands in summary.json; an interval of None: one row, so resampling it says nothing."""
    return {"value": float(value), "interval": None if interval is None else [float(end) for end in interval]}


def compared_shares(right: Mapping[str, NDArray[np.bool_]], confidence: float) -> dict[str, Any]:
    """The share of rows that each model has right, and whether the two differ.

    Args:
        right: by `base` and `adapter`, bool [n] on the same rows.
        confidence: level of the intervals.

    Returns:
        `base` and `adapter` with Wilson's interval, their paired `difference`, and the exact `mcnemar` test.
    """
    total = len(right["base"])
    lost, gained, p_value = mcnemar(right["base"], right["adapter"])
    before, after = (right[who].astype(np.float64) for who in WHO)
    interval = paired_ratio_interval(before, after, np.ones(total), confidence) if total > 1 else None
    return {
        **{who: _share(int(right[who].sum()), total, confidence) for who in WHO},
        "difference": with_interval(after.mean() - before.mean(), interval),
        "mcnemar": {"lost": lost, "gained": gained, "p_value": p_value},
    }


def share_intervals(rows: Mapping[str, Sequence[bool]], confidence: float) -> dict[str, list[float]]:
    """Wilson's interval of the share of rows of which each thing is true."""
    return {name: list(wilson_interval(sum(found), len(found), confidence)) for name, found in rows.items()}


def label_figures(found: Mapping[str, Classification], confidence: float) -> dict[str, Any]:
    """Macro-F1, calibration and each label's own figures.

    Args:
        found: what `base` and `adapter` chose on the same rows.
        confidence: level of the intervals.

    Returns:
        `macro_f1` and `calibration_error` with their paired difference; `reliability`, of each bin rows, accuracy,
        confidence and Wilson's interval of the accuracy; `labels`, `confusion` (row: own label, column: the chosen
        one) and `per_label`, of each label how often it stands and, by model, how often it was chosen, precision,
        recall and F1 (None: nothing to measure it on).
    """
    labels, total = found["base"].labels, len(found["base"].right)

    def macro_and_each_f1(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        each = [_f1(found[who], rows) for who in WHO]
        before, after = (np.nanmean(of_labels) for of_labels in each)
        return np.concatenate([[before, after, after - before], *each])

    def calibration_errors(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        before, after = (_calibration_error(found[who], rows) for who in WHO)
        return np.array([before, after, after - before])

    everything = np.arange(total)
    f1 = bootstrap_intervals(macro_and_each_f1, total, confidence)
    calibration = bootstrap_intervals(calibration_errors, total, confidence, kind="reflected")
    calibration[:2] = calibration[:2].clip(0, 1)
    of_labels = {"base": f1[3 : 3 + len(labels)], "adapter": f1[3 + len(labels) :]}
    return {
        "macro_f1": _compared(macro_and_each_f1(everything), f1, total),
        "calibration_error": _compared(calibration_errors(everything), calibration, total),
        "reliability": {who: _reliability(found[who], confidence) for who in WHO},
        "labels": list(labels),
        "confusion": {who: found[who].confusion.tolist() for who in WHO},
        "per_label": [
            {"label": label, "rows": int((found["base"].right == number).sum())}
            | {who: _of_one_label(found[who], number, of_labels[who][number], confidence) for who in WHO}
            for number, label in enumerate(labels)
        ],
    }


def _f1(found: Classification, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """float64 [C]: F1 on some rows; NaN for labels that neither stand there nor were chosen."""
    count = len(found.labels)
    right, chosen = found.right[rows], found.chosen[rows]
    hits = np.bincount(right[right == chosen], minlength=count)
    sums = np.bincount(right, minlength=count) + np.bincount(chosen, minlength=count)
    return np.where(sums > 0, 2 * hits / np.maximum(sums, 1), np.nan)


def _calibration_error(found: Classification, rows: NDArray[np.int64]) -> float:
    """Expected calibration error on some rows."""
    gaps = found.is_right[rows] - found.confidence[rows]
    return float(np.abs(np.bincount(found.bins[rows], weights=gaps, minlength=NUM_BINS)).sum() / len(rows))


def _reliability(found: Classification, confidence: float) -> list[list[float]]:
    return [
        [rows, right, sure, *wilson_interval(round(rows * right), rows, confidence)]
        for rows, right, sure in found.reliability()
    ]


def _of_one_label(
    found: Classification, number: int, f1_interval: NDArray[np.float64], confidence: float
) -> dict[str, Any]:
    """How often a label was chosen, its precision, recall and F1."""
    own, chosen = found.right == number, found.chosen == number
    hits, stands, taken = int((own & chosen).sum()), int(own.sum()), int(chosen.sum())
    ends = f1_interval.tolist() if len(found.right) > 1 and not np.isnan(f1_interval).any() else None
    return {
        "chosen": taken,
        "precision": _share(hits, taken, confidence) if taken else None,
        "recall": _share(hits, stands, confidence) if stands else None,
        "f1": with_interval(2 * hits / (stands + taken), ends) if stands + taken else None,
    }


def _share(hits: int, total: int, confidence: float) -> dict[str, Any]:
    return with_interval(hits / total, wilson_interval(hits, total, confidence))


def _compared(values: NDArray[np.float64], ends: NDArray[np.float64], num_rows: int) -> dict[str, Any]:
    """The first three of some figures as before, after and difference."""
    return {
        name: with_interval(values[place], ends[place].tolist() if num_rows > 1 else None)
        for place, name in enumerate((*WHO, "difference"))
    }
