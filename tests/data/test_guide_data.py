"""Every example of docs/guide/data.md runs, and every key of sources and data that it is about has one."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
import shlex
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
import yaml
from pyarrow import parquet

from finetune.cli.main import main
from finetune.config.compose import compose
from finetune.config.schema import SourceConfig, ValidationSplitConfig
from finetune.data.dataset import Split, load_split
from finetune.data.sources import split_names

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "data.md"
TEXT = GUIDE.read_text().partition("\n# Conversations and tokens\n")[0]
RECIPES = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL) for line in block.splitlines()]
HEAD = "# @package _global_\ndefaults:\n  - override /model: tiny\n"


def record(number: int, length: int = 5) -> dict[str, Any]:
    messages = [{"role": "user", "content": "q " * length}, {"role": "assistant", "content": str(number)}]
    return {"messages": messages, "customer": f"customer {number % 10}", "answer": str(number)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the guide speaks of, in the working directory."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps(record(number, 600 if number == 7 else 5)) + "\n" for number in range(30)]
    Path("chats.jsonl").write_text("".join(lines[:7] + lines[8:]))
    Path("chats_with_faults.jsonl").write_text("".join([*lines[:6], "{\n"]))
    Path("parts").mkdir()
    for part in range(2):
        Path(f"parts/{part}.jsonl.gz").write_bytes(gzip.compress("".join(lines[part * 3 : part * 3 + 3]).encode()))
    Path("answers.csv").write_text("question,reply\n" + "".join(f"what is {n}?,{n}\n" for n in range(4)))
    rows = [{"conv": record(n)["messages"], "label": str(n), "year": 2023 + n % 2} for n in range(10)]
    parquet.write_table(pa.Table.from_pylist(rows), "table.parquet")
    split = datasets.Dataset.from_list([record(number) for number in range(3)])
    datasets.DatasetDict({"train": split, "other": split}).save_to_disk("saved")
    Path("mine.yaml").write_text(HEAD + "data:\n  train: {chats: {path: chats.jsonl}}\n")
    return tmp_path


def load(text: str) -> dict[str, Split]:
    Path("example.yaml").write_text(HEAD + text)
    config = compose("example.yaml").config
    if any(source.path.startswith("hub://") for source in config.data.train.values()):
        return {}  # there is no network; tests/data/test_readers.py reads one
    return {name: load_split(config.data, name) for name in split_names(config.data)}


@pytest.mark.parametrize("text", RECIPES, ids=lambda text: text.split("\n")[-2].strip()[:30])
def test_every_recipe_of_the_guide_runs(folder: Path, text: str) -> None:
    splits = load(text)
    assert all(len(split.examples) for split in splits.values())
    assert splits or "hub://" in text


def test_recipes_give_the_results_of_the_guide(folder: Path) -> None:
    topics = ("limit: 100", "customer", "truncate", "on_bad_record")
    by_topic = {topic: load(next(text for text in RECIPES if topic in text)) for topic in topics}
    sizes = dict(by_topic["limit: 100"]["train"].stats.source_sizes)
    assert sizes == {"many": 6, "table": 4, "saved": 3}
    assert len(by_topic["limit: 100"]["test"].examples) == 5
    customers = [{row.fields["customer"] for row in split.records} for split in by_topic["customer"].values()]
    assert len(customers[0] | customers[1]) == 10 and not customers[0] & customers[1]
    assert len(by_topic["on_bad_record"]["train"].stats.bad_records) == 1
    Path("chats.jsonl").write_text(json.dumps(record(0, 600)) + "\n")
    assert load(next(text for text in RECIPES if "truncate" in text))["train"].stats.num_truncated == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_guide_runs(folder: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "--dry-run" in command:
        (folder / "base").mkdir()
        command = command.replace("--dry-run", "--dry-run model.path=hub/name")
    words = shlex.split(command, comments=True)
    assert words[0] == "finetune"
    assert main(words[1:]) == 0, capsys.readouterr().err


def test_every_key_has_an_example() -> None:
    shown: set[str] = set()

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            shown.update(map(str, value))
            for item in value.values():
                collect(item)

    for text in RECIPES:
        collect(yaml.safe_load(text))
    keys = {field.name for kind in (SourceConfig, ValidationSplitConfig) for field in dataclasses.fields(kind)}
    keys |= {"train", "test", "validation_split", "max_length", "too_long", "mix_temperature", "pack"}
    keys |= {"on_bad_record", "max_skipped_ratio", "cache", "cache_dir"}
    assert keys <= shown, keys - shown
