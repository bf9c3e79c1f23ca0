"""The figures of `finetune data stats`, against counts made by hand or from the tokens themselves."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from finetune.cli.main import main
from finetune.config.compose import compose
from finetune.config.schema import RunConfig, SourceConfig
from finetune.data.dataset import load_split
from finetune.data.stats import collect, describe_stats


def messages(question: str, answer: str, **keys: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **keys}]}


ROWS: list[Any] = [
    messages("one two three four five six seven", "8", thinking="count"),
    messages("One two three  four five six seven", "8"),
    messages("one two three four five six seven", "9"),
    messages("something else entirely, spelling <|end|>", "10"),
    {"messages": "broken"},
    messages("q " * 3000, "too long"),
]


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "test.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "# @package _global_\ndefaults:\n  - override /model: tiny\n"
        f"data:\n  train: {{mine: {{path: {path}}}, twice: {{path: {tmp_path}/more.csv, weight: 2}}}}\n"
        f"  test: {{held: {{path: {tmp_path}/test.jsonl}}}}\n  max_length: 512\n  too_long: drop\n"
    )
    (tmp_path / "more.csv").write_text("prompt,completion\nfrom a table,yes\n")
    return compose(str(recipe)).config


def test_figures_by_hand(config: RunConfig) -> None:
    result = collect(config).as_json()
    train = result["splits"]["train"]
    split = load_split(dataclasses.replace(config.data, on_bad_record="skip", max_skipped_ratio=1.0), "train")
    assert (train["records"], train["samples"]) == (5, 5)
    assert train["sources"] == {"mine": 4, "twice": 1}
    assert train["packing"]["samples_by_source"] == {"mine": 4, "twice": 2}
    assert train["forms"] == {"messages": 4, "prompt_completion": 1}
    assert train["tokens"] == sum(len(example.ids) for example in split.examples)
    assert sum(train["trained"].values()) == sum(int((example.weights > 0).sum()) for example in split.examples)
    assert sum(train["trained"].values()) + sum(train["context"].values()) == train["tokens"]
    assert set(train["trained"]) == {"analysis", "final"}
    assert train["skipped"]["kinds"] == {"no messages": 1}
    assert "rows.jsonl:5: " in train["skipped"]["places"]["no messages"][0]
    assert (
        train["dropped"]["kinds"] == {"too long": 1} and "rows.jsonl:6: " in train["dropped"]["places"]["too long"][0]
    )
    assert train["control_text"]["harmony"]["num_records"] == 1
    lengths = sorted(len(example.ids) for example in split.examples)
    assert (train["lengths"]["shortest"], train["lengths"]["longest"]) == (lengths[0], lengths[-1])
    histogram = train["lengths"]["histogram"]
    for entry in histogram:
        assert entry["samples"] == sum(entry["from"] < length <= entry["to"] for length in lengths)
    assert sum(entry["samples"] for entry in histogram) == 5
    within = result["duplicates"]["train"]
    assert (within["rows"], within["exact"], within["other_answer"]) == (5, 1, 1)
    assert result["duplicates"]["test in train"]["exact"] == 1


def test_lines_and_json(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(tmp_path / "mine.yaml")
    lines = "\n".join(describe_stats(collect(config)))
    for words in (
        "train: 5 records, 5 examples",
        "source twice: 1 examples, 2 in the first epoch",
        "dropped: 1 records",
        "1 too long",
        "skipped: 1 records",
        "rows.jsonl:5: ",
        "% filled",
        "test in train: of 1 records 1 the same",
    ):
        assert words in lines
    assert main(["data", "stats", recipe, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(collect(config).as_json()))
    assert main(["data", "stats", recipe, "--no-duplicates"]) == 0
    assert "duplicates" not in capsys.readouterr().out


def test_stats_show_a_split_that_a_run_would_refuse(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No validation record, and no usable test record: both are figures, not errors."""
    (tmp_path / "test.jsonl").write_text("{\n")
    recipe = str(tmp_path / "mine.yaml")
    split = ["data.validation_split.key=id", "data.validation_split.share=0.000001", "data.train.mine.limit=3"]
    rows = "".join(json.dumps(row | {"id": number}) + "\n" for number, row in enumerate(ROWS[:3]))
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "more.csv").write_text("id,prompt,completion\n7,from a table,yes\n")
    assert main(["data", "stats", recipe, *split]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert printed.count("nothing to use: a run stops here") == 2
    assert "validation: 0 records" in printed and "test.jsonl:1: the line is not JSON" in printed
    assert main(["train", recipe, *split, "--dry-run", f"model.path={tmp_path}"]) == 3, "the control"


def packing(config: RunConfig, **data: Any) -> dict[str, Any]:
    """The training split's packing, without reading the other splits."""
    data = {"validation": {}, "test": {}} | data
    changed = dataclasses.replace(config, data=dataclasses.replace(config.data, **data))
    figures: dict[str, Any] = collect(changed, duplicates=False).splits["train"].packing.as_json()
    return figures


@pytest.mark.parametrize("recipe", ["quickstart", "legal_20b", "legal_120b"])
def test_packing_at_the_recipes_lengths(recipe: str) -> None:
    """More than 98 % filled; one example per sequence is the control."""
    config = compose(recipe).config
    assert packing(config)["efficiency"] > 0.98
    assert packing(config, pack=False)["efficiency"] < 0.3


@pytest.mark.parametrize("name", ["creative/fiction_continuation", "medical/pubmedqa_labeled"])
def test_packing_of_the_other_shipped_data(name: str) -> None:
    source = SourceConfig(path=f"shipped://{name}.jsonl.gz", where={"split": "train"})
    assert packing(compose("legal_20b").config, train={"one": source}, max_length=4096)["efficiency"] > 0.98
