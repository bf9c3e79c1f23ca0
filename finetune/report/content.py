"""Content of an evaluation: titled parts of text, tables and drawings, which each report renders in its own form."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from finetune.figures import MODELS, Comparison, Figure, McNemar, Model, PairFigures
from finetune.markdown import code, escaped
from finetune.results import (
    AnswerFigures,
    AuthorFigures,
    ContaminationFigures,
    Evaluation,
    FormFigures,
    LabelFigures,
    ProseFigures,
    ReliabilityBin,
    SuiteFigures,
    TextFigures,
)

TITLES: Mapping[str, str] = {"base": "base", "adapter": "base + adapter", "reference": "the real continuation"}
NO_VALUE = "–"
NUM_BINS = 10
_MARKS = re.compile(r"\\([!-/:-@\[-`{-~])|\*\*|`")
_MODEL_TITLES = (TITLES["base"], TITLES["adapter"], "difference")
_LABEL_FIGURES = {
    "accuracy": "accuracy",
    "accuracy_per_token": "accuracy, likelihood per token",
    "macro_f1": "macro-F1",
    "calibration_error": "expected calibration error",
}
_FORM = {
    "stopped": "stopped by themselves",
    "cut": "cut at the longest length",
    "format_errors": "broke the harmony format",
    "refusals": "refused",
    "mean_tokens": "mean tokens",
}
_PROSE = {
    "distinct_1": "distinct words / words",
    "distinct_2": "distinct pairs / pairs",
    "longest_copy_words": "words in the longest run copied from training",
    "median_copy_words": "median of that",
    "own_author": "attributed to its own author",
    "own_author_balanced": "the same, mean over authors",
    "empty": "empty texts",
    "refusals": "begin like a refusal",
}


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        head: titles of the columns.
        rows: as many cells each.
        names: the first column holds names from the user's data, such as labels.
    """

    kind: ClassVar[str] = "table"
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: bool = False


@dataclass(frozen=True)
class Confusion:
    """Confusion counts of the labels.

    Attributes:
        title: of which model.
        labels: C of them.
        counts: [C][C], a row for each true label and a column for each chosen one.
        folded: whether a page folds it away.
    """

    kind: ClassVar[str] = "confusion"
    title: str
    labels: Sequence[str]
    counts: Sequence[Sequence[int]]
    folded: bool = False


@dataclass(frozen=True)
class Reliability:
    """Accuracy by confidence, of both models, and the level of its intervals."""

    kind: ClassVar[str] = "reliability"
    bins: Mapping[Model, Sequence[ReliabilityBin]]
    confidence: float


Piece = str | Table | Confusion | Reliability
"""A string is a paragraph of Markdown without any markup but `code`."""


@dataclass(frozen=True)
class Part:
    """A titled part of a report.

    Attributes:
        title: plain text.
        content: always shown.
        details: long tables and drawings; left out on a terminal.
        folded: whether a page folds the details away.
    """

    title: str
    content: Sequence[Piece]
    details: Sequence[Piece] = ()
    folded: bool = False


def unescaped(markdown: str) -> str:
    """Markdown for a terminal: without the backslashes of `escaped`."""
    return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", markdown)


def plain(markdown: str) -> str:
    """A sentence of Markdown without its marks, and without the backslashes of `escaped`."""
    return _MARKS.sub(lambda mark: mark[1] or "", markdown)


def introduction(evaluation: Evaluation) -> str:
    """The base, and what the intervals mean, as Markdown."""
    base, test = evaluation.base, evaluation.test
    named = f"Base {code(base.name)}, identity {code(base.identity[:16])}. " if base else ""
    paired = ", differences are paired example by example" if test and test.loss.difference else ""
    return f"{named}Both were scored on the same examples; intervals are {evaluation.confidence:.0%}{paired}."


def evaluation_parts(evaluation: Evaluation) -> list[Part]:
    """All results in reading order."""
    parts = [Part("To know before reading", [escaped(note) for note in evaluation.notes])] if evaluation.notes else []
    if evaluation.suites:
        parts.append(_losses(evaluation.suites))
    parts += [_pairs(suite, suite.pairs) for suite in evaluation.suites if suite.pairs is not None]
    parts += [_labels(suite, evaluation.confidence) for suite in evaluation.suites if suite.accuracy is not None]
    if evaluation.contamination is not None:
        parts.append(_contamination(evaluation.contamination))
    if evaluation.answers is not None:
        parts.append(_answers(evaluation.answers))
    return parts


