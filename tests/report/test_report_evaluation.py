"""`finetune evaluate`'s summary in README.md and report.html: every figure, whatever version wrote it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix
from test_report_html import ATTACK, checked

from finetune.evaluate.statistics import Classification
from finetune.evaluate.summary import compared_shares, label_figures, share_intervals, with_interval
from finetune.report.content import figure
from finetune.report.content import with_interval as in_words
from finetune.report.html import evaluation_html, write_html
from finetune.report.markdown import describe_evaluation
from finetune.report.reliability import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, reliability_diagram, reliability_rows

OLDER = Path(__file__).parents[1] / "fixtures" / "evaluation_summary_older.json"
LABELS = (ATTACK, "a|b", *(f"Clause of kind {number}" for number in range(22)))
WHO = ("base", "adapter")


@pytest.fixture(scope="module")
def models() -> dict[str, Classification]:
    rng = np.random.default_rng(0)
    right = rng.integers(24, size=90)
    found = {}
    for who, strength in (("base", 0.5), ("adapter", 3.0)):
        scores = rng.normal(size=(90, 24))
        scores[np.arange(90), right] += strength
        found[who] = Classification.of(LABELS, scores, right)
    return found


@pytest.fixture(scope="module")
def summary(models: dict[str, Classification]) -> dict[str, Any]:
    """Of this version, with a figure under every key and all figures different."""
    shares = compared_shares({who: each.is_right for who, each in models.items()}, 0.9)
    loss = {who: with_interval(n + 1.25, (n + 1.125, n + 1.5)) for n, who in enumerate((*WHO, "difference"))}
    test = {"suite": "test", "rows": 90, "loss": loss, "num_labels": 24, "best_constant": 0.0777, "accuracy": shares}
    test["perplexity"] = {who: with_interval(n + 33.5, (n + 31.5, n + 36.5)) for n, who in enumerate(WHO)}
    test |= {"accuracy_per_token": shares, **label_figures(models, 0.9), "most_confused": [(ATTACK, "a|b", 7)]}
    forms = {key: [True] * n + [False] * 8 for n, key in enumerate(("stopped", "cut", "format_errors", "refusals"), 1)}
    form = {key: sum(rows) for key, rows in forms.items()} | {"mean_tokens": 17.0}
    form["intervals"] = share_intervals(forms, 0.9) | {"mean_tokens": [11.0, 23.0]}
    prose = {"distinct_1": 0.4321, "longest_copy_words": 13, "a_newer_figure": 0.8642}
    plain_text = {"suite": "plain text", "rows": 5, "loss": loss, "perplexity": test["perplexity"]}
    return {
        "adapter": ATTACK, "base": {"name": "tiny", "identity": "0123456789abcdef00"}, "confidence": 0.9,
        "suites": [test, test | {"suite": "legal"}, plain_text],
        "contamination": {"rows": 90, "seen": 11, "touched": 12, "too_short": 13, "without_seen": test | {"rows": 79}},
        "answers": {"rows": 12, "base": form, "adapter": form | {"refusals": 0}, "exact": shares,
                    "prose": {who: prose for who in (*WHO, "reference")}
                    | {"authors": {"known": 4, "largest_share": 0.6125, "unknown_rows": 3}}},
    }  # fmt: skip


def page_of(summary: dict[str, Any], run: Path) -> Any:
    (run / "evaluation").mkdir(parents=True, exist_ok=True)
    (run / "evaluation" / "summary.json").write_text(json.dumps(summary))
    return checked(write_html(run))


def figures_in(content: Any) -> Iterator[dict[str, Any]]:
    """Everything with a value and an interval, at any depth."""
    if isinstance(content, dict) and "value" in content:
        yield content
    elif isinstance(content, (dict, list)):
        for each in content.values() if isinstance(content, dict) else content:
            yield from figures_in(each)


def test_every_figure_with_its_interval_is_on_the_page_and_in_the_readme(
    summary: dict[str, Any], tmp_path: Path
) -> None:
    page, readme = page_of(summary, tmp_path).text, describe_evaluation(summary)
    assert "cannot be made" not in page
    assert len(list(figures_in(summary))) > 200
    for found in figures_in(summary):
        shown = {figure(found, form) for form in (".3f", "+.3f", ".2f", ".4g")}
        for text in (page, readme):
            assert any(each in text for each in shown), found
    for text in (page, readme):
        for words in (
            "2 of 12 [",
            "17 [11, 23]",
            "0.8642",
            "a newer figure",
            "11 of 90",
            "on 79 rows",
            "0.078 of the",
            "0.613 of the",
        ):
            assert words in text
        assert "taken for" in text and "7 times" in text and text.count("exact McNemar") == 3


def test_hostile_labels_stay_text(summary: dict[str, Any], tmp_path: Path) -> None:
    page = page_of(summary, tmp_path)
    assert {tag for tag, _ in page.tags} & {"script", "img"} == set()
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    rows = [line for line in describe_evaluation(summary).splitlines() if "`a|b`" in line.replace("\\|", "|")]
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

    def handle_data(self, data: str) -> None:
        if self.style is not None:
            self.cells[-1].append((data, self.style))


def test_the_heat_table_holds_the_confusion_table(summary: dict[str, Any], models: dict[str, Classification]) -> None:
    table = HeatTable(evaluation_html(summary))
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


def test_the_readmes_confusion_table_is_the_same(summary: dict[str, Any], models: dict[str, Classification]) -> None:
    text = describe_evaluation(summary).partition("### Confusion table before (base)")[2].partition("Label by")[0]
    rows = [line.split(" | ")[1:] for line in text.splitlines() if re.match(r"\| \d+\. `", line)]
    expected = confusion_matrix(models["base"].right, models["base"].chosen, labels=range(24))
    assert [[int(cell.strip(" |")) for cell in row] for row in rows] == expected.tolist()


def test_the_reliability_diagram_puts_dots_where_they_belong() -> None:
    bins = {"base": [(25, 0.0, 0.0), (75, 1.0, 1.0)], "adapter": [(100, 0.25, 0.5, 0.125, 0.5)]}
    svg = reliability_diagram("<b>", bins)
    dots = re.findall(r'<circle class="(\w+)" cx="([\d.]+)" cy="([\d.]+)" r="([\d.]+)"', svg)
    places = [(who, float(x), float(y)) for who, x, y, _ in dots]
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    assert places == [
        ("base", LEFT, TOP + height), ("base", LEFT + width, TOP), ("adapter", LEFT + width / 2, TOP + height * 0.75),
    ]  # fmt: skip
    assert [float(r) for *_, r in dots] == sorted(float(r) for *_, r in dots)  # more rows, larger dots
    (span,) = re.findall(r'class="adapter span" x1="[\d.]+" y1="([\d.]+)" x2="[\d.]+" y2="([\d.]+)"', svg)
    assert [float(end) for end in span] == pytest.approx([TOP + height * 0.875, TOP + height * 0.5], abs=0.06)
    assert "<b>" not in svg and reliability_diagram("t", {"base": []}) == ""
    assert reliability_rows(bins["base"])[1] == ("0.9 to 1.0", "75", "1.000", "1.000")
    assert reliability_rows(bins["adapter"])[0] == ("0.5 to 0.6", "100", "0.500", "0.250 [0.125, 0.500]")


def test_a_summary_of_an_older_version_is_shown_without_what_it_lacks(tmp_path: Path) -> None:
    older = json.loads(OLDER.read_text())
    page, readme = page_of(older, tmp_path).text, describe_evaluation(older)
    for text in (page, readme):
        for words in ("-2.138 [-2.208, -2.071]", "237.5", "0.277", "-0.170", "no taken for yes 169 times", "0.875"):
            assert words in text.replace("`", "")
        assert "0.000 [" in text and "nan" not in text
    assert "cannot be made" not in page and "Confusion table after" in page and "Confusion table before" not in page
    yes = next(line for line in readme.splitlines() if line.startswith("| `yes`"))
    assert yes == "| `yes` | 276 | – | 500 | 0.71 | 0.71 | – | 0.55 | – | 1.00 |"


def test_one_row_is_said_to_have_no_interval(summary: dict[str, Any]) -> None:
    alone = {who: with_interval(2.5, None) for who in (*WHO, "difference")}
    suite = {"suite": "test", "rows": 1, "loss": alone, "perplexity": {who: alone[who] for who in WHO}}
    text = describe_evaluation(summary | {"suites": [suite], "contamination": None, "answers": None})
    assert "| test (1) | 2.500 | 2.500 | +2.500 | 2.5 | 2.5 |" in text and "alone has no interval" in text
    assert "alone has no" not in describe_evaluation(summary)
    assert in_words({"loss": 2.5, "loss_interval": None}, "loss") == "2.500 (one row: no interval)"


def test_the_terminal_is_spared_the_long_tables(summary: dict[str, Any]) -> None:
    short = describe_evaluation(summary, details=False)
    assert "exact McNemar" in short and "Confusion table" not in short and "Label by label" not in short
    assert len(short) < len(describe_evaluation(summary)) / 3
