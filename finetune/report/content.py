"""Small pieces of text that reports share."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


def code(text: str) -> str:
    """Text of a person's own as code, whatever stands in it."""
    line = " ".join(text.split())
    if "`" not in line:
        return f"`{line}`"
    fence = "`" * (max(map(len, re.findall("`+", line))) + 1)
    return f"{fence} {line} {fence}"


def summary(manifest: dict[str, Any], evaluation: dict[str, Any]) -> str:
    """What a run did, in a few sentences of Markdown."""
    status = manifest.get("status", "unknown")
    parts = [f"Recipe {code(manifest.get('recipe', '?'))}, status: **{status}**."]
    if stopped := manifest.get("stopped_by"):
        parts.append(f"It was stopped by {code(stopped)}.")
    if "minutes" in manifest:
        parts.append(f"Took {manifest['minutes']} minutes and at most {manifest['peak_memory_gib']} GiB.")
    if "after" in evaluation:
        before, after = evaluation["before"], evaluation["after"]
        parts.append(f"Test loss went from {before['loss']:.3f} to {after['loss']:.3f} nats per trained token.")
        if "accuracy" in after:
            parts.append(f"Accuracy went from {before['accuracy']:.3f} to {after['accuracy']:.3f}.")
    return " ".join(part for part in parts if part)


def with_interval(figures: dict[str, Any], key: str) -> str:
    """A figure with its interval, which stands beside it in evaluation.json; one row has none."""
    if (interval := figures[f"{key}_interval"]) is None:
        return f"{figures[key]:.3f} (one row: no interval)"
    return f"{figures[key]:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def check_lines(manifest: dict[str, Any]) -> list[str]:
    """What was checked, as items of a Markdown list."""
    lines = [f"- {line}" for line in manifest.get("audit") or []]
    match manifest.get("read_back"):
        case {"skipped": reason}:
            lines.append(f"- **not read back** with stock PEFT: {reason}")
        case {"conclusive": False, "effect_kl": effect, "mean_kl": found}:
            lines.append(
                f"- read back by stock PEFT, **inconclusive**: the adapter changes so little (KL {effect:.1e}) that "
                f"ignoring it would hardly show (KL {found:.1e} found)"
            )
        case {"max_difference": difference, "effect": effect, "samples": samples}:
            lines.append(
                f"- read back by stock PEFT in a fresh process: logits differ by {difference:.1e} at most on {samples} "
                f"samples (the adapter itself moves them by {effect:.1f})"
            )
    if "adapter_of_step" in manifest:
        lines.append(f"- the adapter is the one of step {manifest['adapter_of_step']} (best validation loss)")
    return lines


# What parts of an evaluation are made of; each report renders them its own way.

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


# What an evaluation says of a label set: figures, what was mixed up, each label's own figures, and calibration.

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


# What `finetune evaluate` found, as titled parts of text, tables and drawings that every report renders its own way.
#
# Summaries of older versions lack keys, or hold a bare number where a newer one has an interval beside it: such a
# figure is shown without one.

Summary = Mapping[str, Any]
_ANSWERS = {
    "stopped": "stopped by themselves",
    "cut": "cut at the longest length",
    "format_errors": "broke harmony's form",
    "refusals": "refused",
    "mean_tokens": "mean tokens",
}
_PROSE = {
    "distinct_1": "distinct words / words",
    "distinct_2": "distinct pairs / pairs",
    "longest_copy_words": "longest run of words copied from training",
    "median_copy_words": "median of that",
    "own_author": "taken for its own author",
    "own_author_balanced": "the same, mean over authors",
    "empty": "empty texts",
    "refusals": "begin like a refusal",
}


@dataclass(frozen=True)
class Part:
    """A titled part of the report.

    Attributes:
        title: plain text.
        content: what is shown.
        details: long tables and drawings; left out on a terminal.
        folded: whether a page folds the details away.
    """

    title: str
    content: Sequence[Piece]
    details: Sequence[Piece] = ()
    folded: bool = False


def introduction(summary: Summary) -> str:
    """Whose figures they are and what their intervals mean, as Markdown."""
    base = summary.get("base", {})
    return (
        f"Base {code(str(base.get('name', '?')))}, identity {code(str(base.get('identity', '?'))[:16])}. Both saw the "
        f"same rows; intervals are {summary.get('confidence', 0.95):.0%}, differences are paired row by row."
    )


