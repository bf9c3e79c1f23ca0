"""Every fault of a data file is named with its file and line, and nothing is silently dropped."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from finetune.config.schema import SourceConfig
from finetune.data.sources import BadRecord, Record, read_records
from finetune.errors import ConfigError, FinetuneError, InputError

USER = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}
GOOD = {"messages": [USER, ANSWER]}


def write(path: Path, *lines: object) -> Path:
    """Write one line each: bytes as they are, text as it is, anything else as JSON."""
    encoded = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    ]
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return path


def read(path: Path | str, **settings: Any) -> list[Record | BadRecord]:
    return list(read_records("mine", SourceConfig(path=str(path), **settings)))


def messages(*entries: object) -> dict[str, object]:
    return {"messages": list(entries)}


BAD_LINES = {
    "broken JSON": ('{"messages": [', "not JSON", "column"),
    "NUL bytes": (b"\x00\x00\x00", "not JSON"),
    "not UTF-8": ('{"a": "caf\xe9"}'.encode("latin-1"), "not UTF-8", "byte 11"),
    "not an object": ("[1, 2]", "not an object"),
    "repeated key": ('{"messages": [], "messages": []}', "the key `messages` twice"),
    "no messages": ({"question": "a", "reply": "b"}, "no `messages`", "only question, reply"),
    "wrong conversation": (messages({"role": "asistant", "content": "4"}), "message 1", "did you mean assistant?"),
    "answer not text": (GOOD | {"answer": 4}, "`answer` must be text"),
    "answer empty": (GOOD | {"answer": ""}, "`answer` must be text"),
    "id not text": (GOOD | {"id": ["x"]}, "`id` must be text or a number"),
    "too deep": ("[" * 10 + '{"a":' + "[" * 200_000, "too deeply"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_lines_are_named(tmp_path: Path, case: str) -> None:
    line, *expected = BAD_LINES[case]
    path = write(tmp_path / "rows.jsonl", GOOD, "", line, GOOD)
    first, bad, last = read(path)
    assert isinstance(first, Record) and isinstance(last, Record), "the rows around it are read"
    assert isinstance(bad, BadRecord)
    assert bad.where == f"{path}:3"
    assert bad.kind
    for text in expected:
        assert text in bad.reason


def test_good_records_are_read_whole(tmp_path: Path) -> None:
    thinking = ANSWER | {"thinking": "easy"}
    row = {"id": 7, "answer": "4", "year": 1994, "checked": True, "tags": ["x"]} | messages(USER, thinking)
    path = write(tmp_path / "rows.jsonl", b"\xef\xbb\xbf" + json.dumps(row).encode(), GOOD)
    first, second = read(path)
    assert isinstance(first, Record) and isinstance(second, Record)
    assert (first.id, first.answer, first.messages[-1].thinking) == ("7", "4", "easy")
    assert first.fields == {"id": "7", "answer": "4", "year": "1994", "checked": "true"}
    assert (second.id, second.where, second.answer) == (f"{path}:2", f"{path}:2", None)


def test_ids_are_texts_numbers_or_absent(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", *[GOOD | {"id": value} for value in (None, 0.5, 1.0, 7, "x")])
    ids = [row.id for row in read(path) if isinstance(row, Record)]
    assert ids == [f"{path}:1", "0.5", "1.0", "7", "x"]


def test_gzip_is_recognised_by_content(tmp_path: Path) -> None:
    plain = write(tmp_path / "rows.jsonl", GOOD, GOOD)
    for name in ("rows.jsonl.gz", "packed.jsonl"):
        (tmp_path / name).write_bytes(gzip.compress(plain.read_bytes()))
        assert len(read(tmp_path / name)) == 2


def test_where_and_limit(tmp_path: Path) -> None:
    bad_validation = {"split": "val", "messages": "broken"}
    rows = [GOOD | {"split": split} for split in ("train", "val", "train", "train")]
    path = write(tmp_path / "rows.jsonl", *rows, bad_validation)
    assert [row.where for row in read(path, where={"split": "train"})] == [f"{path}:{line}" for line in (1, 3, 4)]
    assert [row.where for row in read(path, where={"split": "train"}, limit=2)] == [f"{path}:1", f"{path}:3"]
    assert isinstance(read(path, where={"split": "val"})[-1], BadRecord)
    assert len(read(path)) == 5


def refusal(kind: type[FinetuneError], path: Path | str, **settings: Any) -> str:
    with pytest.raises(kind) as caught:
        read(path, **settings)
    assert "`mine`" in str(caught.value), "the source's name in the recipe"
    return str(caught.value)


def test_misspelt_where_field_and_value(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", *[GOOD | {"split": split} for split in ("train", "val", "val")])
    text = refusal(ConfigError, path, where={"splt": "train"})
    assert "where.splt" in text and "did you mean split?" in text
    text = refusal(InputError, path, where={"split": "validation"})
    assert "split: validation" in text and "val (2), train (1)" in text
    assert "at least 1" in refusal(ConfigError, path, limit=0)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    write(tmp_path / "clauses.jsonl", GOOD)
    text = refusal(InputError, tmp_path / "clause.jsonl")
    assert "no file" in text and "did you mean clauses.jsonl?" in text
    assert "is a directory" in refusal(InputError, tmp_path)
    assert "no file" in refusal(InputError, tmp_path / "no" / "folder" / "x.jsonl")
    assert "cuad_clause_type.jsonl.gz" in refusal(InputError, "shipped://legal/cuad_clause_typ.jsonl.gz")


@pytest.mark.parametrize("content", [b"", b"\n \n\n"])
def test_empty_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert "is empty" in refusal(InputError, path)


def test_truncated_and_corrupt_gzip(tmp_path: Path) -> None:
    rows = [GOOD | {"id": f"{number:064x}"} for number in range(2000)]
    packed = gzip.compress(write(tmp_path / "rows.jsonl", *rows).read_bytes())
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(packed[: len(packed) // 2])
    text = refusal(InputError, path)
    line = int(text.split("after line ")[1].split()[0].replace(",", ""))
    assert str(path) in text and 500 < line < 1500
    path.write_bytes(packed[:-8] + b"\x00" * 8)
    assert "not a complete gzip file" in refusal(InputError, path)
    path.write_bytes(b'{"messages": []}\n')
    assert "not a complete gzip file" in refusal(InputError, path)


def test_a_very_long_line_is_an_ordinary_record(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD, messages({"role": "user", "content": "x " * 10_000_000}, ANSWER), GOOD)
    assert [type(row) for row in read(path)] == [Record, Record, Record]
