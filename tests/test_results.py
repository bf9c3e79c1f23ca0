"""The record of an evaluation: written and read back, version 0.1's evaluation.json, and damaged files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from finetune.errors import InputError
from finetune.figures import Comparison, Figure, McNemar
from finetune.results import (
    BaseName,
    Evaluation,
    ReliabilityBin,
    SuiteFigures,
    parse_evaluation,
    perplexity,
    read_evaluation,
    to_json,
)

LOSS = Comparison(Figure(2.5, (2.25, 2.75)), Figure(0.5, None), Figure(-2.0, (-2.5, -1.5)))
SHARES = Comparison(Figure(0.1, (0.0, 0.2)), Figure(0.7, (0.6, 0.8)), Figure(0.6, None), McNemar(1, 9, 0.02))
BEFORE = {
    "rows": 300, "loss": 2.5, "loss_interval": [2.25, 2.75], "confidence": 0.95,
    "accuracy": 0.1, "accuracy_interval": [0.0, 0.2], "num_labels": 24, "best_constant_accuracy": 0.099,
}  # fmt: skip
AFTER = BEFORE | {"loss": 0.5, "loss_interval": None, "accuracy": 0.7, "accuracy_interval": [0.6, 0.8]}


def evaluation(*suites: SuiteFigures) -> Evaluation:
    return Evaluation("adapter", BaseName("base", "f" * 64), 0.95, ["a note"], {"skipped": 1}, list(suites), None, None)


def full() -> Evaluation:
    bins = {"base": [ReliabilityBin(3, 0.5, 0.75, 0.25, 1.0)], "adapter": []}
    confusion = {"base": [[1, 2], [3, 4]], "adapter": [[5, 6], [7, 8]]}
    return evaluation(
        SuiteFigures(
            "test", 4, 3, LOSS, perplexity(LOSS), num_labels=2, accuracy=SHARES, reliability=bins, confusion=confusion,
            most_confused=[("a", "b", 2)],
        )
    )  # fmt: skip


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(to_json(full())))
    assert read_evaluation(path) == full()
    assert read_evaluation(tmp_path / "missing.json") is None


def test_optional_keys_are_left_out_and_others_are_null() -> None:
    content = to_json(full())
    suite = content["suites"][0]
    assert "macro_f1" not in suite and "mcnemar" not in suite["loss"] and "difference" not in suite["perplexity"]
    assert suite["loss"]["adapter"]["interval"] is None and content["contamination"] is content["answers"] is None


def test_perplexity_is_the_exponential_and_never_overflows() -> None:
    found = perplexity(Comparison(Figure(2.0, (1.0, 3.0)), Figure(800.0, None)))
    assert found.base == Figure(math.exp(2.0), (math.exp(1.0), math.exp(3.0)))
    assert found.adapter == Figure(math.inf, None) and found.difference is None


def test_evaluation_json_of_version_0_1_is_translated() -> None:
    test = parse_evaluation({"before": BEFORE, "after": AFTER}).test
    assert test is not None and (test.rows, test.num_labels, test.best_constant) == (300, 24, 0.099)
    assert test.loss == Comparison(LOSS.base, LOSS.adapter)
    assert test.accuracy == Comparison(SHARES.base, SHARES.adapter)
    assert test.perplexity == perplexity(LOSS)
    unfinished = parse_evaluation(
        {"before": {key: BEFORE[key] for key in ("rows", "loss", "loss_interval", "confidence")}}
    )
    assert unfinished.has("base") and not unfinished.has("adapter")
    assert [title for title, _ in unfinished.headlines()] == ["test loss"] and unfinished.final("test loss") is None


def test_the_adapter_is_added_to_a_measured_base() -> None:
    base = SuiteFigures(
        "test", 4, 3, Comparison(LOSS.base), perplexity(Comparison(LOSS.base)), accuracy=Comparison(SHARES.base)
    )
    loss = Comparison(adapter=LOSS.adapter)
    adapter = SuiteFigures("test", 4, 3, loss, perplexity(loss), accuracy=Comparison(adapter=SHARES.adapter))
    both = evaluation().updated("base", base).updated("adapter", adapter)
    assert both.test is not None and both.test.loss == Comparison(LOSS.base, LOSS.adapter)
    assert both.test.accuracy == Comparison(SHARES.base, SHARES.adapter) and both.final("accuracy") == 0.7
    again = both.updated("adapter", base)
    assert not again.has("adapter") and again.has("base")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", "null", '{"before": {"rows": 3}}', '{"before": [1]}', '{"suites": [{"suite": "test"}]}'],
)
def test_damaged_files_are_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"evaluation\.json"):
        read_evaluation(path)