def evaluation_parts(summary: Summary) -> list[Part]:
    """Everything a `summary.json` holds, in the order in which it is read."""
    suites = summary.get("suites") or []
    parts = [Part("To know before reading", list(notes))] if (notes := summary.get("notes")) else []
    if suites:
        parts.append(_losses(suites))
    for suite in suites:
        if "accuracy" in suite:
            shown, details = label_content(suite, summary.get("confidence", 0.95))
            parts.append(Part(f"Labels: {_name(suite)}", shown, details, folded=suite["suite"] != "test"))
    if (contamination := summary.get("contamination")) is not None:
        parts.append(_contamination(contamination))
    if (answers := summary.get("answers")) is not None:
        parts.append(_answers(answers))
    return parts


def _name(suite: Summary) -> str:
    return "test" if suite["suite"] == "test" else f"retention: {suite['suite']}"


def _losses(suites: Sequence[Summary]) -> Part:
    rows = [
        (
            f"{_name(suite)} ({suite['rows']})",
            *figure_row(suite["loss"])[:3],
            *(figure(suite["perplexity"][who], ".4g") for who in WHO),
        )
        for suite in suites
    ]
    head = ("rows", "base", "base + adapter", "difference", "perplexity, base", "perplexity, base + adapter")
    content: list[Piece] = [Table(head, rows)]
    if any(suite.get("records", suite["rows"]) == 1 for suite in suites):
        content.append("One row or record alone has no interval: nothing tells how another would have come out.")
    if len(suites) > 1:
        content.append("Retention rows are of domains that were not trained on: a rise there is what was forgotten.")
    return Part("Loss, nats per trained token", content)


def _contamination(found: Summary) -> Part:
    copies = f" ({found['copies']} are copies of one)" if "copies" in found else ""
    content: list[Piece] = [
        f"{found['seen']} of {found['rows']} test rows have half or more of their 13-word runs in the training rows"
        f"{copies}; {found['touched']} have any; {found['too_short']} are too short to tell."
    ]
    if (without := found.get("without_seen")) is not None:
        titles = {"loss": "loss", **FIGURES}
        rows = [(title, *figure_row(without[key])) for key, title in titles.items() if key in without]
        content += [f"Without the seen ones, on {without['rows']} rows:", Table(("", *figure_titles()), rows)]
    return Part("Seen in training", content)


def _answers(found: Summary) -> Part:
    total = found["rows"]
    rows = [
        (title, *(_answer_cell(found[who], key, total) for who in WHO), "")
        for key, title in _titled(found["base"], _ANSWERS)
    ]
    # Older summaries hold the share of each model alone.
    exact = found.get("exact") or {who: found[who]["exact"] for who in WHO if "exact" in found[who]}
    if exact:
        of_rows = f" ({found['exact_rows']} rows)" if "exact_rows" in found else ""
        rows.append((f"equal to the answer{of_rows}", *figure_row(exact)))
    content: list[Piece] = [Table(("", *figure_titles()), rows)]
    if "intervals" in found["base"]:
        content.append("Behind a count stands the interval of its share of the rows.")
    if "mcnemar" in exact:
        content.append(f"Equal to the answer: {mcnemar_in_words(exact['mcnemar'])}")
    if (prose := found.get("prose")) is not None:
        content.append(_prose(prose, found.get("prose_rows", total)))
        if (authors := prose.get("authors")) is not None:
            content.append(_voices(authors))
    return Part(f"Generated answers ({total} rows)", content)


def _answer_cell(found: Summary, key: str, total: int) -> str:
    """A count of rows or a mean, with its interval where the summary has one."""
    value, interval = found.get(key), found.get("intervals", {}).get(key)
    if value is None:
        return NO_VALUE
    if isinstance(value, int):
        return str(value) if interval is None else f"{value} of {total} [{interval[0]:.0%}, {interval[1]:.0%}]"
    return figure({"value": value, "interval": interval}, ".0f")


def _prose(prose: Summary, num_rows: int) -> Table:
    columns = [who for who in (*WHO, "reference") if who in prose]
    rows = [
        (title, *(figure(prose[who].get(key), ".4g") for who in columns))
        for key, title in _titled(prose["base"], _PROSE)
    ]
    return Table((f"prose ({num_rows} rows)", *(TITLES[who] for who in columns)), rows)


def _voices(authors: Summary) -> str:
    return (
        f"Voices: {authors['known']} authors are known from training. Always naming the same one is right for at most "
        f"{authors['largest_share']:.3f} of the rows, and for {1 / authors['known']:.3f} as a mean over authors. "
        f"Rows of unknown authors, which do not count: {authors['unknown_rows']}."
    )


def _titled(found: Summary, titles: Mapping[str, str]) -> list[tuple[str, str]]:
    """Keys of figures with what they are called: those of a table first, in its order, then any other number."""
    others = [key for key, value in found.items() if key not in titles and key != "exact" and _is_figure(value)]
    return [(key, title) for key, title in titles.items() if key in found] + [
        (key, key.replace("_", " ")) for key in others
    ]


def _is_figure(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Mapping) and "value" in value)
