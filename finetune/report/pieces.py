"""What parts of an evaluation are made of; each report renders them its own way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WHO = ("base", "adapter")
TITLES = {"base": "base", "adapter": "base + adapter", "reference": "the real continuation"}
NO_VALUE = "–"


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        head: the columns' titles.
        rows: as many cells each.
        names: the first column holds texts of a person's own, such as labels.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: bool = False


@dataclass(frozen=True)
class Confusion:
    """How often each label was taken for each.

    Attributes:
        title: of which model.
        labels: C of them.
        counts: C rows (own labels) of C columns (chosen ones).
        folded: whether a page folds it away.
    """

    title: str
    labels: Sequence[str]
    counts: Sequence[Sequence[int]]
    folded: bool = False


@dataclass(frozen=True)
class Reliability:
    """Accuracy by confidence.

    Attributes:
        bins: by model, for each bin that has rows: how many, their accuracy, their mean confidence, and in newer
            summaries the ends of the accuracy's interval.
        confidence: level of those intervals.
    """

    bins: Mapping[str, Sequence[Sequence[float]]]
    confidence: float


Piece = str | Table | Confusion | Reliability
"""A string is a paragraph of Markdown without any markup but `code`."""


def figure(found: Any, form: str = ".3f") -> str:
    """A figure with its interval, or without one where none is known.

    Args:
        found: `value` and `interval`, or in older summaries a bare number; None where there is nothing to measure.
        form: how numbers are written.
    """
    if found is None:
        return NO_VALUE
    if not isinstance(found, Mapping):
        return f"{found:{form}}"
    if (interval := found.get("interval")) is None:
        return f"{found['value']:{form}}"
    return f"{found['value']:{form}} [{interval[0]:{form}}, {interval[1]:{form}}]"


def figure_row(found: Mapping[str, Any], form: str = ".3f") -> tuple[str, str, str]:
    """A figure before, after, and the difference; older summaries know some differences as bare numbers only."""
    difference = found.get("difference")
    if difference is None and not any(isinstance(found[who], Mapping) for who in WHO):
        difference = found["adapter"] - found["base"]
    return figure(found["base"], form), figure(found["adapter"], form), figure(difference, f"+{form}")


def mcnemar_in_words(found: Mapping[str, Any], what: str = "rows became right") -> str:
    """McNemar's test as a sentence."""
    return f"{found['gained']} {what} and {found['lost']} wrong (exact McNemar test: p = {found['p_value']:.2g})."
