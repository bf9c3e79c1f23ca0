"""report.md of a run that is finished, still going, stopped, or died in the middle of a line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from finetune.figures import Comparison, Figure
from finetune.log import printable
from finetune.markdown import code, escaped
from finetune.report.content import Table, plain, unescaped
from finetune.report.markdown import _table, outcome, write_report
from finetune.results import BaseName, Evaluation, SuiteFigures, perplexity, to_json

MANIFEST: dict[str, Any] = {
    "recipe": "quickstart",
    "overrides": ["name=a"],
    "base": {"name": "openai/gpt-oss-20b", "revision": "abc123", "identity": "f" * 64, "storage": []},
    "data": {
        "train": {"rows": 4369, "tokens": 1234567, "trained_tokens": 30000, "skipped_rows": 2, "fingerprint": "e" * 64}
    },
    "adapter_parameters": {"attention": 1000, "experts": 2000000},
    "total_steps": 40,
    "environment": {"python": "3.11.9", "device": "cpu"},
    "status": "running",
}
ENDING: dict[str, Any] = {
    "status": "finished",
    "audit": ["audit: every B has a gradient"],
    "minutes": 4.25,
    "peak_memory_gib": 1.5,
    "adapter_of_step": 30,
    "read_back": {"max_difference": 1.2e-5, "mean_kl": 0.0, "base_difference": 1e-6, "effect": 3.25, "samples": 4},
}
LOSS = Comparison(Figure(2.5, (2.25, 2.75)), Figure(0.5, (0.4, 0.6)))
ACCURACY = Comparison(Figure(0.1, (0.05, 0.2)), Figure(0.7, (0.65, 0.75)))


def evaluation(loss: Comparison = LOSS, accuracy: Comparison | None = ACCURACY) -> str:
    """Content of evaluation.json."""
    labels = {"num_labels": 24, "best_constant": 0.099, "accuracy": accuracy} if accuracy else {}
    test = SuiteFigures("test", 300, 300, loss, perplexity(loss), **labels)
    return json.dumps(to_json(Evaluation("adapter", BaseName("b", "f" * 64), 0.95, [], {}, [test], None, None)))


# The same in the form of version 0.1.
FIGURES = {"rows": 300, "loss": 2.5, "loss_interval": [2.25, 2.75], "confidence": 0.95}
BEFORE = FIGURES | {
    "accuracy": 0.1, "accuracy_interval": [0.05, 0.2], "num_labels": 24, "best_constant_accuracy": 0.099,
}  # fmt: skip
AFTER = BEFORE | {"loss": 0.5, "loss_interval": [0.4, 0.6], "accuracy": 0.7, "accuracy_interval": [0.65, 0.75]}


def metrics_line(step: int) -> str:
    figures = {"epoch": 0, "loss": 3.0 - step / 20, "balance_loss": 1.01, "learning_rate": 2e-4, "gradient_norm": 0.5}
    more = {"tokens": 2048, "trained_tokens": 20, "tokens_per_second": 12345.6, "memory_gib": 1.5}
    return json.dumps({"kind": "step", "step": step, **figures, **more}) + "\n"


def evaluation_line(step: int, loss: float) -> str:
    return json.dumps({"kind": "evaluation", "step": step, "validation_loss": loss}) + "\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run."""
    directory = tmp_path / "quickstart-1"
    directory.mkdir()
    (directory / "manifest.json").write_text(json.dumps(MANIFEST | ENDING))
    (directory / "evaluation.json").write_text(evaluation())
    validations = evaluation_line(30, 0.75) + evaluation_line(40, 0.875)
    (directory / "metrics.jsonl").write_text("".join(map(metrics_line, range(1, 41))) + validations)
    return directory


def report_of(run: Path) -> str:
    path = write_report(run)
    assert path == run / "report.md"
    return path.read_text()


