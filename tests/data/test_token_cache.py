"""The cache equals a fresh build, is rebuilt when anything changes, and survives damage and concurrent use."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.config.schema import DataConfig, LossConfig, SourceConfig, ValidationSplitConfig
from finetune.data import cache, dataset
from finetune.data.dataset import Split, load_split
from finetune.errors import InputError, MachineError


def row(number: int, **fields: object) -> str:
    messages = [{"role": "user", "content": f"{number} + 1?"}, {"role": "assistant", "content": str(number + 1)}]
    return json.dumps({"messages": messages, **fields}) + "\n"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(row(number, kind=str(number)) for number in range(20)))
    return path


def config_for(rows: Path, **settings: Any) -> DataConfig:
    source = SourceConfig(path=str(rows))
    return dataclasses.replace(DataConfig(train={"mine": source}, cache_dir=str(rows.parent / "cache")), **settings)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Counts how often a split was really built."""
    built: list[str] = []
    original = dataset.tokenise

    def counting(config: DataConfig, split: Any, writer: Any) -> Any:
        built.append(split)
        return original(config, split, writer)

    monkeypatch.setattr(dataset, "tokenise", counting)
    return built


def content(split: Split) -> list[Any]:
    examples = [(s.id, s.where, s.ids.tolist(), s.weights.tolist(), s.channels.tolist()) for s in split.examples]
    return [examples, list(split.records), dataclasses.asdict(split.stats)]


def test_cached_tokens_equal_those_built_on_disk_and_in_memory(rows: Path, builds: list[str]) -> None:
    config = config_for(rows)
    built, again = load_split(config, "train"), load_split(config, "train")
    assert builds == ["train"]
    in_memory = load_split(dataclasses.replace(config, cache=False), "train")
    assert content(built) == content(again) == content(in_memory)
    assert len(built.examples) == 20 and not built.examples[0].ids.flags.owndata, "mapped, not copied"


def test_a_changed_byte_or_setting_builds_anew(rows: Path, builds: list[str]) -> None:
    config = config_for(rows)
    load_split(config, "train")
    changes: list[DataConfig] = [
        dataclasses.replace(config, reasoning_effort="high"),
        dataclasses.replace(config, conversation_date="2025-06-29"),
        dataclasses.replace(config, max_length=2000),
        dataclasses.replace(config, too_long="truncate"),
        dataclasses.replace(config, loss=LossConfig(final=0.5)),
        dataclasses.replace(config, validation_split=ValidationSplitConfig(key="kind", share=0.5)),
        dataclasses.replace(config, train={"mine": SourceConfig(path=str(rows), limit=3)}),
        dataclasses.replace(config, train={"mine": SourceConfig(path=str(rows), where={"kind": "1"})}),
        dataclasses.replace(config, train={"mine": SourceConfig(path=str(rows), form="messages")}),
    ]
    for number, changed in enumerate(changes, start=2):
        load_split(changed, "train")
        assert len(builds) == number, changed
    same_tokens = [
        dataclasses.replace(config, on_bad_record="skip", pack=False, mix_temperature=2.0),
        dataclasses.replace(config, train={"mine": SourceConfig(path=str(rows), weight=3.0)}),
    ]
    for unchanged in [*changes, *same_tokens]:
        load_split(unchanged, "train")
    assert len(builds) == 1 + len(changes)
    original = rows.read_bytes()
    rows.write_bytes(original.replace(b"19 + 1", b"29 + 1"))
    assert (
        load_split(config, "train").examples[-1].ids.tolist()
        != load_split(changes[0], "train").examples[-1].ids.tolist()
    )
    assert len(builds) == 3 + len(changes)
    rows.write_bytes(original)
    load_split(config, "train")
    assert len(builds) == 3 + len(changes), "what was there before is used again"


