"""`finetune recipes new`: what it writes composes, checks out and says what it saw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.cli.main import main
from finetune.config.compose import compose
from finetune.config.locate import shipped_dir


def new(path: Path, *arguments: str) -> int:
    return main(["recipes", "new", str(path), *arguments])


def write_rows(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_file_with_splits_gives_a_recipe_that_dry_runs(tmp_path: Path, tiny_base: Path) -> None:
    data = shipped_dir("data") / "legal" / "cuad_clause_type.jsonl.gz"
    assert new(tmp_path / "mine.yaml", "--data", str(data), "--model", "tiny") == 0
    config = compose(str(tmp_path / "mine.yaml"), [f"model.path={tiny_base}"]).config
    # val comes after the first 2,000 rows of this file.
    assert {split: source["mine"].where["split"] for split, source in (
        ("train", config.data.train), ("validation", config.data.validation), ("test", config.data.test)
    )} == {"train": "train", "validation": "val", "test": "test"}  # fmt: skip
    assert config.data.reasoning_effort == "low" and config.data.max_length == 2048
    assert main(["train", str(tmp_path / "mine.yaml"), f"model.path={tiny_base}", "--dry-run"]) == 0


def test_rows_without_splits_are_split_by_id(tmp_path: Path) -> None:
    rows = [{"id": f"r{n}", "instruction": f"Say {n}", "output": str(n)} for n in range(60)]
    assert new(tmp_path / "mine.yaml", "--data", write_rows(tmp_path / "rows.jsonl", rows)) == 0
    config = compose(str(tmp_path / "mine.yaml")).config
    assert config.data.validation_split.key == "id" and not config.data.test
    assert config.model.path == "openai/gpt-oss-20b"


def test_thinking_keeps_the_effort_and_long_records_are_said(tmp_path: Path) -> None:
    rows = [
        {"messages": [
            {"role": "user", "content": "word " * 17_000},
            {"role": "assistant", "thinking": "Hm.", "content": "Yes"},
        ]}
    ]  # fmt: skip
    assert new(tmp_path / "mine.yaml", "--data", write_rows(tmp_path / "rows.jsonl", rows)) == 0
    config = compose(str(tmp_path / "mine.yaml")).config
    assert config.data.reasoning_effort == "medium"
    assert (config.data.max_length, config.data.too_long) == (16_384, "drop")


def test_a_copy_of_a_shipped_recipe_is_the_same_recipe(tmp_path: Path) -> None:
    assert new(tmp_path / "mine.yaml", "--from", "quickstart") == 0
    assert compose(str(tmp_path / "mine.yaml")).config == compose("quickstart").config


def test_few_bad_rows_are_skipped_and_many_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [{"instruction": f"Say {n}", "output": str(n)} for n in range(60)]
    assert new(tmp_path / "few.yaml", "--data", write_rows(tmp_path / "few.jsonl", [*good, {"instruction": 3}])) == 0
    assert compose(str(tmp_path / "few.yaml")).config.data.on_bad_row == "skip"
    many = write_rows(tmp_path / "many.jsonl", [*good, *[{"instruction": 3}] * 9])
    assert new(tmp_path / "many.yaml", "--data", many) == 0
    assert compose(str(tmp_path / "many.yaml")).config.data.on_bad_row == "stop"
    assert "9 of 69 rows cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["mine.txt", "--from", "quickstart"], 2, "mine.txt.yaml"),
        (["there.yaml", "--from", "quickstart"], 2, "exists already"),
        (["mine.yaml"], 2, "--data FILE"),
        (["mine.yaml", "--from", "quickstart", "--data", "rows.jsonl"], 2, "do not go together"),
        (["mine.yaml", "--from", "quickstrat"], 2, "quickstart"),
        (["mine.yaml", "--data", "rows.jsonl", "--model", "tini"], 2, "did you mean tiny?"),
        (["mine.yaml", "--data", "rowz.jsonl"], 3, "rows.jsonl"),
        (["mine.yaml", "--data", "bad.jsonl"], 3, "none of the first"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.yaml").write_text("")
    write_rows(Path("rows.jsonl"), [{"instruction": "a", "output": "b"}])
    write_rows(Path("bad.jsonl"), [{"instruction": 1}])
    assert main(["recipes", "new", *arguments]) == code
    assert message in capsys.readouterr().err
    assert not Path("mine.yaml").exists()
