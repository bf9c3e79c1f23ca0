"""report.html: self-contained, escaped, and made of whatever a run directory holds."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from finetune.cli.main import main
from finetune.config.compose import compose
from finetune.config.validate import dump_yaml
from finetune.report.charts import Series, heat_map, line_chart, nice_ticks, short, smoothed, thinned
from finetune.report.html import write_html

ATTACK = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
EMPTY_TAGS = {"meta", "line", "polyline", "br", "img"}


class Checker(HTMLParser):
    """Collects tags and texts, and whether tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.source = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in EMPTY_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def checked(path: Path) -> Checker:
    checker = Checker()
    checker.source = path.read_text(encoding="utf-8")
    checker.feed(checker.source)
    assert checker.open == []
    return checker


def step(number: int, **more: Any) -> str:
    figures = {"loss": 5.0 - number / 20, "balance_loss": 1.1, "learning_rate": 1e-3, "gradient_norm": 2.0}
    line = {"kind": "step", "step": number, **figures, "tokens_per_second": 100.0, "memory_gib": 1.5}
    return json.dumps(line | more) + "\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose every text is an attack."""
    directory = tmp_path / "run-1"
    (directory / "evaluation").mkdir(parents=True)
    (directory / "config.yaml").write_text(dump_yaml(compose("quickstart", ["output_dir='<b>x</b>'"]).config))
    manifest = {
        "recipe": ATTACK, "overrides": [ATTACK], "status": "stopped", "stopped_by": ATTACK, "total_steps": 50,
        "data": {ATTACK: {"rows": 1000, "tokens": 5, "trained_tokens": 2, "skipped_rows": 0, "control_text": [ATTACK]}},
        "adapter_parameters": {"attention": 10}, "adapter_norms": {ATTACK: 1.0, "b": 0.5}, "warnings": [ATTACK],
        "environment": {"command": ATTACK}, "audit": [ATTACK], "minutes": 3.0, "peak_memory_gib": 1.5,
    }  # fmt: skip
    (directory / "manifest.json").write_text(json.dumps(manifest))
    (directory / "metrics.jsonl").write_text("".join(step(n) for n in range(1, 41)) + '{"kind": "step", "st')
    (directory / "sample.json").write_text(
        json.dumps({"where": ATTACK, "pieces": [{"text": ATTACK, "weight": 1.0}, {"text": "context", "weight": 0}]})
    )
    (directory / "figures").mkdir()
    (directory / "figures" / "experts_before.svg").write_text(f"<svg>{ATTACK}</svg>")
    answers = [
        {"measured": "text", "who": who, "suite": "test", "row": 3, "final": f"{who} {ATTACK}", "answer": ATTACK}
        for who in ("base", "adapter")
    ]
    (directory / "evaluation" / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answers))
    return directory


def test_terms_of_an_objective_are_drawn_by_name(run: Path) -> None:
    charts = write_html(run).read_text().count("<svg")
    (run / "metrics.jsonl").write_text("".join(step(n, margin=n / 8) for n in range(1, 41)))
    page = checked(write_html(run))
    assert page.source.count("<svg") == charts + 1 and "margin" in page.text


def test_nothing_from_data_reaches_the_page_unescaped(run: Path) -> None:
    (run / "metrics.jsonl").write_text("".join(step(n, **{ATTACK: n / 8}) for n in range(1, 41)))
    page = checked(write_html(run))
    assert {tag for tag, _ in page.tags} & {"script", "iframe", "link", "object"} == set()
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count("<script>alert(1)</script>") > 8  # it stands there as text
    (policy,) = [
        a["content"] for tag, a in page.tags if tag == "meta" and "content" in a and "default" in str(a["content"])
    ]
    assert "default-src 'none'" in str(policy)


def test_the_page_loads_nothing(run: Path) -> None:
    text = write_html(run).read_text()
    page = checked(run / "report.html")
    assert not any({"href", "srcset", "data"} & attributes.keys() for _, attributes in page.tags)
    sources = [str(attributes["src"]) for _, attributes in page.tags if "src" in attributes]
    assert len(sources) == 1 and sources[0].startswith("data:image/svg+xml;base64,")  # the heat map
    assert "url(" not in text and "@import" not in text


def test_it_shows_what_the_run_holds(run: Path) -> None:
    page = checked(write_html(run))
    assert any(tag == "strong" for tag, _ in page.tags) and f"{ATTACK}: {ATTACK}" in page.text, (
        "control text of the data"
    )
    assert "40 of 50" in page.text and "status: stopped" in page.text
    assert "Not at its default" in page.text and "trainer.learning_rate" in page.text and "0.005" in page.text
    assert "Example 3" in page.text and "adapter <script>" in page.text
    assert sum(tag == "polyline" for tag, _ in page.tags) == 7  # loss has two lines, five other charts one
    marked = [attributes for tag, attributes in page.tags if tag == "mark"]
    assert len(marked) == 1