def test_a_finished_run(run: Path) -> None:
    text = report_of(run)
    for expected in (
        "# Run quickstart-1",
        "Recipe `quickstart`, status: **finished**.",
        "Took 4.25 minutes and at most 1.5 GiB.",
        "Test loss went from 2.500 to 0.500 nats per trained token. Accuracy went from 0.100 to 0.700.",
        "| test loss (nats per trained token) | 2.500 [2.250, 2.750] | 0.500 [0.400, 0.600] |",
        "| label accuracy | 0.100 [0.050, 0.200] | 0.700 [0.650, 0.750] |",
        "300 test examples, 95% intervals; labels scored by likelihood among 24",
        "most frequent one scores 0.099",
        "Validation loss: 0.7500 (step 30), 0.8750 (step 40); best at step 30.",
        "| 1 | 2.9500 | 1.010 | 0.500 | 2.00e-04 | 12,346 | 1.50 |",
        "- audit: every B has a gradient",
        "logits differ by 1.2e-05 at most on 4 examples (the adapter itself moves them by 3.2)",
        "- the adapter is the one of step 30 (best validation loss)",
        "- base: `openai/gpt-oss-20b`, revision abc123, identity `ffffffffffffffff`",
        "- data, train: 4,369 examples, 1,234,567 tokens, 30,000 trained, 2 skipped",
        "- trained parameters: attention 1,000, experts 2,000,000",
        "overrides on the command line: `name=a`.",
    ):
        assert expected in text
    assert "stopped" not in text


