"""The report's section on merges to MXFP4: its table and figure against the figures of the export."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from finetune.report.html import write_html
from finetune.report.markdown import write_report
from finetune.report.survival import read_survival, survival_section, survival_svg


def figures(gain_kept: float, kl_removed: float) -> dict[str, Any]:
    interval = [gain_kept - 0.01, gain_kept + 0.01]
    return {"loss": 1.5, "kl": 0.25, "gain_kept": gain_kept, "gain_kept_interval": interval, "kl_removed": kl_removed}


def facts(kept: bool = True) -> dict[str, Any]:
    variants = {
        "base": figures(0.0, 0.0),
        "adapter": figures(1.0, 1.0),
        "nearest": figures(0.002, 0.01),
        "nearest, ceil scales": figures(1.5, -0.56),
        "compensated": figures(0.971, 0.89),
    }
    end_to_end = {"rows": 40, "split": "test", "confidence": 0.95, "gain": 0.5, "variants": variants}
    verdict = {"kept": kept, "reasons": [] if kept else ["it keeps too little"], "notes": ["old data"]}
    overall = {"update": 0.01, "outputs": {"projection": 0.99, "error": 0.45}}
    return {"rounding": "compensated", "overall": overall, "end_to_end": end_to_end | {"verdict": verdict}}


def test_the_table_and_the_verdict_are_in_the_report(tmp_path: Path) -> None:
    (tmp_path / "survival-mxfp4.json").write_text(json.dumps(facts()))
    (tmp_path / "survival-gguf.json").write_text(json.dumps(facts(kept=False)))
    text = write_report(tmp_path).read_text()
    assert "| compensated | 1.5000 | 97.1% [96%, 98%] | 2.50e-01 | 89.0% |" in text
    assert "**Kept**. Old data." in text and "**Lost**: it keeps too little." in text
    assert "](survival-mxfp4.svg)" in text and (tmp_path / "survival-gguf.svg").exists()


def test_the_page_has_both_merges_with_table_figure_and_weights(tmp_path: Path) -> None:
    weights = {"layers.0.gate_up": {"update": 0.01, "survival": 0.25, "error": 5.0}}
    (tmp_path / "survival-mxfp4.json").write_text(json.dumps(facts() | {"tensors": weights}))
    (tmp_path / "survival-<b>.json").write_text(json.dumps(facts(kept=False)))
    page = write_html(tmp_path).read_text()
    assert "<td>compensated</td>" in page and "97.1% [96%, 98%]" in page and "<td>layers.0.gate_up</td>" in page
    assert "Kept. Old data." in page and "Lost: it keeps too little." in page and "**" not in page
    assert "<h3>&lt;b&gt;</h3>" in page
    figures = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert len(figures) == 2
    for figure in figures:
        root = ElementTree.fromstring(base64.b64decode(figure))
        assert float(root.get("width", "0")) > 300  # without its own size a browser shows a picture of no width


def test_missing_and_damaged_files_are_left_out(tmp_path: Path) -> None:
    assert survival_section(read_survival(tmp_path), tmp_path) == ""
    (tmp_path / "survival-mxfp4.json").write_text('{"rounding": "near')
    assert survival_section(read_survival(tmp_path), tmp_path) == ""
    skipped = facts() | {"end_to_end": {"skipped": "no rows"}}
    (tmp_path / "survival-mxfp4.json").write_text(json.dumps(skipped))
    assert "Not measured end to end: no rows." in survival_section(read_survival(tmp_path), tmp_path)
    assert not (tmp_path / "survival-mxfp4.svg").exists()


def test_bars_are_as_long_as_their_numbers() -> None:
    root = ElementTree.fromstring(survival_svg(facts()["end_to_end"], "compensated"))
    space = "{http://www.w3.org/2000/svg}"
    bars = [rect for rect in root.iter(f"{space}rect") if rect.get("height") == "11"]
    widths = [float(bar.get("width", "0")) for bar in bars]
    assert len(bars) == 6  # two for each variant that is neither end
    assert widths[4] / widths[2] == pytest.approx(0.971 / 1.5, rel=1e-3)
    zero = float(bars[2].get("x", "0"))
    assert float(bars[3].get("x", "0")) + widths[3] == pytest.approx(zero) and widths[3] > 0  # below zero: to the left
    bold = [text.text for text in root.iter(f"{space}text") if text.get("font-weight") == "bold"]
    assert bold == ["compensated"]
