"""From figures row by row to what a person reads: before, after, the difference, and how sure one can be of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.data.sources import Record
from finetune.evaluate.classification import Classification, mcnemar
from finetune.evaluate.compare import WHO, answered_rows
from finetune.evaluate.intervals import bootstrap_ratio_interval, paired_ratio_interval, wilson_interval
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
        keep: bool [n], rows that count. None: all.

    Returns:
        `rows`; `loss` and, for a label set, `accuracy` (likelihood of the whole answer) and `accuracy_per_token`, each
        with `base`, `adapter`, `difference` and their intervals; for labels also macro-F1, calibration, the confusion
        table after, and McNemar's test.
    """
    chosen = [n for n in range(len(suite.rows.samples)) if keep is None or keep[n]]
    by_who = {who: [log.rows["score", who, suite.name, n] for n in chosen] for who in WHO}
    nll = {who: np.array([row["nll"] for row in rows]) for who, rows in by_who.items()}
    weight = np.array([row["weight"] for row in by_who["base"]])
    figures: dict[str, Any] = {
        "suite": suite.name,
        "rows": len(chosen),
        "loss": {
            who: _with_interval(nll[who].sum() / weight.sum(), bootstrap_ratio_interval(nll[who], weight, confidence))
            for who in WHO
        },
    }
    difference = float((nll["adapter"] - nll["base"]).sum() / weight.sum())
    figures["loss"]["difference"] = _with_interval(
        difference, paired_ratio_interval(nll["base"], nll["adapter"], weight, confidence)
    )
    figures["perplexity"] = {who: _exponential(figures["loss"][who]["value"]) for who in WHO}
    if suite.rows.labels is not None:
        figures |= _labels(suite, by_who, chosen, confidence)
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
        figures[name] = _accuracy(found, confidence)
        if name == "accuracy":
            figures["macro_f1"] = {who: found[who].macro_f1 for who in WHO}
            figures["calibration_error"] = {who: found[who].calibration_error for who in WHO}
            figures["reliability"] = {who: found[who].reliability() for who in WHO}
            figures["labels"] = list(labels)
            figures["f1"] = {who: found[who].f1.tolist() for who in WHO}
            figures["confusion"] = found["adapter"].confusion.tolist()
            figures["most_confused"] = found["adapter"].most_confused(_MOST_CONFUSED)
    return figures


def _accuracy(found: Mapping[str, Classification], confidence: float) -> dict[str, Any]:
    right = {who: found[who].is_right for who in WHO}
    ones = np.ones(len(right["base"]))
    lost, gained, p_value = mcnemar(right["base"], right["adapter"])
    as_numbers = {who: right[who].astype(np.float64) for who in WHO}
    return {
        **{
            who: _with_interval(
                found[who].accuracy, wilson_interval(int(right[who].sum()), len(right[who]), confidence)
            )
            for who in WHO
        },
        "difference": _with_interval(
            found["adapter"].accuracy - found["base"].accuracy,
            paired_ratio_interval(as_numbers["base"], as_numbers["adapter"], ones, confidence),
        ),
        "mcnemar": {"lost": lost, "gained": gained, "p_value": p_value},
    }


def summarise_answers(suite: Suite, log: RowLog, count: int, train: Sequence[Record]) -> dict[str, Any]:
    """Figures of generated answers.

    Args:
        suite: whose rows were answered.
        log: with the answers.
        count: how many were asked for.
        train: training records, for what was copied and for whose voice it is.

    Returns:
        By `base` and `adapter`: how many stopped, were cut, broke harmony's form or refused; for rows with an answer
        the share that equals it; for prose (rows without one) how varied it is, what was copied, whose voice it has.
    """
    numbers = answered_rows(suite.rows, count)
    records = [suite.rows.records[n] for n in numbers]
    rows = {who: [log.rows["text", who, suite.name, n] for n in numbers] for who in WHO}
    figures: dict[str, Any] = {"suite": suite.name, "rows": len(numbers), **{who: _form(rows[who]) for who in WHO}}
    if all(record.answer is not None for record in records):
        for who in WHO:
            same = [_is_exact(row, record) for row, record in zip(rows[who], records, strict=True)]
            figures[who]["exact"] = sum(same) / len(same)
        return figures
    texts = {who: [row["final"] for row in rows[who]] for who in WHO}
    texts["reference"] = [record.messages[-1].content for record in records]
    return figures | {"prose": prose_figures(texts, records, train)}


def _form(rows: Rows) -> dict[str, Any]:
    return {
        "stopped": sum(row["stopped"] for row in rows),
        "cut": sum(not row["stopped"] for row in rows),
        "format_errors": sum(row["error"] is not None for row in rows),
        "refusals": sum(is_refusal(row["final"]) for row in rows),
        "mean_tokens": sum(row["tokens"] for row in rows) / len(rows),
    }


def _with_interval(value: float, interval: tuple[float, float]) -> dict[str, Any]:
    return {"value": float(value), "interval": list(interval)}


def _exponential(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _is_exact(row: Mapping[str, Any], record: Record) -> bool:
    """Whether a generated answer equals the record's; one in a broken form does not."""
    return row["error"] is None and _plain(row["final"]) == _plain(record.answer or "")


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")
