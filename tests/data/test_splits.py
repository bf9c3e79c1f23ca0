"""Validation records are taken out of training by a field's value: records that share it stay together."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from finetune.config.schema import DataConfig, SourceConfig, ValidationSplitConfig
from finetune.data.dataset import Split, load_split
from finetune.data.sources import share_of, split_names
from finetune.errors import ConfigError, InputError

LEGAL = SourceConfig(path="shipped://legal/cuad_clause_type.jsonl.gz", limit=2000)
BY_CONTRACT = DataConfig(train={"legal": LEGAL}, validation_split=ValidationSplitConfig(key="contract", share=0.1))


def contracts(split: Split) -> set[str]:
    return {record.fields["contract"] for record in split.records}


def test_no_contract_is_on_both_sides() -> None:
    train, validation = load_split(BY_CONTRACT, "train"), load_split(BY_CONTRACT, "validation")
    assert len(train.examples) + len(validation.examples) == 2000
    assert not contracts(train) & contracts(validation)
    share = len(contracts(validation)) / len(contracts(train) | contracts(validation))
    assert 0.05 < share < 0.15
    by_row = dataclasses.replace(BY_CONTRACT, validation_split=ValidationSplitConfig(key="id", share=0.1))
    straddling = contracts(load_split(by_row, "train")) & contracts(load_split(by_row, "validation"))
    assert len(straddling) > 50, "split by row instead, they do"


def test_a_record_stays_on_its_side_when_others_are_added() -> None:
    some = dataclasses.replace(BY_CONTRACT, train={"legal": dataclasses.replace(LEGAL, limit=1000)})
    few, all_of_them = load_split(some, "validation"), load_split(BY_CONTRACT, "validation")
    assert {record.id for record in few.records} <= {record.id for record in all_of_them.records}
    smaller = dataclasses.replace(BY_CONTRACT, validation_split=ValidationSplitConfig(key="contract", share=0.02))
    assert contracts(load_split(smaller, "validation")) <= contracts(all_of_them), "a smaller share is a part of it"


def test_the_hash_is_a_contract() -> None:
    """First eight bytes of `printf VALUE | sha256sum`; another hash would move everyone's records."""
    assert share_of("contract-7") == 0xDA5E6DC0649AC6AA / 2**64
    assert share_of("é") == 0x4A99557E4033C353 / 2**64


def config_for(tmp_path: Path, *rows: dict[str, Any], **settings: Any) -> DataConfig:
    path = tmp_path / "rows.jsonl"
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path.write_text("".join(json.dumps({"messages": messages} | row) + "\n" for row in rows))
    return DataConfig(
        train={"mine": SourceConfig(path=str(path))},
        validation_split=ValidationSplitConfig(key="group", share=0.5),
        **settings,
    )


def test_misspelt_key_and_missing_values(tmp_path: Path) -> None:
    rows = [{"group": str(number)} for number in range(20)]
    wrong = dataclasses.replace(config_for(tmp_path, *rows), validation_split=ValidationSplitConfig(key="groop"))
    with pytest.raises(ConfigError, match=r"did you mean group\?"):
        load_split(wrong, "validation")
    nothing_assigned = r"`validation_split` assigns none to it[\s\S]*raise data.validation_split.share"
    with pytest.raises(InputError, match=nothing_assigned):
        few = config_for(tmp_path, {"group": "0"}, {}, {"group": "1"})
        load_split(
            dataclasses.replace(few, validation_split=ValidationSplitConfig(key="group", share=1e-6)), "validation"
        )
    train = load_split(config_for(tmp_path, {}, *rows), "train")
    assert train.examples[0].where.endswith(":1"), "a record without the field is trained"


def test_each_bad_record_is_counted_once(tmp_path: Path) -> None:
    rows = [{"group": str(number)} for number in range(20)] + [
        {"group": str(number), "messages": 3} for number in range(8)
    ]
    config = config_for(tmp_path, *rows, on_bad_record="skip", max_skipped_ratio=1.0)
    path = Path(config.train["mine"].path)
    path.write_text(path.read_text() + "{\n")
    bad = [row.where for split in split_names(config) for row in load_split(config, split).stats.bad_records]
    assert sorted(bad) == sorted(f"{path}:{line}" for line in range(21, 30))
    sides = [len(load_split(config, split).stats.bad_records) for split in split_names(config)]
    assert all(sides), "wrong conversations fall to either side"


def test_a_broken_line_is_counted_once_whatever_the_splits(tmp_path: Path) -> None:
    """It has no field for `where`: the first source that reads the file to its end counts it."""
    rows = [{"group": name} for name in ("a", "a", "b", "c")]
    base = config_for(tmp_path, *rows, on_bad_record="skip", max_skipped_ratio=1.0, cache_dir=str(tmp_path / "cache"))
    path = Path(base.train["mine"].path)
    path.write_text(path.read_text() + "{\n[]\n")

    def source(name: str, **settings: Any) -> SourceConfig:
        return SourceConfig(path=str(path), where={"group": name}, **settings)

    def counted(**splits: Any) -> list[int]:
        config = dataclasses.replace(base, validation_split=ValidationSplitConfig(), **splits)
        return [len(load_split(config, split).stats.bad_records) for split in split_names(config)]

    validation, test = {"held": source("b")}, {"mine": source("c")}
    assert counted(train={"mine": source("a")}, validation=validation, test=test) == [2, 0, 0]
    assert counted(train={"one": source("a"), "two": source("b")}, test=test) == [2, 0]
    short = {"mine": source("a", limit=1)}
    assert counted(train=short, test=test) == [0, 2], "the training source does not come to them"
    elsewhere = tmp_path / "other.jsonl"
    elsewhere.write_text(path.read_text().splitlines()[0] + "\n")
    assert counted(train={"mine": SourceConfig(path=str(elsewhere))}, test=test) == [0, 2]


def test_split_names() -> None:
    assert split_names(DataConfig(train={"a": LEGAL})) == ("train",)
    assert split_names(BY_CONTRACT) == ("train", "validation")
    assert split_names(DataConfig(train={"a": LEGAL}, test={"b": LEGAL})) == ("train", "test")


def test_test_records_need_no_field_to_split_by(tmp_path: Path) -> None:
    """They are not split: a test file of another make, or a shipped one, has no such field."""
    rows = [{"group": str(number)} for number in range(20)]
    config = config_for(tmp_path, *rows)
    (tmp_path / "other").mkdir()
    other = config_for(tmp_path / "other", {"id": "1"}, {"id": "2"}).train["mine"]
    mixed = dataclasses.replace(config, test={"other": other})
    assert len(load_split(mixed, "test").examples) == 2
    with pytest.raises(ConfigError, match="no record of source `other` has a field `group`"):
        load_split(dataclasses.replace(mixed, train={"other": other}), "train")