def test_terms_of_an_objective_are_shown_by_name(run: Path) -> None:
    assert "memory GiB | rewards" not in report_of(run)
    lines = [json.loads(metrics_line(step)) | {"rewards/margins": step / 8} for step in range(1, 41)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = report_of(run)
    assert "memory GiB | rewards/margins |" in text and "| 12,346 | 1.50 | 0.1250 |" in text


def test_an_evaluation_of_version_0_1_is_reported_alike(run: Path) -> None:
    now, terminal = report_of(run), outcome(run)
    (run / "evaluation.json").write_text(json.dumps({"before": BEFORE, "after": AFTER}))
    assert report_of(run) == now and outcome(run) == terminal
    (run / "evaluation.json").write_text(json.dumps({"before": FIGURES | {"loss_interval": None}}))
    assert "| 2.500 (one record: no interval) |" in report_of(run)


def test_the_curve_is_thinned_and_ends_with_the_last_step(run: Path) -> None:
    rows = [line for line in report_of(run).splitlines() if line.startswith("| ") and line[2].isdigit()]
    steps = [int(row.split("|")[1]) for row in rows]
    assert steps[0] == 1 and steps[-1] == 40 and steps == sorted(set(steps)) and len(steps) <= 16


def test_the_last_lines_on_the_terminal(run: Path) -> None:
    assert outcome(run).splitlines() == [
        "finished in 4.25 minutes, at most 1.5 GiB",
        "  test loss  2.500 [2.250, 2.750] -> 0.500 [0.400, 0.600]",
        "  accuracy   0.100 [0.050, 0.200] -> 0.700 [0.650, 0.750]",
        f"  report     {run / 'report.html'}",
        f"  adapter    {run / 'adapter'}",
        f'  next       finetune generate {run} "..."; finetune export {run} --to peft',
    ]


def test_without_labels_and_without_a_test_set(run: Path) -> None:
    (run / "evaluation.json").write_text(evaluation(accuracy=None))
    assert "accuracy" not in report_of(run).lower() and "accuracy" not in outcome(run)
    (run / "evaluation.json").unlink()
    assert "Before and after" not in report_of(run)
    assert "test loss" not in outcome(run)


def test_a_running_run(run: Path) -> None:
    (run / "manifest.json").write_text(json.dumps(MANIFEST | {"stopped_by": None}))
    (run / "evaluation.json").write_text(evaluation(Comparison(LOSS.base), Comparison(ACCURACY.base)))
    (run / "metrics.jsonl").write_text(metrics_line(1))
    text = report_of(run)
    assert "status: **running**" in text and "stopped" not in text and "Took" not in text
    assert "| label accuracy | 0.100 [0.050, 0.200] |\n" in text
    assert "| 1 | 2.9500 |" in text and "Checks" not in text


def test_a_stopped_run(run: Path) -> None:
    stopped = {"status": "stopped", "stopped_by": "Interrupted: stopped after step 3", "audit": [], "minutes": 1.0}
    (run / "manifest.json").write_text(json.dumps(MANIFEST | stopped | {"peak_memory_gib": 1.0}))
    text = report_of(run)
    assert "status: **stopped**. It was stopped by `Interrupted: stopped after step 3`." in text


def test_a_run_that_died_in_the_middle_of_a_line(run: Path) -> None:
    whole = "".join(map(metrics_line, range(1, 4)))
    (run / "metrics.jsonl").write_bytes((whole + metrics_line(4)[:40]).encode())
    assert "| 3 | 2.8500 |" in report_of(run) and "| 4 |" not in report_of(run)
    (run / "metrics.jsonl").write_bytes(whole.encode() + b"\x00\xff\xfe{")
    assert "| 3 | 2.8500 |" in report_of(run)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"status": "fin', "null", "{}", '{"suites": [1]}'])
def test_half_written_json_is_left_out(run: Path, content: str) -> None:
    for name in ("manifest.json", "evaluation.json"):
        (run / name).write_text(content)
    assert "status: **unknown**" in report_of(run)


def test_an_empty_run_directory(tmp_path: Path) -> None:
    text = report_of(tmp_path)
    assert "status: **unknown**" in text and "No step was made yet." in text


def test_a_missing_read_back_is_emphasised(run: Path) -> None:
    (run / "manifest.json").write_text(json.dumps(MANIFEST | ENDING | {"read_back": {"skipped": "no memory"}}))
    assert "**not read back** with stock PEFT: no memory" in report_of(run)


def test_text_of_the_user_stays_text(run: Path) -> None:
    hostile = MANIFEST | {"overrides": ["name=`x`|<b>", "a=**b**"], "recipe": "``odd\nname", "stopped_by": "E: a*b*c"}
    (run / "manifest.json").write_text(json.dumps(hostile))
    text = report_of(run)
    assert "`` name=`x`|<b> ``, `a=**b**`" in text
    assert "Recipe ``` ``odd name ```, status" in text
    assert "stopped by `E: a*b*c`" in text


HOSTILE = "<script>alert(1)</script> [a](http://x) ![b](y) **c** `d` |e| # f_g_ \x1b[31m \\"


def test_data_text_is_escaped_and_comes_back() -> None:
    text = escaped(HOSTILE + "\n- item")
    assert "\n" not in text and "\x1b" not in text
    for mark in ("<", "[", "]", "*", "`", "|", "#", "!"):
        assert text.count(mark) == text.count(f"\\{mark}") > 0, mark
    assert plain(text) == printable(" ".join((HOSTILE + "\n- item").split()))
    assert escaped("_a_ max_length") == "\\_a\\_ max_length"
    assert [escaped(each) for each in ("- a", "+ a", "1. a", "a - b")] == ["\\- a", "\\+ a", "1\\. a", "a - b"]
    assert unescaped(text) == printable(" ".join((HOSTILE + "\n- item").split()))
    table = _table(Table(("label", "n"), [("a|b \\| <c>", "1")], names=True))
    assert table.endswith("| `a\\|b \\\\| <c>` | 1 |") and _table(Table(("", "n"), [("<c>|", "1")])).endswith(
        "| \\<c\\>\\| | 1 |"
    )
    assert code("") == "`(empty)`" and "\x1b" not in code("\x1b[31m")


def test_text_of_the_data_stays_text_in_a_report(run: Path) -> None:
    line = f"1 record with text that spells another model's template, first {HOSTILE} in x.jsonl:1: as text"
    data = {name: split | {"control_text": [line]} for name, split in MANIFEST["data"].items()}
    skipped = {"read_back": {"skipped": HOSTILE}}
    (run / "manifest.json").write_text(json.dumps(MANIFEST | ENDING | {"data": data} | skipped))
    text = report_of(run)
    assert "**data, train**: 1 record with text" in text
    assert not re.search(r"(?<!\\)<script>|(?<!\\)\[a\]|(?<!\\)!\\?\[b", text) and "\x1b" not in text
