"""What an evaluation says of a label set: figures, what was mixed up, each label's own figures, and calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetune.report.pieces import (
    TITLES,
    WHO,
    Confusion,
    Piece,
    Reliability,
    Table,
    figure,
    figure_row,
    mcnemar_in_words,
)
from finetune.report.words import code

Suite = Mapping[str, Any]
FIGURES = {
    "accuracy": "accuracy",
    "accuracy_per_token": "accuracy, likelihood per token",
    "macro_f1": "macro-F1",
    "calibration_error": "expected calibration error",
}


def label_content(suite: Suite, confidence: float) -> tuple[list[Piece], list[Piece]]:
    """What is read first, and the details: of which labels and of which confidence.

    Args:
        suite: one of a summary's suites, with `accuracy`.
        confidence: level of the intervals.
    """
    rows = [(title, *figure_row(suite[key])) for key, title in FIGURES.items() if key in suite]
    first: list[Piece] = [
        f"{suite['num_labels']} labels scored by likelihood; always giving the most frequent one is right for "
        f"{suite['best_constant']:.3f} of the rows.",
        Table(("", *figure_titles()), rows),
        mcnemar_in_words(suite["accuracy"]["mcnemar"]),
    ]
    if suite.get("most_confused"):
        pairs = (
            f"{code(own)} taken for {code(got)} {count} time{'s' * (count != 1)}"
            for own, got, count in suite["most_confused"]
        )
        first.append(f"Most often mixed up by base + adapter: {'; '.join(pairs)}.")
    details: list[Piece] = []
    if "reliability" in suite:
        details.append(Reliability(suite["reliability"], confidence))
    confusion = _confusions(suite)
    for who, when in (("adapter", "after"), ("base", "before")):
        if who in confusion:
            title = f"Confusion table {when} ({TITLES[who]})"
            details.append(Confusion(title, suite["labels"], confusion[who], folded=who == "base"))
    details += _each_label(suite, confusion)
    return first, details


def figure_titles() -> tuple[str, str, str]:
    """Titles of the columns that `figure_row` fills."""
    return TITLES["base"], TITLES["adapter"], "difference"


def _confusions(suite: Suite) -> Mapping[str, Sequence[Sequence[int]]]:
    """By model; older summaries hold that of base + adapter alone."""
    found = suite.get("confusion") or {}
    return found if isinstance(found, Mapping) else {"adapter": found}


def _each_label(suite: Suite, confusion: Mapping[str, Sequence[Sequence[int]]]) -> list[Piece]:
    """Precision, recall and F1 of each label, before and after."""
    per_label = suite.get("per_label") or _older_labels(suite, confusion)
    if not per_label:
        return []
    head = ["label", "rows"]
    for name in ("chosen", "F1", "precision", "recall"):
        head += [f"{name} before", f"{name} after"]
    rows = [
        (
            each["label"],
            str(each["rows"]),
            *(str(each[who].get("chosen", "–")) for who in WHO),
            *(figure(each[who].get(name), ".2f") for name in ("f1", "precision", "recall") for who in WHO),
        )
        for each in per_label
    ]
    note = (
        "Label by label, before (base) and after (base + adapter). Precision: of the rows that were given the label, "
        "how many have it; recall: of the rows that have it, how many were given it. A label with few rows has a wide "
        "interval."
    )
    return [note, Table(head, rows, names=True)]


def _older_labels(suite: Suite, confusion: Mapping[str, Sequence[Sequence[int]]]) -> list[dict[str, Any]]:
    """The same without intervals, from a confusion table; of a model without one, F1 alone."""
    if "adapter" not in confusion:
        return []
    table, f1 = confusion["adapter"], suite.get("f1") or {}
    found = []
    for number, label in enumerate(suite["labels"]):
        hits, rows, chosen = table[number][number], sum(table[number]), sum(line[number] for line in table)
        after = {"chosen": chosen, "f1": 2 * hits / (rows + chosen) if rows + chosen else None}
        after |= {"precision": hits / chosen if chosen else None, "recall": hits / rows if rows else None}
        before = {"f1": f1["base"][number]} if "base" in f1 else {}
        found.append({"label": label, "rows": rows, "base": before, "adapter": after})
    return found
