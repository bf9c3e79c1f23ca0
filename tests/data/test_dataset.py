"""A split is complete, or the error counts all its faults."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from finetune.config.schema import DataConfig, SourceConfig
from finetune.data.dataset import Split, describe, load_split
from finetune.errors import ConfigError, InputError

LEGAL = "shipped://legal/cuad_clause_type.jsonl.gz"


def row(answer: str = "4", question: str = "2 + 2?") -> str:
    return json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})


def config_for(tmp_path: Path, *lines: str, **settings: object) -> DataConfig:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return dataclasses.replace(DataConfig(train={"mine": SourceConfig(path=str(path))}), **settings)


@pytest.fixture(scope="module")
def legal() -> Split:
    sources = {name: SourceConfig(path=LEGAL, where={"split": name}) for name in ("val", "test")}
    return load_split(DataConfig(train=sources), "train")


def test_shipped_legal_records_are_all_usable(legal: Split) -> None:
    assert len(legal.records) == len(legal.examples) == 583 + 1320
    assert not legal.stats.bad_records
    assert [record.id for record in legal.records] == [example.id for example in legal.examples]
    assert {record.answer for record in legal.records} == {record.messages[-1].content for record in legal.records}
    assert max(len(example.ids) for example in legal.examples) <= 935
    assert legal.stats.num_tokens == sum(len(example.ids) for example in legal.examples)
    assert 0 < legal.stats.num_trained_tokens < 15 * len(legal.examples)
    assert describe(legal).startswith("train: 1,903 examples, ")


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    base = load_split(config_for(tmp_path, row("4"), row("5")), "train").stats.fingerprint
    assert load_split(config_for(tmp_path, "", row("4"), "", row("5")), "train").stats.fingerprint == base
    others = [
        load_split(config_for(tmp_path, row("5"), row("4")), "train").stats.fingerprint,
        load_split(config_for(tmp_path, row("4")), "train").stats.fingerprint,
        load_split(config_for(tmp_path, row("4"), row("5"), reasoning_effort="high"), "train").stats.fingerprint,
    ]
    assert base not in others and len(set(others)) == 3


def test_stop_counts_all_and_shows_three(tmp_path: Path) -> None:
    lines = [row(), "{", row(""), row("x" * 9000), "[]", row("")]
    with pytest.raises(InputError) as caught:
        load_split(config_for(tmp_path, *lines, max_length=512), "train")
    text = str(caught.value)
    assert "data.train: 5 of 6 records cannot be used" in text
    assert "2 empty content, 1 broken JSON, 1 too long, 1 not an object" in text
    for line in (2, 3, 4):
        assert f"rows.jsonl:{line}: " in text
    assert "and 2 more" in text and "rows.jsonl:5" not in text
    assert "data.max_length (512)" in text


def test_skip_counts_up_to_the_share(tmp_path: Path) -> None:
    lines = [row()] * 19 + ["{"]
    split = load_split(config_for(tmp_path, *lines, on_bad_record="skip"), "train")
    assert len(split.examples) == 19
    assert [bad.where.rsplit(":", 1)[1] for bad in split.stats.bad_records] == ["20"]
    assert describe(split).endswith("; 1 records skipped (1 broken JSON)")
    with pytest.raises(InputError, match=r"2 of 20 records cannot be used: more than data.max_skipped_ratio \(5 %\)"):
        load_split(config_for(tmp_path, *lines[1:], "{", on_bad_record="skip"), "train")


def test_max_length_is_inclusive(tmp_path: Path) -> None:
    length = len(load_split(config_for(tmp_path, row()), "train").examples[0].ids)
    assert len(load_split(config_for(tmp_path, row(), max_length=length), "train").examples) == 1
    with pytest.raises(InputError, match="none of 1 records can be used"):
        load_split(config_for(tmp_path, row(), max_length=length - 1), "train")


def test_a_huge_record_is_refused_without_encoding_it(tmp_path: Path) -> None:
    config = config_for(tmp_path, row(), row(question="a" * 50_000_000), on_bad_record="skip", max_skipped_ratio=0.5)
    (bad,) = load_split(config, "train").stats.bad_records
    assert bad.kind == "too long" and "characters cannot fit" in bad.reason


def test_nothing_usable_stops_even_when_skipping(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none of 2 records can be used"):
        load_split(config_for(tmp_path, "{", "{", on_bad_record="skip", max_skipped_ratio=1.0), "train")


def test_a_split_without_sources_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.validation names no source"):
        load_split(config_for(tmp_path, row()), "validation")


def test_recognised_forms_are_described(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a", "completion": "b"}, {"instruction": "a", "output": "b"}, {"prompt": "c", "completion": "d"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = describe(load_split(DataConfig(train={"mine": SourceConfig(path=str(path))}, cache=False), "train"))
    assert said.endswith("; read as prompt_completion (2), alpaca (1)")
