"""Records of compensated rounding: their form on disk, and layers that survive an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.rounding.merge import Tally
from finetune.rounding.results import ROUNDED, ExpertReport, LayerResult, RoundedExperts

GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"
# As v0.1.0 wrote them into export.json.
ROUNDED_V010: dict[str, Any] = {
    "expert": 3, "rows": 40, "state": "rounded", "borrowed": True, "singular": False,
    "wanted": 0.25, "amplification": 1.5, "projection": 0.99, "error": 0.4,
}  # fmt: skip
UNTOUCHED_V010: dict[str, Any] = {"expert": 4, "rows": 0, "state": "untouched: no calibration row reached it"}


@pytest.mark.parametrize("record", [ROUNDED_V010, UNTOUCHED_V010])
def test_reports_are_read_and_written_as_before(record: dict[str, Any]) -> None:
    report = ExpertReport.from_json(record)
    assert json.dumps(report.as_json()) == json.dumps(record)
    assert (report.expert, report.tokens, report.is_rounded) == (record["expert"], record["rows"], "wanted" in record)


def result() -> LayerResult:
    blocks = torch.arange(24, dtype=torch.uint8).reshape(4, 6)
    tallies = {f"{GATE_UP}_blocks": Tally(wanted=2.0, kept=1.0, values=24, checksum=5)}
    reports = [
        ExpertReport(expert=0, tokens=9, state="untouched: no update"),
        ExpertReport(expert=1, tokens=9, state=ROUNDED, singular=True, projection=0.5),
        ExpertReport(expert=2, tokens=2, state=ROUNDED, borrowed=True, projection=1.0),
    ]
    return LayerResult({f"{GATE_UP}_blocks": blocks}, tallies, {GATE_UP: reports})


def test_a_finished_layer_is_found_again(tmp_path: Path) -> None:
    first = RoundedExperts.beside(tmp_path / "out", "key")
    first.add(1, result())
    again = RoundedExperts.beside(tmp_path / "out", "key")
    assert again.has(1) and not again.has(0)
    assert again.tallies == first.tallies == result().tallies and again.experts == first.experts == result().experts
    assert torch.equal(again.read(f"{GATE_UP}_blocks"), result().tensors[f"{GATE_UP}_blocks"])
    assert again.read_experts(f"{GATE_UP}_blocks", 1, 3).tolist() == [[6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17]]
    again.discard()
    assert not list(tmp_path.iterdir())


def test_a_damaged_layer_and_layers_of_another_export_are_made_again(tmp_path: Path) -> None:
    first = RoundedExperts.beside(tmp_path / "out", "key")
    first.add(1, result())
    path = first.directory.path / "layer-001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert not RoundedExperts.beside(tmp_path / "out", "key").has(1)
    first.add(1, result())
    other = RoundedExperts.beside(tmp_path / "out", "another key")
    assert not other.has(1) and not other.tallies and not path.exists()


def test_only_unusual_experts_are_named(tmp_path: Path) -> None:
    rounded = RoundedExperts.beside(tmp_path / "out", "key")
    rounded.add(1, result())
    assert rounded.describe() == [
        f"{GATE_UP}: untouched: no update: experts 0",
        f"{GATE_UP}: rounded with more damping: singular moments: experts 1",
        f"{GATE_UP}: rounded with moments shrunk to the layer's: few tokens: experts 2",
    ]
    assert rounded.progress(1) == "layer 1: mean projection 0.750 of 2 expert matrices"
    assert rounded.progress(0) == "layer 0"
