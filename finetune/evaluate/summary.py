"""Figures with their intervals, of the base, of base + adapter and of their difference on the same rows.

Shape legend: n records, C labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.data.sources import Record
from finetune.evaluate.evalset import Suite
from finetune.evaluate.labels import own_tokens
from finetune.evaluate.measure import MeasurementLog, answered_examples
from finetune.evaluate.prose import is_refusal, prose_figures
from finetune.evaluate.statistics import (
    NUM_BINS,
    Classification,
    bootstrap_intervals,
    bootstrap_ratio_interval,
    mcnemar,
    paired_ratio_interval,
    wilson_interval,
)

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


# From figures row by row to what a person reads: before, after, the difference, and how sure one can be of it.

Rows = list[dict[str, Any]]
_MOST_CONFUSED = 8


def summarise_suite(
    suite: Suite, log: MeasurementLog, confidence: float, keep: NDArray[np.bool_] | None = None
) -> dict[str, Any]:
    """Figures of one suite.

    Args:
        suite: what was scored.
        log: with all its rows.
        confidence: level of the intervals.
        keep: bool [n], rows that count, with all rows of a record or none. None: all.

    Returns:
        `rows` and how many `records` they are of, which intervals resample; `loss` and, for a label set, `accuracy`
        (likelihood of the whole answer) and `accuracy_per_token`, each with `base`, `adapter`, `difference` and their
        intervals; for labels also McNemar's test and what `figures.label_figures` gives. With one record no interval,
        but for shares.
    """
    chosen = [n for n in range(len(suite.rows.samples)) if keep is None or keep[n]]
    by_who = {who: [log.rows["score", who, suite.name, n] for n in chosen] for who in WHO}
    nll = {who: np.array([row["nll"] for row in rows]) for who, rows in by_who.items()}
    weight = np.array([row["weight"] for row in by_who["base"]])
    sums = {who: suite.rows.by_record(nll[who], chosen) for who in WHO}
    weights = suite.rows.by_record(weight, chosen)
    figures: dict[str, Any] = {
        "suite": suite.name,
        "rows": len(chosen),
        "records": len(weights),
        "loss": _loss(sums, weights, confidence),
    }
    figures["perplexity"] = {who: _exponential(figures["loss"][who]) for who in WHO}
    if suite.rows.labels is not None:
        labelled = [n for n in chosen if n in suite.rows.labelled_examples]
        scored = {who: [log.rows["score", who, suite.name, n] for n in labelled] for who in WHO}
        figures |= _labels(suite, scored, labelled, confidence)
    return figures


def _labels(suite: Suite, by_who: Mapping[str, Rows], chosen: Sequence[int], confidence: float) -> dict[str, Any]:
    labels = suite.rows.labels
    assert labels is not None
    right = np.array([labels.index(suite.rows.records[n].answer or "") for n in chosen])
    scores = {who: np.array([row["labels"] for row in rows]) for who, rows in by_who.items()}
    figures: dict[str, Any] = {
        "num_labels": len(labels),
        "best_constant": float(np.bincount(right).max() / len(right)),
    }
    shared = {who: np.array([row["shared_nats"] for row in rows]) for who, rows in by_who.items()}
    for name, tokens in (("accuracy", None), ("accuracy_per_token", own_tokens(labels))):
        found = {
            who: Classification.of(labels, scores[who], right, None if tokens is None else (shared[who], tokens))
            for who in WHO
        }
        figures[name] = compared_shares({who: found[who].is_right for who in WHO}, confidence)
        if name == "accuracy":
            figures |= label_figures(found, confidence)
            figures["most_confused"] = found["adapter"].most_confused(_MOST_CONFUSED)
    return figures


def _loss(nll: Mapping[str, NDArray[np.float64]], weight: NDArray[np.float64], confidence: float) -> dict[str, Any]:
    several = len(weight) > 1
    difference = paired_ratio_interval(nll["base"], nll["adapter"], weight, confidence) if several else None
    return {
        who: with_interval(
            nll[who].sum() / weight.sum(),
            bootstrap_ratio_interval(nll[who], weight, confidence) if several else None,
        )
        for who in WHO
    } | {"difference": with_interval((nll["adapter"] - nll["base"]).sum() / weight.sum(), difference)}


def summarise_answers(
    suite: Suite, log: MeasurementLog, count: int, train: Sequence[Record] | None, confidence: float
) -> dict[str, Any]:
    """Figures of generated answers.

    Args:
        suite: whose rows were answered.
        log: with the answers.
        count: how many were asked for.
        train: training records, for what was copied and for whose voice it is; None if they are not known, and then
            these figures are left out.
        confidence: level of the intervals.

    Returns:
        By `base` and `adapter`: how many stopped, were cut, broke harmony's form or refused, with `intervals` of their
        shares. For the `exact_rows` rows with an answer `exact`, the share that equals it, paired and tested like
        accuracy; for the `prose_rows` without one how varied they are, what was copied, whose voice they have.
    """
    numbers = answered_examples(suite.rows, count)
    records = [suite.rows.records[n] for n in numbers]
    rows = {who: [log.rows["text", who, suite.name, n] for n in numbers] for who in WHO}
    figures: dict[str, Any] = {
        "suite": suite.name,
        "rows": len(numbers),
        **{who: _form(rows[who], confidence) for who in WHO},
    }
    exact = [n for n, record in enumerate(records) if record.answer is not None]
    prose = [n for n, record in enumerate(records) if record.answer is None]
    figures |= {"exact_rows": len(exact), "prose_rows": len(prose)}
    if exact:
        same = {who: np.array([_is_exact(rows[who][n], records[n]) for n in exact]) for who in WHO}
        figures["exact"] = compared_shares(same, confidence)
    if prose:
        texts = {who: [rows[who][n]["final"] for n in prose] for who in WHO}
        texts["reference"] = [records[n].messages[-1].content for n in prose]
        figures["prose"] = prose_figures(texts, [records[n] for n in prose], train)
    return figures


def _form(rows: Rows, confidence: float) -> dict[str, Any]:
    found = {
        "stopped": [row["stopped"] for row in rows],
        "cut": [not row["stopped"] for row in rows],
        "format_errors": [row["error"] is not None for row in rows],
        "refusals": [is_refusal(row["final"]) for row in rows],
    }
    intervals = share_intervals(found, confidence)
    lengths = np.array([row["tokens"] for row in rows], dtype=np.float64)
    if len(rows) > 1:
        intervals["mean_tokens"] = list(bootstrap_ratio_interval(lengths, np.ones(len(rows)), confidence))
    return {
        **{name: sum(each) for name, each in found.items()},
        "mean_tokens": float(lengths.mean()),
        "intervals": intervals,
    }


def _exponential(loss: Mapping[str, Any]) -> dict[str, Any]:
    """Perplexity: exp of a loss, and of the ends of its interval."""
    ends = loss["interval"]
    return with_interval(_exp(loss["value"]), None if ends is None else [_exp(end) for end in ends])


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _is_exact(row: Mapping[str, Any], record: Record) -> bool:
    """Whether a generated answer equals the record's; one in a broken form does not."""
    return row["error"] is None and _plain(row["final"]) == _plain(record.answer or "")


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")
