"""What was changed after it was written is noticed: evaluation.json, rows.jsonl, tokenizer.json, JSON records."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from finetune.data.harmony.tokenizer import check_tokenizer, tokenizer_differences, write_tokenizer
from finetune.errors import InputError
from finetune.evaluate.measure import ExampleScore, MeasurementLog
from finetune.figures import Comparison, Figure
from finetune.records import parse_line, parse_record, read_record, with_line_check
from finetune.report.read import RunFiles
from finetune.results import Evaluation, SuiteFigures, perplexity, read_evaluation, write_evaluation

LOSS = Comparison(Figure(2.125, (2.0, 2.25)))
EVALUATION = Evaluation(
    "adapter", None, 0.95, [], {}, [SuiteFigures("test", 10, 10, LOSS, perplexity(LOSS))], None, None
)


# ---- evaluation.json


def test_a_changed_digit_of_an_evaluation_is_named(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    write_evaluation(path, EVALUATION)
    assert read_evaluation(path) == EVALUATION
    path.write_text(path.read_text().replace("2.125", "2.126"))
    with pytest.raises(InputError, match=r"evaluation\.json was changed since it was written: suites"):
        read_evaluation(path)
    files = RunFiles.read(tmp_path)
    assert files.trained is None and "suites" in files.unreadable[0]


def test_keys_that_were_added_or_removed_are_named_and_files_without_checksums_pass(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    write_evaluation(path, EVALUATION)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in content.items() if key != "notes"} | {"zzz": 1}))
    with pytest.raises(InputError, match="written: notes, zzz"):
        read_evaluation(path)
    path.write_text(json.dumps(content | {"sha256": 3}))
    with pytest.raises(InputError, match="sha256 is 3"):
        read_evaluation(path)
    del content["sha256"]
    path.write_text(json.dumps(content))
    assert read_evaluation(path) == EVALUATION


# ---- rows.jsonl


def test_changed_measurements_are_left_out_and_measured_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, scores = tmp_path / "rows.jsonl", [(n, ExampleScore(1.5 + n, 2.0, None, None)) for n in range(5)]
    MeasurementLog(path, {"a": 1}).append("score", "base", "test", scores)
    lines = path.read_text().splitlines(keepends=True)
    lines[2] = lines[2].replace("2.5", "2.6")  # a digit
    lines[3] = '{"measured": "score", "row": [3]}\n'  # another form
    lines[4] = lines[4].replace("3", "\0")
    path.write_text("".join(lines) + lines[5][:20])  # and a line that a kill has cut short
    log = MeasurementLog(path, {"a": 1})
    assert log.missing("score", "base", "test", range(5)) == [1, 2, 3]
    assert log.scores("base", "test", [0, 4]) == [scores[0][1], scores[4][1]]
    told = capsys.readouterr().err
    assert "line 3 (" in told and "checksum differs" in told and "line 5 (" in told and "measured again" in told
    assert len(path.read_text().splitlines()) == 3
    old = [parse_line(line) for line in path.read_text().splitlines()]  # as version 0.2 wrote them
    path.write_text("".join(json.dumps(line) + "\n" for line in old))
    assert len(MeasurementLog(path, {"a": 1})) == 2


@pytest.mark.parametrize("first", ["", "[]", '{"belongs_to": 3}', "{", '{"other": {}}', "[" * 100_000])
def test_a_first_line_that_says_nothing_is_refused(tmp_path: Path, first: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(first + "\n")
    with pytest.raises(InputError, match=r"rows\.jsonl: its first line"):
        MeasurementLog(path, {"a": 1})


def test_every_changed_character_of_a_line_is_noticed() -> None:
    line = {"row": 12, "nll": 1.25, "final": "é", "labels": [-1.0, None]}
    text = json.dumps(with_line_check(line))
    assert parse_line(text) == line
    for place in range(len(text)):
        for other in "0a ":
            changed = text[:place] + other + text[place + 1 :]
            try:
                found = parse_line(changed)
            except ValueError:
                continue
            # Only the name of the checksum itself may pass: then the line has a key that no reader knows.
            assert found == line or re.search('"check": "', changed) is None


# ---- tokenizer.json


def test_another_tokenizer_in_the_base_is_named(
    small_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    check_tokenizer(tmp_path, refuse=True)
    Tokenizer.from_file(str(path)).save(str(path), pretty=False)  # other bytes, the same tokens
    assert tokenizer_differences(path) == []
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["the"], vocab["and"] = vocab["and"], vocab["the"]
    path.write_text(json.dumps(content))
    assert tokenizer_differences(path) == ["model.vocab"]
    with pytest.raises(InputError, match=r"tokenizer\.json is another tokenizer than gpt-oss's: model\.vocab differ"):
        check_tokenizer(tmp_path, refuse=True)
    check_tokenizer(small_base, refuse=False)
    assert "model.vocab, model.merges, added_tokens differ" in capsys.readouterr().err
    path.unlink()
    check_tokenizer(tmp_path, refuse=True)


@pytest.mark.parametrize(
    "content, key",
    [
        ("{}", "model is missing"),
        ('{"model": {"vocab": [], "merges": []}}', r"model\.vocab is \[\]"),
        ('{"model": {"vocab": {"a": "x"}, "merges": []}}', r"model\.vocab\.a is 'x'"),
        ('{"model": {"vocab": {}, "merges": []}, "added_tokens": [{"id": 1}]}', r"added_tokens\.0\.content is missing"),
        ("[" * 100_000, "not valid JSON"),
    ],
    ids=["empty", "list", "type", "added", "deep"],
)
def test_a_tokenizer_of_another_form_is_refused_by_its_key(tmp_path: Path, content: str, key: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=rf"tokenizer\.json.*{key}"):
        check_tokenizer(tmp_path, refuse=True)


# ---- records


@dataclass(frozen=True)
class Inner:
    number: int


@dataclass(frozen=True)
class Outer:
    inner: list[Inner]
    text: str | None = None


def test_records_name_file_key_and_fix(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"inner": [{"number": 1}, {"number": "many"}]}')
    with pytest.raises(InputError, match=r"x\.json: inner\.1\.number is 'many': .*\n  fix: write it again"):
        read_record(Outer, path, "a test", fix="write it again")
    with pytest.raises(InputError, match="somewhere: inner is missing"):
        parse_record(Outer, {}, "somewhere")
    with pytest.raises(InputError, match="somewhere: the content is 3"):
        parse_record(Outer, 3, "somewhere")
    assert parse_record(Outer, {"inner": [], "more": 1}, "somewhere") == Outer([])
