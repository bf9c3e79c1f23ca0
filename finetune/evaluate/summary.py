"""From figures row by row to what a person reads: before, after, the difference, and how sure one can be of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.data.sources import Record
from finetune.evaluate.classification import Classification
from finetune.evaluate.compare import answered_rows
from finetune.evaluate.figures import WHO, compared_shares, label_figures, share_intervals, with_interval
from finetune.evaluate.intervals import bootstrap_ratio_interval, paired_ratio_interval
from finetune.evaluate.labels import own_tokens
from finetune.evaluate.prose import prose_figures
from finetune.evaluate.refusals import is_refusal
from finetune.evaluate.row_log import RowLog
from finetune.evaluate.testset import Suite

Rows = list[dict[str, Any]]
_MOST_CONFUSED = 8


def summarise_suite(
    suite: Suite, log: RowLog, confidence: float, keep: NDArray[np.bool_] | None = None
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
        labelled = [n for n in chosen if n in suite.rows.labelled_rows]
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
    suite: Suite, log: RowLog, count: int, train: Sequence[Record] | None, confidence: float
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
    numbers = answered_rows(suite.rows, count)
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