@pytest.mark.parametrize(
    "broken", ["config.yaml", "manifest.json", "metrics.jsonl", "sample.json", "evaluation/rows.jsonl"]
)
@pytest.mark.parametrize("content", [None, "", '{"half', "[1, 2]", "\x00\xff: ["])
def test_missing_and_damaged_files_are_left_out(run: Path, broken: str, content: str | None) -> None:
    path = run / broken
    path.unlink() if content is None else path.write_text(content)
    page = checked(write_html(run))
    assert "Run run-1" in page.text
    if content in ('{"half', "[1, 2]") and broken in ("manifest.json", "sample.json"):
        assert f"{path.name} could not be read" in page.text


def test_a_run_of_another_version_loses_only_the_sections_that_differ(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"data": [1, 2], "adapter_parameters": None}))
    page = checked(write_html(run))
    assert page.text.count("cannot be made from the run's files") == 2
    assert "trainer.learning_rate" in page.text


def test_a_run_that_made_no_step(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    assert "No step was made yet" in checked(write_html(tmp_path)).text


def test_the_command_writes_both_and_helps_with_a_typo(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.md").is_file()
    assert main(["report", str(run.with_name("run-2"))]) == 3
    assert "run-1" in capsys.readouterr().err


def test_a_spike_survives_thinning() -> None:
    points = [(float(x), 1.0) for x in range(10_000)]
    points[7777] = (7777.0, 50.0)
    points[1234] = (1234.0, math.nan)
    kept = thinned(points, 100)
    assert len(kept) <= 110 and (7777.0, 50.0) in kept
    assert kept == sorted(kept)


def test_points_of_a_chart_agree_with_its_axis() -> None:
    svg = line_chart("t", [Series("a", [(0, 0.0), (10, 100.0)])], "step")
    (found,) = re.findall(r'points="([^"]*)"', svg)
    first, last = (tuple(map(float, pair.split(","))) for pair in found.split())
    ticks = {text: float(y) for y, text in re.findall(r'<text class="axis" x="52" y="([\d.]+)"[^>]*>([^<]*)<', svg)}
    assert first[0] < last[0] and abs(first[1] - (ticks["0"] - 4)) < 0.2 and abs(last[1] - (ticks["100"] - 4)) < 0.2
    assert line_chart("t", [Series("a", [])], "x") == ""
    assert "polyline" in line_chart("t", [Series("a", [(1, 3.0)])], "x")  # a single value has a range of its own


def test_smoothing_of_a_constant_is_the_constant() -> None:
    found = smoothed([(1, 2.0), (2, 2.0), (3, math.nan), (4, 2.0)])
    assert [x for x, _ in found] == [1, 2, 4] and [y for _, y in found] == pytest.approx([2.0] * 3)
    assert smoothed([(1, 0.0), (2, 1.0)], memory=0.5)[1][1] == pytest.approx(2 / 3)


def test_numbers_are_short() -> None:
    assert [short(x) for x in (0, 2.5, 12000, 2.5e-4, 1.5e7, -0.125)] == ["0", "2.5", "12k", "2.5e-4", "15M", "-0.125"]
    assert nice_ticks(0, 1) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert nice_ticks(5, 5)[0] < 5 < nice_ticks(5, 5)[-1]


def test_columns_of_numbers_are_right_aligned_with_their_title(tmp_path: Path) -> None:
    splits = {"a": {"rows": 1200, "tokens": 5}, "b": {"rows": 3, "tokens": 7}}
    (tmp_path / "manifest.json").write_text(json.dumps({"data": splits, "environment": {"c": "1", "d": "none"}}))
    page = checked(write_html(tmp_path)).source
    assert (
        '<th>split</th><th class="number">examples</th>' in page and '<td>a</td><td class="number">1,200</td>' in page
    )
    assert "<td>1</td>" in page  # its column has a word too


@pytest.mark.parametrize(("experts", "title"), [(8, "use of experts after training, channel context"), (128, "short")])
def test_a_heat_map_is_wide_enough_for_its_title_and_all_experts(experts: int, title: str) -> None:
    drawn = heat_map([[1.0] * experts] * 2, title=title, rows="layer", columns="expert", most=3.0)
    width = float(re.findall(r'<svg [^>]*width="(\d+)"', drawn)[0])
    cells = [float(x) + float(w) for x, w in re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="(\d+)"', drawn)]
    assert max(cells) <= width and width >= 44 + 6 * len(title)  # 6 units a letter of sans-serif at size 12
