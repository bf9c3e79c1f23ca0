"""Results of `finetune evaluate` in README.md and report.html: every figure, escaped, drawn where it belongs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix
from test_report_html import ATTACK, checked

from finetune.evaluate.statistics import Classification, wilson_interval
from finetune.evaluate.summary import compare_shares, with_label_figures
from finetune.figures import Comparison, Figure, Model
from finetune.report.charts import DIAGRAM, reliability_diagram
from finetune.report.content import reliability_rows
from finetune.report.html import write_html
from finetune.report.markdown import describe_evaluation
from finetune.results import (
    AnswerFigures,
    AuthorFigures,
    BaseName,
    ContaminationFigures,
    Evaluation,
    FormFigures,
    ProseFigures,
    ReliabilityBin,
    SuiteFigures,
    TextFigures,
    to_json,
)

LABELS = (ATTACK, "a|b", *(f"Clause of kind {number}" for number in range(22)))


@pytest.fixture(scope="module")
def models() -> dict[Model, Classification]:
    rng = np.random.default_rng(0)
    right = rng.integers(24, size=90)
    found: dict[Model, Classification] = {}
    strengths: dict[Model, float] = {"base": 0.5, "adapter": 3.0}
    for model, strength in strengths.items():
        scores = rng.normal(size=(90, 24))
        scores[np.arange(90), right] += strength
        found[model] = Classification.of(LABELS, scores, right)
    return found


@pytest.fixture(scope="module")
def results(models: dict[Model, Classification]) -> Evaluation:
    """An evaluation with every figure, and all figures different."""
    shares = compare_shares({model: each.is_right for model, each in models.items()}, 0.9)
    loss = Comparison(*(Figure(n + 1.25, (n + 1.125, n + 1.5)) for n in range(3)))
    perplexity = Comparison(*(Figure(n + 33.5, (n + 31.5, n + 36.5)) for n in range(2)))
    test = SuiteFigures("test", 90, 90, loss, perplexity, num_labels=24, best_constant=0.0777, accuracy=shares)
    test = replace(with_label_figures(test, models, 0.9), accuracy_per_token=shares, most_confused=[(ATTACK, "a|b", 7)])
    counts = {key: n for n, key in enumerate(("stopped", "cut", "format_errors", "refusals"), 1)}
    intervals = {key: wilson_interval(n, n + 8, 0.9) for key, n in counts.items()} | {"mean_tokens": (11.0, 23.0)}
    form = FormFigures(**counts, mean_tokens=17.0, intervals=intervals)
    text = TextFigures(0.4321, 0.8642, 0, 0, longest_copy_words=13)
    return Evaluation(
        adapter=ATTACK,
        base=BaseName("tiny", "0123456789abcdef00"),
        confidence=0.9,
        notes=[],
        left_out={},
        suites=[test, replace(test, suite="legal"), SuiteFigures("plain text", 5, 5, loss, perplexity)],
        contamination=ContaminationFigures(90, 11, 12, 2, 13, [], without_seen=replace(test, rows=79)),
        answers=AnswerFigures(
            "test", 12, form, replace(form, refusals=0), 12, 4, exact=shares,
            prose=ProseFigures(text, text, text, AuthorFigures(known=4, largest_share=0.6125, unknown_rows=3)),
        ),
    )  # fmt: skip


def page_of(results: Evaluation, run: Path) -> Any:
    (run / "evaluation").mkdir(parents=True, exist_ok=True)
    (run / "evaluation" / "summary.json").write_text(json.dumps(to_json(results)))
    return checked(write_html(run))


def figures_in(content: Any) -> Iterator[dict[str, Any]]:
    """Everything with a value and an interval, at any depth."""
    if isinstance(content, dict) and "value" in content:
        yield content
    elif isinstance(content, (dict, list)):
        for each in content.values() if isinstance(content, dict) else content:
            yield from figures_in(each)


def test_every_figure_with_its_interval_is_on_the_page_and_in_the_readme(results: Evaluation, tmp_path: Path) -> None:
    page, readme = page_of(results, tmp_path).text, describe_evaluation(results)
    assert "cannot be made" not in page
    assert len(list(figures_in(to_json(results)))) > 200
    for found in figures_in(to_json(results)):
        figure = Figure(found["value"], tuple(found["interval"]))
        shown = {figure.text(form) for form in (".3f", "+.3f", ".2f", ".4g")}
        for text in (page, readme):
            assert any(each in text for each in shown), found
    for text in (page, readme):
        for words in (
            "2 of 12 [",
            "17 [11, 23]",
            "0.8642",
            "11 of 90",
            "on 79 examples",
            "0.078 of the",
            "0.613 of the",
        ):
            assert words in text
        assert "taken for" in text and "7 times" in text and text.count("exact McNemar") == 3


def test_hostile_labels_stay_text(results: Evaluation, tmp_path: Path) -> None:
    page = page_of(results, tmp_path)
    assert {tag for tag, _ in page.tags} & {"script", "img"} == set()
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    rows = [line for line in describe_evaluation(results).splitlines() if "`a|b`" in line.replace("\\|", "|")]
    in_tables = [line for line in rows if line.startswith("| ")]
    assert in_tables and all("a\\|b" in line for line in in_tables)


class HeatTable(HTMLParser):
    """The cells and headings of the first heat table."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.cells: list[list[tuple[str, str]]] = []
        self.scopes: list[str] = []
        self.style: str | None = None
        self.feed(html[html.index('<table class="heat">') :].partition("</table>")[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.cells.append([])
        self.style = (dict(attrs).get("style") or "") if tag == "td" else None
        self.scopes += [str(value) for name, value in attrs if name == "scope"]

    def handle_endtag(self, tag: str) -> None:
        self.style = None

    def handle_data(self, data: str) -> None:
        if self.style is not None:
            self.cells[-1].append((data, self.style))


def test_the_heat_table_holds_the_confusion_table(
    results: Evaluation, models: dict[Model, Classification], tmp_path: Path
) -> None:
    table = HeatTable(page_of(results, tmp_path).source)
    after = models["adapter"]
    expected = confusion_matrix(after.right, after.chosen, labels=range(24))
    assert [[int(text) for text, _ in row] for row in table.cells[1:]] == expected.tolist()
    assert table.scopes.count("col") == table.scopes.count("row") == 24
    for number, row in enumerate(table.cells[1:]):
        for column, (_, style) in enumerate(row):
            if share := expected[number, column] / max(1, expected[number].sum()):
                colour, alpha = ("31 111 235" if number == column else "200 50 35"), 0.6 * share
                assert style == f"background:rgb({colour} / {alpha:.2f})"
            else:
                assert style == ""


def test_the_readmes_confusion_table_is_the_same(results: Evaluation, models: dict[Model, Classification]) -> None:
    text = describe_evaluation(results).partition("### Confusion table before (base)")[2].partition("Label by")[0]
    rows = [line.split(" | ")[1:] for line in text.splitlines() if re.match(r"\| \d+\. `", line)]
    expected = confusion_matrix(models["base"].right, models["base"].chosen, labels=range(24))
    assert [[int(cell.strip(" |")) for cell in row] for row in rows] == expected.tolist()


def test_the_reliability_diagram_puts_dots_where_they_belong() -> None:
    base = [ReliabilityBin(25, 0.0, 0.0, 0.0, 0.25), ReliabilityBin(75, 1.0, 1.0, 0.75, 1.0)]
    adapter = [ReliabilityBin(100, 0.25, 0.5, 0.125, 0.5)]
    svg = reliability_diagram("<b>", {"base": base, "adapter": adapter})
    dots = re.findall(r'<circle class="(\w+)" cx="([\d.]+)" cy="([\d.]+)" r="([\d.]+)"', svg)
    places = [(model, float(x), float(y)) for model, x, y, _ in dots]
    left, top = DIAGRAM.left, DIAGRAM.top
    width, height = DIAGRAM.width - left - DIAGRAM.right, DIAGRAM.height - top - DIAGRAM.bottom
    assert places == [
        ("base", left, top + height), ("base", left + width, top), ("adapter", left + width / 2, top + height * 0.75),
    ]  # fmt: skip
    assert [float(r) for *_, r in dots] == sorted(float(r) for *_, r in dots)  # more rows, larger dots
    (span,) = re.findall(r'class="adapter span" x1="[\d.]+" y1="([\d.]+)" x2="[\d.]+" y2="([\d.]+)"', svg)
    assert [float(end) for end in span] == pytest.approx([top + height * 0.875, top + height * 0.5], abs=0.06)
    assert "<b>" not in svg and reliability_diagram("t", {"base": []}) == ""
    assert reliability_rows(base)[1] == ("0.9 to 1.0", "75", "1.000", "1.000 [0.750, 1.000]")
    assert reliability_rows(adapter)[0] == ("0.5 to 0.6", "100", "0.500", "0.250 [0.125, 0.500]")


def test_one_record_is_reported_without_intervals(results: Evaluation) -> None:
    alone = Figure(2.5, None)
    suite = SuiteFigures("test", 1, 1, Comparison(alone, alone, alone), Comparison(alone, alone))
    text = describe_evaluation(replace(results, suites=[suite], contamination=None, answers=None))
    assert "| test (1) | 2.500 | 2.500 | +2.500 | 2.5 | 2.5 |" in text and "alone has no interval" in text
    assert "alone has no" not in describe_evaluation(results)
    assert alone.headline() == "2.500 (one record: no interval)"


def test_the_evaluation_of_a_training_run_is_on_the_page(results: Evaluation, tmp_path: Path) -> None:
    """It has one set, and nothing that compares both models: those columns are left out."""
    test = results.suites[0]
    loss = Comparison(test.loss.base, test.loss.adapter)
    assert test.accuracy is not None
    accuracy = Comparison(test.accuracy.base, test.accuracy.adapter)
    own = SuiteFigures("test", 90, 90, loss, test.perplexity, num_labels=24, best_constant=0.0777, accuracy=accuracy)
    trained = replace(results, suites=[own], contamination=None, answers=None)
    (tmp_path / "evaluation.json").write_text(json.dumps(to_json(trained)))
    page = checked(write_html(tmp_path)).text
    assert loss.base and loss.base.text() in page and accuracy.adapter and accuracy.adapter.text() in page
    assert "difference" not in page and "McNemar" not in page and "cannot be made" not in page


def test_long_tables_are_left_out_on_the_terminal(results: Evaluation) -> None:
    short = describe_evaluation(results, details=False)
    assert "exact McNemar" in short and "Confusion table" not in short and "Label by label" not in short
    assert len(short) < len(describe_evaluation(results)) / 3
