"""What `finetune evaluate` found, as titled parts of text, tables and drawings that every report renders its own way.

Summaries of older versions lack keys, or hold a bare number where a newer one has an interval beside it: such a figure
is shown without one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.report.label_parts import FIGURES, figure_titles, label_content
from finetune.report.pieces import NO_VALUE, TITLES, WHO, Piece, Table, figure, figure_row, mcnemar_in_words
from finetune.report.words import code

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