def _name(suite: SuiteFigures) -> str:
    return "test" if suite.suite == "test" else f"retention: {suite.suite}"


def _figure(found: Figure | None, form: str = ".3f") -> str:
    return NO_VALUE if found is None else found.text(form)


def _comparison(found: Comparison, form: str = ".3f") -> tuple[str, str, str]:
    """Both models' figures and their difference."""
    return _figure(found.base, form), _figure(found.adapter, form), _figure(found.difference, f"+{form}")


def _filled(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table without the columns that have no value in any row: a training run measures no paired difference."""
    kept = [n for n in range(len(head)) if any(row[n] != NO_VALUE for row in rows)]
    return Table([head[n] for n in kept], [[row[n] for n in kept] for row in rows])


def _mcnemar(found: McNemar) -> str:
    return f"{found.gained} examples became right and {found.lost} wrong (exact McNemar test: p = {found.p_value:.2g})."


def _losses(suites: Sequence[SuiteFigures]) -> Part:
    rows = [
        (
            f"{_name(suite)} ({suite.rows})",
            *_comparison(suite.loss),
            *(_figure(suite.perplexity.of(model), ".4g") for model in MODELS),
        )
        for suite in suites
    ]
    head = ("examples", *_MODEL_TITLES, *(f"perplexity, {TITLES[model]}" for model in MODELS))
    content: list[Piece] = [_filled(head, rows)]
    if any(suite.records == 1 for suite in suites):
        content.append("One record alone has no interval: another one might come out quite differently.")
    if len(suites) > 1:
        content.append("Retention sets are of domains that were not trained on: a rise there means forgetting.")
    return Part("Loss, nats per trained token", content)


def _contamination(found: ContaminationFigures) -> Part:
    content: list[Piece] = [
        f"{found.seen} of {found.rows} test records have half or more of their 13-word runs in the training records "
        f"({found.copies} are copies of one); {found.touched} have any; {found.too_short} are too short to tell."
    ]
    if (without := found.without_seen) is not None:
        rows = [("loss", *_comparison(without.loss)), *_label_rows(without)]
        content += [f"Without the seen ones, on {without.rows} examples:", Table(("", *_MODEL_TITLES), rows)]
    return Part("Seen in training", content)


def _pairs(suite: SuiteFigures, found: PairFigures) -> Part:
    """Pair accuracy beside the controls that tell what it rests on."""
    rows = [
        ("pair accuracy", *_comparison(found.accuracy)),
        ("the same, prompts shuffled among records", *_comparison(found.shuffled or Comparison())),
        ("margin, nats", *_comparison(found.margin)),
        ("reward accuracy", NO_VALUE, _figure(found.reward_accuracy), NO_VALUE),
    ]
    content: list[Piece] = [
        _filled(("", *_MODEL_TITLES), [row for row in rows if any(cell != NO_VALUE for cell in row[1:])]),
        f"{found.pairs} pairs: the better answer's log-probability is compared with the other's. The rule that the "
        f"shorter answer wins is right for {_figure(found.shorter_wins)}.",
    ]
    if found.accuracy.mcnemar is not None:
        content.append(_mcnemar(found.accuracy.mcnemar))
    return Part(f"Pairs: {_name(suite)}", content)


# Labels


def _labels(suite: SuiteFigures, confidence: float) -> Part:
    """Accuracy and calibration; the details are confusion tables and each label's figures."""
    content: list[Piece] = [
        f"{suite.num_labels} labels scored by likelihood; always giving the most frequent one is right for "
        f"{suite.best_constant:.3f} of the examples.",
        _filled(("", *_MODEL_TITLES), _label_rows(suite)),
    ]
    if suite.accuracy is not None and suite.accuracy.mcnemar is not None:
        content.append(_mcnemar(suite.accuracy.mcnemar))
    if suite.most_confused:
        pairs = (
            f"{code(own)} taken for {code(got)} {count} time{'s' * (count != 1)}"
            for own, got, count in suite.most_confused
        )
        content.append(f"Most often mixed up by base + adapter: {'; '.join(pairs)}.")
    details: list[Piece] = [Reliability(suite.reliability, confidence)] if suite.reliability else []
    if suite.confusion and suite.labels:
        after, before = suite.confusion["adapter"], suite.confusion["base"]
        details.append(Confusion("Confusion table after (base + adapter)", suite.labels, after))
        details.append(Confusion("Confusion table before (base)", suite.labels, before, folded=True))
    if suite.per_label:
        details += _each_label(suite.per_label)
    return Part(f"Labels: {_name(suite)}", content, details, folded=suite.suite != "test")


def _label_rows(suite: SuiteFigures) -> list[tuple[str, ...]]:
    found = [(title, getattr(suite, key)) for key, title in _LABEL_FIGURES.items()]
    return [(title, *_comparison(figures)) for title, figures in found if figures is not None]


def _each_label(labels: Sequence[LabelFigures]) -> list[Piece]:
    """Precision, recall and F1 of each label, before and after."""
    head = ["label", "examples"]
    for name in ("chosen", "F1", "precision", "recall"):
        head += [f"{name} before", f"{name} after"]
    rows = [
        (
            each.label,
            str(each.rows),
            *(str(each.of(model).chosen) for model in MODELS),
            *(
                _figure(getattr(each.of(model), name), ".2f")
                for name in ("f1", "precision", "recall")
                for model in MODELS
            ),
        )
        for each in labels
    ]
    note = (
        "Label by label, before (base) and after (base + adapter). Precision: of the examples that were given the "
        "label, how many have it; recall: of the examples that have it, how many were given it. A label with few "
        "examples has a wide interval."
    )
    return [note, Table(head, rows, names=True)]


def reliability_rows(bins: Sequence[ReliabilityBin]) -> list[tuple[str, str, str, str]]:
    """Each bin as texts: its range of confidence, its examples, their mean confidence and their accuracy."""
    rows = []
    for each in bins:
        number = min(int(each.confidence * NUM_BINS), NUM_BINS - 1)
        span = f"{number / NUM_BINS:.1f} to {(number + 1) / NUM_BINS:.1f}"
        accuracy = Figure(each.accuracy, (each.low, each.high)).text()
        rows.append((span, f"{each.rows:,.0f}", f"{each.confidence:.3f}", accuracy))
    return rows


# Generated answers


def _answers(found: AnswerFigures) -> Part:
    rows = [
        (title, _form_cell(found.base, key, found.rows), _form_cell(found.adapter, key, found.rows), "")
        for key, title in _FORM.items()
    ]
    if found.exact is not None:
        rows.append((f"equal to the answer ({found.exact_rows} examples)", *_comparison(found.exact)))
    content: list[Piece] = [
        Table(("", *_MODEL_TITLES), rows),
        "The interval after a count is that of its share of the examples.",
    ]
    if found.exact is not None and found.exact.mcnemar is not None:
        content.append(f"Equal to the answer: {_mcnemar(found.exact.mcnemar)}")
    if found.prose is not None:
        content.append(_prose(found.prose, found.prose_rows))
        if found.prose.authors is not None:
            content.append(_voices(found.prose.authors))
    return Part(f"Generated answers ({found.rows} examples)", content)


def _form_cell(found: FormFigures, key: str, total: int) -> str:
    """A count of answers or a mean, with its interval where there is one."""
    value, interval = getattr(found, key), found.intervals.get(key)
    if key == "mean_tokens":
        return Figure(value, interval).text(".0f")
    return f"{value} of {total}" + ("" if interval is None else f" [{interval[0]:.0%}, {interval[1]:.0%}]")


def _prose(prose: ProseFigures, num_rows: int) -> Table:
    columns: dict[str, TextFigures | None] = {
        "base": prose.base, "adapter": prose.adapter, "reference": prose.reference,
    }  # fmt: skip
    written = {writer: figures for writer, figures in columns.items() if figures is not None}
    rows = []
    for key, title in _PROSE.items():
        values = [getattr(figures, key) for figures in written.values()]
        if any(value is not None for value in values):
            rows.append((title, *(NO_VALUE if value is None else f"{value:.4g}" for value in values)))
    return Table((f"prose ({num_rows} examples)", *(TITLES[writer] for writer in written)), rows)


def _voices(authors: AuthorFigures) -> str:
    return (
        f"Voices: {authors.known} authors are known from training. Always naming the same one is right for at most "
        f"{authors.largest_share:.3f} of the examples, and for {1 / authors.known:.3f} as a mean over authors. "
        f"Examples of unknown authors, which do not count: {authors.unknown_rows}."
    )