def test_other_code_or_renderer_builds_anew(rows: Path, builds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    load_split(config_for(rows), "train")
    monkeypatch.setattr(cache, "version", lambda name: "9.9")
    load_split(config_for(rows), "train")
    monkeypatch.setattr(cache, "_code", lambda: "another")
    load_split(config_for(rows), "train")
    assert builds == ["train"] * 3


def test_the_order_of_sources_counts(rows: Path, builds: list[str]) -> None:
    one, two = SourceConfig(path=str(rows), limit=2), SourceConfig(path=str(rows), limit=3)
    for train in ({"a": one, "b": two}, {"b": two, "a": one}):
        split = load_split(config_for(rows, train=train), "train")
        assert list(split.stats.source_sizes) == list(train)
    assert len(builds) == 2


def test_every_file_of_a_glob_counts(rows: Path, builds: list[str]) -> None:
    config = config_for(rows.parent / "*.jsonl")
    assert len(load_split(config, "train").examples) == 20
    (rows.parent / "more.jsonl").write_text(row(50))
    assert len(load_split(config, "train").examples) == 21
    assert len(builds) == 2


@pytest.mark.parametrize("name", ["examples.arrow", "records.arrow", "stats.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_reported_and_repaired(
    rows: Path, builds: list[str], capsys: pytest.CaptureFixture[str], name: str, damage: str
) -> None:
    config = config_for(rows)
    expected = content(load_split(config, "train"))
    path = next((rows.parent / "cache").glob(f"train-*/{name}"))
    whole = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif name != "stats.json":
        whole[len(whole) // 2] ^= 1
        path.write_bytes(whole)
    else:
        path.write_bytes(whole.replace(b'"num_records": 20', b'"num_records": 21'))
    capsys.readouterr()
    assert content(load_split(config, "train")) == expected
    assert len(builds) == 2 and "damaged" in capsys.readouterr().err
    load_split(config, "train")
    assert len(builds) == 2


def test_a_build_that_fails_leaves_nothing_behind(rows: Path, builds: list[str]) -> None:
    rows.write_bytes(b"\x1f\x8b broken")
    with pytest.raises(InputError, match="not a complete gzip"):
        load_split(config_for(rows), "train")
    assert [path.suffix for path in (rows.parent / "cache").iterdir()] == [".lock"]


def test_bad_records_are_cached_too(rows: Path, builds: list[str]) -> None:
    rows.write_text(rows.read_text() + "{\n")
    skipping = config_for(rows, on_bad_record="skip")
    assert [bad.where for bad in load_split(skipping, "train").stats.bad_records] == [f"{rows}:21"]
    for _ in range(2):
        with pytest.raises(InputError, match="1 of 21 records cannot be used"):
            load_split(config_for(rows), "train")
    assert len(builds) == 1


def test_a_directory_that_cannot_be_written_is_named(rows: Path) -> None:
    (rows.parent / "file").write_text("")
    with pytest.raises(MachineError, match=r"data\.cache_dir"):
        load_split(config_for(rows, cache_dir=str(rows.parent / "file")), "train")


def test_other_users_cannot_read_the_cache(rows: Path) -> None:
    load_split(config_for(rows), "train")
    assert (rows.parent / "cache").stat().st_mode & 0o077 == 0


PROGRAM = """
import sys, time
from finetune.config.schema import DataConfig, SourceConfig
from finetune.data import cache, dataset
from finetune.data.dataset import load_split
original = dataset.tokenise
def slow(*args):
    print("building", flush=True)
    time.sleep(float(sys.argv[3]))
    return original(*args)
dataset.tokenise = slow
config = DataConfig(train={"mine": SourceConfig(path=sys.argv[1])}, cache_dir=sys.argv[2])
print(load_split(config, "train").stats.fingerprint)
"""


def start(rows: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(rows), str(rows.parent / "cache"), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_that_start_together_build_once(rows: Path) -> None:
    processes = [start(rows, 1.0) for _ in range(3)]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    printed = [line for output, _ in outputs for line in output.split()]
    assert printed.count("building") == 1
    assert len(set(printed)) == 2, "and all have the same tokens"


def test_a_killed_builder_leaves_no_lock_and_no_half_entry(rows: Path) -> None:
    builder = start(rows, 60)
    assert builder.stdout is not None
    builder.stdout.readline()
    os.kill(builder.pid, signal.SIGKILL)
    builder.wait()
    assert not [path for path in (rows.parent / "cache").glob("train-*") if path.is_dir() and path.suffix != ".partial"]
    assert len(load_split(config_for(rows), "train").examples) == 20
    assert not list((rows.parent / "cache").glob("*.partial"))


def test_a_source_that_changes_while_it_is_read_is_refused(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = dataset.tokenise

    def appending(*arguments: Any) -> Any:
        facts = original(*arguments)
        rows.write_text(rows.read_text() + row(99))
        return facts

    monkeypatch.setattr(dataset, "tokenise", appending)
    with pytest.raises(InputError, match="changed while it was read"):
        load_split(config_for(rows), "train")
    assert not [path for path in (rows.parent / "cache").iterdir() if path.is_dir()]


def test_an_unreadable_source_is_not_called_a_cache_fault(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Path.open

    def refusing(path: Path, *arguments: Any, **keywords: Any) -> Any:
        if path == rows:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", refusing)
    for is_cached in (True, False):
        with pytest.raises(InputError, match=r"`mine`.*rows\.jsonl cannot be read") as caught:
            load_split(config_for(rows, cache=is_cached), "train")
        assert "Permission denied" in str(caught.value)


def test_half_a_character_outside_the_conversation_does_no_harm(rows: Path) -> None:
    rows.write_text(row(1, note="\ud83d") + row(2, note="é", id="é"))
    split = load_split(config_for(rows), "train")
    assert [record.fields["note"] for record in split.records] == ["\ud83d", "é"]
    rows.write_text(row(1, id="\ud83d") + row(2))
    with pytest.raises(InputError, match="1 bad id"):
        load_split(config_for(rows), "train")
