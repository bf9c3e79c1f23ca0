"""`finetune evaluate` on odd records, another recipe, an adapter alone: notes, warnings and errors."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune import log
from finetune.cli.main import main
from finetune.evaluate import evalset, labels, measure
from finetune.evaluate import run as run_module
from finetune.evaluate.statistics import wilson_interval
from finetune.report.content import unescaped

Json = dict[str, Any]
HEAD = """# @package _global_
defaults:
  - override /model: tiny
  - override /data: own
data:
  train: {{mine: {{path: {train}}}}}
  test: {{mine: {{path: {test}}}}}
"""


def read(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, *rows: Json | str) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def summary(out: Path) -> Json:
    found: Json = json.loads((out / "summary.json").read_text())
    return found


@pytest.fixture
def run(finished: tuple[Path, str], tmp_path: Path) -> Path:
    """The finished run, to write into; it was started in another directory, which has a file of the recipe's name."""
    copy = tmp_path / "runs" / "finished"
    shutil.copytree(finished[0], copy, ignore=shutil.ignore_patterns("checkpoints"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(finished[0].parent / "train.jsonl", elsewhere / "odd.jsonl")
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"working_directory": str(elsewhere)}))
    return copy


def odd_records(workplace: Path, directory: Path) -> None:
    """Six records that are used and one that is not; the recipe trains on other records than the run did."""
    test, train = read(workplace / "test.jsonl"), read(workplace / "train.jsonl")
    two = [{"role": "user", "content": "Name a label."}, test[2]["messages"][-1]]
    long = [*test[4]["messages"][:-2], {"role": "user", "content": "a clause " * 900}, test[4]["messages"][-1]]
    write(
        directory / "odd.jsonl",
        test[0],
        test[1] | {"answer": test[1]["answer"].lower()},  # misspelt, and so not what its message says
        test[2] | {"messages": [*test[2]["messages"], *two, *two]},  # three turns
        "{",
        test[3],
        test[4] | {"messages": long},
        train[0],  # which the run was trained on
    )
    (directory / "own").mkdir()
    write(directory / "own" / "train.jsonl", *(row | {"part": str(n)} for n, row in enumerate(test[5:])))
    (directory / "odd.yaml").write_text(
        HEAD.format(train="own/train.jsonl", test="odd.jsonl")
        + "  validation_split: {key: part, share: 0.2}\n  earlier_thinking: split\n  too_long: truncate\n"
        + "  max_length: 700\n  on_bad_record: skip\n  max_skipped_ratio: 0.5\n"
        + "evaluate: {labels: auto}\n"
    )


