"""`finetune recipes new`: what it writes composes, checks out and says what it saw."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from finetune.cli.main import main
from finetune.config.compose import compose
from finetune.config.paths import shipped_dir
from finetune.config.schema import DataConfig, ValidationSplitConfig
from finetune.data.dataset import describe, load_split
from finetune.data.sources import SplitName, share_of


def new(path: Path, *arguments: str) -> int:
    return main(["recipes", "new", str(path), *arguments])


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> str:
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
    assert (config.data.validation_split.key, config.data.validation_split.share) == ("id", 0.05)
    assert not config.data.test
    assert config.model.path == "openai/gpt-oss-20b"


def test_thinking_keeps_the_effort_and_long_records_are_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
    assert "1 of 1 tokenised examples have more than 16,384 tokens: the recipe drops such" in capsys.readouterr().err


def test_a_copy_of_a_shipped_recipe_is_the_same_recipe(tmp_path: Path) -> None:
    assert new(tmp_path / "mine.yaml", "--from", "quickstart") == 0
    assert compose(str(tmp_path / "mine.yaml")).config == compose("quickstart").config


def test_few_bad_records_are_skipped_and_many_are_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [{"instruction": f"Say {n}", "output": str(n)} for n in range(60)]
    assert new(tmp_path / "few.yaml", "--data", write_rows(tmp_path / "few.jsonl", [*good, {"instruction": 3}])) == 0
    assert compose(str(tmp_path / "few.yaml")).config.data.on_bad_record == "skip"
    many = write_rows(tmp_path / "many.jsonl", [*good, *[{"instruction": 3}] * 9])
    assert new(tmp_path / "many.yaml", "--data", many) == 0
    assert compose(str(tmp_path / "many.yaml")).config.data.on_bad_record == "stop"
    assert "9 of 69 records cannot be used: a run will stop" in capsys.readouterr().err


def message(number: int, **fields: object) -> dict[str, object]:
    return {"prompt": f"Say {number}", "completion": str(number), **fields}


def seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: Sequence[Mapping[str, object]]
) -> tuple[DataConfig, str]:
    """The data section that the command writes for these records, and its messages."""
    (tmp_path / "mine.yaml").unlink(missing_ok=True)
    data = write_rows(tmp_path / "mine.jsonl", rows)
    assert new(tmp_path / "mine.yaml", "--data", data, "--model", "tiny") == 0, capsys.readouterr().err
    return compose(str(tmp_path / "mine.yaml")).config.data, capsys.readouterr().err


def num_rows(data: DataConfig, split: SplitName) -> int:
    return load_split(dataclasses.replace(data, cache=False), split).stats.num_records


def test_rows_of_no_split_are_left_out_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = [message(n, split="holdout" if n % 2 else "train") for n in range(20)]
    data, said = seen(tmp_path, capsys, [*held, message(20)])
    assert num_rows(data, "train") == 10
    assert "`split` has holdout (10), which names no split" in said and "no value in 1 records" in said
    late = [message(n, part="train" if n < 2100 else "test") for n in range(2110)]
    data, said = seen(tmp_path, capsys, [*late, message(0, part="later")])
    assert data.train["mine"].where == {"part": "train"} and data.test["mine"].where == {"part": "test"}
    assert "`part` has later (1)" in said


def test_a_field_that_may_mean_something_else_is_asked_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, said = seen(tmp_path, capsys, [message(n, vehicle=["train", "car"][n % 2]) for n in range(10)])
    assert data.train["mine"].where == {} and "`vehicle` has car (5), train (5), which does not tell" in said
    data, said = seen(tmp_path, capsys, [message(n, split=n % 2) for n in range(10)])
    assert data.train["mine"].where == {} and "`split` has 0 (5), 1 (5), which does not tell" in said
    data, said = seen(tmp_path, capsys, [message(n, answer=["train", "car"][n % 2]) for n in range(10)])
    assert data.train["mine"].where == {} and "does not tell" not in said, "a label is no split"


def test_every_word_of_a_split_is_a_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "Training", "dev", "val", "TEST"]
    data, said = seen(tmp_path, capsys, [message(n, split=words[n % 5]) for n in range(20)])
    assert (num_rows(data, "train"), num_rows(data, "validation"), num_rows(data, "test")) == (8, 8, 4)
    assert "train is Training and train, validation is dev and val, test is TEST" in said


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
        (["mine.yaml", "--data", "roles.jsonl"], 3, "human is user; ai, gpt, bot and model are assistant"),
        (["mine.yaml", "--data", "roles.jsonl"], 3, "message 1 has an unknown role 'human'; write it as user"),
        (["mine.yaml", "--data", "turns.jsonl"], 3, "assistant's answer"),
        (["mine.yaml", "--data", "calls.jsonl"], 3, "declare each function"),
        (["mine.yaml", "--data", "array.json"], 3, "one JSON object per line"),
        (["mine.yaml", "--data", "numbers.jsonl"], 3, "`columns: {label: answer}` beside the path"),
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
    write_rows(Path("numbers.jsonl"), [{"prompt": "a", "completion": "0", "answer": 0}])
    user, bot = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    write_rows(Path("roles.jsonl"), [{"messages": [user | {"role": "human"}, bot | {"role": "ai"}]}])
    write_rows(Path("turns.jsonl"), [{"messages": [user]}])
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    write_rows(Path("calls.jsonl"), [{"messages": [user, call]}])
    Path("array.json").write_text("[1, 2]")
    assert main(["recipes", "new", *arguments]) == code
    assert message in capsys.readouterr().err
    assert not Path("mine.yaml").exists()


def test_columns_without_a_form_are_proposed_and_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"Question": f"q {n}", "Response": f"r {n}", "topic": "x"} for n in range(3)]
    data, said = seen(tmp_path, capsys, rows)
    assert data.train["mine"].columns == {"prompt": "Question", "completion": "Response"}
    assert "reads Question as prompt, Response as completion" in said and "not used: topic (3)" in said
    assert [m.content for m in load_split(data, "train").records[0].messages] == ["q 0", "r 0"]
    data, said = seen(tmp_path, capsys, [{"instruction": "i", "output": "o", "text": "### i o"}])
    assert data.train["mine"].form == "alpaca" and "reads them as alpaca" in said
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    data, _ = seen(tmp_path, capsys, [{"conversations": turns}])
    assert data.train["mine"].columns == {"messages": "conversations"} and num_rows(data, "train") == 1


def test_unused_keys_are_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [message(n, notes="hm", split="train", id=n, input="") for n in range(9)]
    data, said = seen(tmp_path, capsys, rows)
    assert "not used: notes (9)" in said
    config = dataclasses.replace(data, cache=False, validation_split=ValidationSplitConfig(key="id", share=0.5))
    assert describe(load_split(config, "train")).endswith("; keys not used: notes")
    _, said = seen(tmp_path, capsys, [message(0)])
    assert "not used" not in said


def test_broken_lines_and_late_ones_do_not_stop_the_recipe(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """2 % of the file is more than 5 % of a small split; and one bad record is after the tokenised part."""
    rows = [message(n, split="train" if n < 2080 else ["val", "test"][n % 2]) for n in range(2120)]
    data = Path(write_rows(tmp_path / "mine.jsonl", [*rows, message(0, split="train", messages=3)]))
    data.write_text("{\n" * 20 + data.read_text())
    assert new(tmp_path / "mine.yaml", "--data", str(data), "--model", "tiny") == 0
    said = capsys.readouterr().err
    assert "2,141 records" in said and "21 of 2,141 records cannot be used: the recipe skips them" in said
    overrides = [f"model.path={tiny_base}", "data.cache=false"]
    assert main(["train", str(tmp_path / "mine.yaml"), *overrides, "--dry-run"]) == 0, capsys.readouterr().err
    assert "21 records skipped" in capsys.readouterr().out


@pytest.mark.parametrize("ids", [["a"], ["r0", "r1", "r2", "r3", "r4"], ["same"] * 30])
def test_ids_that_fill_one_side_only_are_no_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ids: list[str]
) -> None:
    data, said = seen(tmp_path, capsys, [message(n, id=value) for n, value in enumerate(ids)])
    assert data.validation_split.key is None and num_rows(data, "train") == len(ids)
    assert "no validation records (too few different `id`s to split by)" in said


def test_few_ids_take_a_larger_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = [str(n) for n in range(100) if share_of(str(n)) >= 0.1][:30]
    data, said = seen(tmp_path, capsys, [message(n, id=value) for n, value in enumerate(ids)])
    assert data.validation_split.share == 0.2 and "validation records: 20% of the `id`s" in said
    assert num_rows(data, "train") + num_rows(data, "validation") == 30


def test_untrained_turns_and_missing_splits_are_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk = [{"role": role, "content": f"{role} {turn}"} for turn in range(2) for role in ("user", "assistant")]
    _, said = seen(tmp_path, capsys, [message(0), message(1), {"messages": talk}])
    assert "1 of 3 records have several turns" in said and "data.loss.turns=all" in said
    assert "no validation records" in said and "no test records" in said


def test_the_commands_to_go_on_can_be_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [message(0)])
    assert new(tmp_path / "my first.yaml", "--data", rows, "--model", "tiny") == 0
    commands = capsys.readouterr().err.rsplit("then: ", 1)[1].split("; ")
    recipe = str(tmp_path / "my first.yaml")
    assert [shlex.split(command.strip())[2:] for command in commands] == [
        ["stats", recipe],
        ["preview", recipe],
        [recipe, "--dry-run"],
        [recipe],
    ]


@pytest.mark.parametrize(
    "name",
    [
        "a\nseed: 5.jsonl", "a\x1b[31m.jsonl", "a\x7f.jsonl", "a\x85b\u2028c.jsonl", "a\"b'c.jsonl", "a: b #c.jsonl",
        "a\\b.jsonl", "a$b.jsonl", "{x}[y].jsonl", "\U0001f600\xe9.jsonl", "!tag &a *b.jsonl", "a\ttab.jsonl",
        " lead.jsonl ", "a,b=c.jsonl", "\ufeffa.jsonl", "null", "0o17", "x" * 200 + " y" * 20,
    ],
)  # fmt: skip
def test_any_name_of_a_data_file_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(Path(name), [{"prompt": "a", "completion": "b"}])
    assert main(["recipes", "new", "mine.yaml", f"--data={name}"]) == 0
    config = compose("mine.yaml").config
    assert (config.data.train["mine"].path, config.seed) == (name, 0)
    written = Path("mine.yaml").read_text().replace("\n", "")
    assert written.isprintable() or name.startswith("\ufeff")


@pytest.mark.parametrize(("name", "why"), [("${oc.env:HOME}.jsonl", "reference to a key"), ("a\udcff", "not UTF-8")])
def test_names_that_no_recipe_can_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(Path(name), [{"prompt": "a", "completion": "b"}])
    assert main(["recipes", "new", "mine.yaml", f"--data={name}"]) == 3
    assert why in capsys.readouterr().err and not Path("mine.yaml").exists()


def test_calls_as_text_are_read_as_hermes_has_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = "<tool_call>\n{'name': 'f', 'arguments': {}}\n</tool_call>"
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": call}]
    tools = [{"type": "function", "function": {"name": "f", "description": "F.", "parameters": {"type": "object"}}}]
    results = [{"from": "tool", "value": "<tool_response>\n1\n</tool_response>"}, {"from": "gpt", "value": "1"}]
    for added in (results, []):
        data, said = seen(tmp_path, capsys, [{"conversations": [*turns, *added], "tools": json.dumps(tools)}])
        assert data.train["mine"].form == "hermes" and "the recipe reads them as hermes does" in said
        assert load_split(data, "train").records[0].messages[1].tool_calls