def test_another_recipe_with_odd_records(
    run: Path, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    odd_records(workplace, here)
    monkeypatch.chdir(here)
    monkeypatch.setattr(log, "PLAIN_LINE_SECONDS", -1.0)
    monkeypatch.setattr(measure, "EXAMPLES_AT_ONCE", 2)
    monkeypatch.setattr(evalset, "SHIPPED", {"legal": evalset.SHIPPED["legal"]})
    assert main(["evaluate", str(run), "--recipe", "odd.yaml", "--retention", "1"]) == 0
    assert Path.cwd() == here and not (run / "evaluation").exists()
    found = summary(run / "evaluation-odd")
    said, readme = capsys.readouterr().err, unescaped((run / "evaluation-odd" / "README.md").read_text())
    test = found["suites"][0]
    # Six records, one of them three turns: from this directory, not from where the run was started.
    assert (test["rows"], test["records"]) == (8, 6)
    right = round(6 * test["accuracy"]["adapter"]["value"])
    assert test["accuracy"]["adapter"]["interval"] == list(wilson_interval(right, 6, 0.95))
    assert found["left_out"] == {"skipped": 1, "dropped": 0, "truncated": 1}
    notes = "\n".join(found["notes"])
    for expected in (
        "1 records of data.test were skipped and are in no figure (1 ",
        "1 records of data.test lost context to fit data.max_length (700 tokens)",
        "the 8 test examples are of 6 records",
        "1 of 6 test records have an `answer` that differs from their last message (the first: odd.jsonl:2)",
        "1 of 6 test answers occur in no training record",
        "another recipe than the run's is scored; what was trained on is the run's own data",
    ):
        assert expected in notes and expected in readme
    assert "did you mean" in said and "test: 8 examples" in said
    # The run's training rows, not the recipe's: of those the last test row is one.
    assert found["contamination"]["rows"] == 6
    assert read(workplace / "train.jsonl")[0]["id"] in found["contamination"]["seen_ids"]
    assert any(suite["suite"] == "legal" for suite in found["suites"])
    lines = re.findall(r"^test, base ([\d,]+)/([\d,]+) losses and labels", said, re.MULTILINE)
    assert {total for _, total in lines} == {"14"} and lines[-1][0] == "14"
    assert [int(done) for done, _ in lines] == sorted(int(done) for done, _ in lines)


def test_an_adapter_alone_with_records_of_two_kinds(
    run: Path, workplace: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, recipe = tmp_path / "alone", tmp_path / "mixed.yaml"
    shutil.copytree(run / "adapter", adapter)
    (adapter / "finetune.json").unlink()  # another tool's adapter: no hashes vouch for its files
    rows = read(workplace / "test.jsonl")[:3]
    del rows[1]["answer"]
    write(tmp_path / "mixed.jsonl", *rows)
    recipe.write_text(HEAD.format(train=tmp_path / "moved.jsonl", test=tmp_path / "mixed.jsonl"))
    arguments = ["evaluate", str(adapter), "--recipe", str(recipe), "--retention", "0"]
    arguments += ["--base", str(tiny_base), "--generate", "3", "--max-tokens", "2"]
    assert main(arguments) == 0
    found = summary(tmp_path / "alone-evaluation")
    notes = "\n".join(found["notes"])
    assert "labels are not scored: 1 of 3 test records have no `answer`" in notes
    assert "the adapter belongs to no run: what it was trained on is taken from the recipe" in notes
    assert "contamination and copying are not checked: the training data cannot be read (" in notes
    assert found["contamination"] is None and "accuracy" not in found["suites"][0]
    answers = found["answers"]
    assert (answers["rows"], answers["exact_rows"], answers["prose_rows"]) == (3, 2, 1)
    assert "equal to the answer" in (tmp_path / "alone-evaluation" / "README.md").read_text()
    assert "distinct_1" in answers["prose"]["base"]
    assert "longest_copy_words" not in answers["prose"]["base"]
    # Another alpha is another adapter, though its weights are the same.
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["alpha_pattern"] = {name: 2 * alpha for name, alpha in config.get("alpha_pattern", {}).items()}
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))
    assert main(arguments) == 2
    assert "it differs in adapter" in capsys.readouterr().err


def test_unanswerable_prompts_are_refused_before_anything_is_measured(
    run: Path, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def not_yet(*_: object, **__: object) -> None:
        raise AssertionError("measured already")

    monkeypatch.setattr(run_module, "measure", not_yet)
    assert main(["evaluate", str(run), "--retention", "0", "--generate", "2", "--max-tokens", "200000"]) == 2
    assert re.search(r"--max-tokens 200,000: the longest prompt has \d+ tokens", capsys.readouterr().err)
    write(tmp_path / "text.jsonl", {"text": "Once upon a time."}, {"text": "There was a clause."})
    recipe = tmp_path / "text.yaml"
    recipe.write_text(HEAD.format(train=workplace / "train.jsonl", test=tmp_path / "text.jsonl"))
    assert main(["evaluate", str(run), "--recipe", str(recipe), "--retention", "0", "--generate", "1"]) == 3
    assert "plain text, which has no prompt" in capsys.readouterr().err


def test_numbers_that_are_not_finite_are_named(
    run: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", str(run), "--retention", "0", "--examples", "2"]
    real = labels.score_groups

    def broken(model: Any, row: Any) -> Any:
        found = real(model, row)
        found[1].log_likelihood[2] = float("nan")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(labels, "score_groups", broken)
        assert main(arguments) == 6
    second = r"test\.jsonl:\d+"
    assert re.search(second + r": the log-likelihood of '\w+ \w+' is nan", capsys.readouterr().err)
    real_loss = measure.held_out_loss

    def infinite(*rest: Any, **named: Any) -> Any:
        found = real_loss(*rest, **named)
        found.nll[1] = np.inf
        return found

    monkeypatch.setattr(measure, "held_out_loss", infinite)
    assert main(arguments) == 6
    assert re.search(r"the loss of base on .*" + second + " is inf", capsys.readouterr().err)
