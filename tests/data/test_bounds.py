"""What is no data file, or has no end, is refused by name: in bounded memory and time."""

from __future__ import annotations

import gzip
import json
import os
import socket
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from finetune.cli.main import main
from finetune.config import layers, paths
from finetune.config.paths import matching_files
from finetune.config.schema import DataConfig, SourceConfig
from finetune.data import dataset, files, read_text, readers
from finetune.data.dataset import load_split
from finetune.data.sources import BadRecord, Record, read_records
from finetune.errors import InputError

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
LINE = json.dumps(GOOD) + "\n"


def read(path: Path | str, **settings: Any) -> list[Record | BadRecord]:
    return list(read_records("mine", SourceConfig(path=str(path), **settings)))


def refusal(path: Path | str) -> str:
    with pytest.raises(InputError) as caught:
        read(path)
    return str(caught.value) + (caught.value.why or "") + (caught.value.fix or "")


def test_special_files_are_refused_before_they_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    assert "rows.jsonl is a pipe, not a file" in refusal(tmp_path / "rows.jsonl")
    assert "is a pipe" in refusal(tmp_path / "*.jsonl"), "in a pattern too"
    assert "/dev/zero is a device" in refusal("/dev/zero")
    assert "is a file of the kernel" in refusal("/proc/cpuinfo")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    assert "zero.jsonl is a device" in refusal(tmp_path / "zero.jsonl"), "through a link"
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nothing")
    assert "is a link to nothing" in refusal(tmp_path / "gon?.jsonl")
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.relpath(tmp_path / "s.jsonl"))  # its name may have 107 bytes
    assert "is a socket" in refusal(tmp_path / "s.jsonl")
    server.close()
    assert "cannot be looked up" in refusal(tmp_path / ("x" * 5000))
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    os.mkfifo(tmp_path / "saved" / "data-00000-of-00001.arrow")
    assert "is a pipe" in refusal(tmp_path / "saved")


@pytest.mark.parametrize(
    "command", [["data", "stats"], ["data", "preview"], ["train", "--dry-run"], ["recipes", "new"]]
)
def test_commands_refuse_a_device(
    tmp_path: Path, command: list[str], tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    words = [*command, str(recipe)]
    if command[0] == "recipes":
        words += ["--data", "/dev/zero"]
    else:
        recipe.write_text(
            "# @package _global_\ndefaults:\n  - override /model: tiny\ndata: {train: {mine: {path: /dev/zero}}}\n"
        )
        words += [f"model.path={tiny_base}"]
    assert main(words) == 3
    assert "/dev/zero is a device, not a file" in capsys.readouterr().err


def tree(root: Path) -> None:
    for name in ("a.jsonl", "x/b.jsonl", "x/y/c.jsonl", "x/y/d.txt", ".hidden/e.jsonl", "x/.f.jsonl", "z/a.jsonl"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(LINE)


@pytest.mark.parametrize(
    "pattern",
    ["*.jsonl", "**/*.jsonl", "**", "*/b.jsonl", "x/**/c.jsonl", "x/*/*", "**/y", "[xz]/?.jsonl", "**/**/a.jsonl", "q*",
     ".*/*.jsonl", "x/.*", "*/", "x/y/../*.jsonl", "a.jsonl/*", "**/a.jsonl"],
)  # fmt: skip
def test_patterns_match_as_the_standard_library_does(tmp_path: Path, pattern: str) -> None:
    import glob

    tree(tmp_path)
    expected = sorted({Path(name) for name in glob.glob(str(tmp_path / pattern), recursive=True)})
    assert [path for path in matching_files(f"{tmp_path}/{pattern}") if path != tmp_path] == [
        path for path in expected if path != tmp_path
    ]


def test_relative_patterns_and_loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert [str(path) for path in matching_files("x/*.jsonl")] == ["x/b.jsonl"]
    assert [str(path) for path in matching_files("**/c.jsonl")] == ["x/y/c.jsonl"]
    (tmp_path / "x" / "up").symlink_to(tmp_path)
    assert Path("x/y/c.jsonl") in matching_files("**/c.jsonl")


def test_a_pattern_over_a_whole_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "MOST_DIRECTORIES", 30)
    text = refusal("/**/*.jsonl")
    assert "/**/*.jsonl leads through more than 30 directories" in text and "directory of the data" in text
    tree(tmp_path)
    monkeypatch.setattr(paths, "MOST_ENTRIES", 5)
    assert "more than 30 directories or 5 entries" in refusal(tmp_path / "**" / "*.jsonl")


def test_blank_lines_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_text, "MAX_BLANK_LINES", 1000)
    with gzip.open(tmp_path / "rows.jsonl.gz", "wb") as file:
        file.write(LINE.encode() + b"\n" * 999 + LINE.encode() + b" \n" * 5000)
    assert "1,000 blank lines one after the other, up to line 2,002" in refusal(tmp_path / "rows.jsonl.gz")
    (tmp_path / "rows.csv").write_text("prompt,completion\na,b\n" + "\n" * 2000)
    assert "blank lines" in refusal(tmp_path / "rows.csv")


def test_lines_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_text, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(read_text, "MAX_UNBROKEN_BYTES", 5000)
    monkeypatch.setattr(read_text, "_PIECE_BYTES", 500)
    (tmp_path / "rows.jsonl").write_text(LINE + "x" * 4900 + "\n" + LINE)
    assert [type(row) for row in read(tmp_path / "rows.jsonl")] == [Record, BadRecord, Record]
    (tmp_path / "rows.jsonl").write_text(LINE + "x" * 6000)
    assert "line 2 does not end within 5,000 bytes" in refusal(tmp_path / "rows.jsonl")
    (tmp_path / "rows.csv").write_text("prompt,completion\na," + "x" * 2000)
    assert "a line of more than 1,000 characters" in refusal(tmp_path / "rows.csv")


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.csv.gz"])
def test_compressed_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(files, "ALWAYS_INFLATED", 2**20)
    head = "prompt,completion\n" if "csv" in name else ""
    row = f"a,{'b' * 5000}\n" if "csv" in name else LINE.replace("Hi", "Hi" * 2000)
    with gzip.open(tmp_path / name, "wb") as file:
        file.write((head + row * (2**22 // len(row))).encode())
    assert (tmp_path / name).stat().st_size * files.MAX_RATIO < 2**22
    assert "more than 250 times its size" in refusal(tmp_path / name)
    monkeypatch.setattr(files, "ALWAYS_INFLATED", 2**23)
    assert len(read(tmp_path / name)) == 2**22 // len(row)


def test_arrays_are_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_text, "_PIECE_BYTES", 7)
    monkeypatch.setattr(read_text, "MAX_LINE_BYTES", 400)
    content = "\ufeff [ " + LINE + " ,\n" + json.dumps(GOOD | {"id": "\u00e9\u4e2d\U0001f600"}, ensure_ascii=False)
    (tmp_path / "rows.json").write_text(content + ', 12.5, "x", null]\n ')
    rows = read(tmp_path / "rows.json")
    assert [type(row) for row in rows] == [Record, Record, BadRecord, BadRecord, BadRecord]
    assert isinstance(rows[1], Record) and rows[1].id == "\u00e9\u4e2d\U0001f600"
    (tmp_path / "rows.json").write_text("[" + LINE + ', "' + "x" * 3000 + '"]')
    assert "after record 1: Unterminated string starting at within 400 characters" in refusal(tmp_path / "rows.json")
    (tmp_path / "rows.json").write_text("[" + "[" * 100_000)
    assert "cannot be read as one" in refusal(tmp_path / "rows.json")
    for broken in ("[1 2]", "[1,]", "[1", "[1,", "[", "[1] 2", "[1,,2]"):
        (tmp_path / "rows.json").write_text(broken)
        assert "cannot be read as one" in refusal(tmp_path / "rows.json"), broken


def test_giant_values_of_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_VALUES", 1000)
    nested = pa.array([[], [[0] * 5000], [[1]]], pa.list_(pa.list_(pa.int8())))
    text = pa.array(["a", "b", "c"])
    table = pa.table({"prompt": text, "completion": text, "x": nested})
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=3)
    assert "column x.list.element.list.element has 5,002 values in 3 records" in refusal(tmp_path / "rows.parquet")
    many = pa.concat_tables([table, table.slice(0, 1), *[table.slice(2, 1)] * 20])
    parquet.write_table(many, tmp_path / "rows.parquet")
    first, giant, *others = read(tmp_path / "rows.parquet")
    assert isinstance(first, Record) and isinstance(giant, BadRecord) and "5,004 values" in giant.reason
    assert len(others) == 22 and all(isinstance(row, Record) for row in others)
    monkeypatch.setattr(readers, "MAX_VALUES", 10**6)
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1000)
    assert [isinstance(row, Record) for row in read(tmp_path / "rows.parquet")] == [True, False, *[True] * 22]
    monkeypatch.setattr(readers, "MAX_COLUMN_VALUES", 4000)
    assert "and they would not fit into memory" in refusal(tmp_path / "rows.parquet")


def test_texts_that_repeat_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 10_000)
    sizes: list[int] = []
    converted = readers._table_records

    def counted(batch: Any) -> Any:
        sizes.append(len(batch))
        return converted(batch)

    monkeypatch.setattr(readers, "_table_records", counted)
    for length, expected in ((10, [64, 36]), (3000, [1] * 100)):
        sizes.clear()
        column = pa.array(["b" * length] * 100)
        parquet.write_table(pa.table({"prompt": column, "completion": column}), tmp_path / "rows.parquet")
        assert len(read(tmp_path / "rows.parquet")) == 100 and sizes == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x00" * 5000, "zero bytes"),
        (LINE.encode("utf-16-le"), "zero bytes"),
        (LINE.encode("utf-16-be"), "zero bytes"),
        (gzip.compress(b"\x00" * 5000, mtime=0), "zero bytes"),
        (gzip.compress(gzip.compress(LINE.encode(), mtime=0), mtime=0), "gzipped twice"),
        (b"\x28\xb5\x2f\xfd....", "zstd -d"),
        (b"BZh9....", "bzip2 -d"),
        (b"\xfd7zXZ\x00....", "xz -d"),
        (b"PK\x03\x04....", "a zip archive"),
        (b"PAR1....", "name it .parquet"),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_other_formats_are_named(tmp_path: Path, content: bytes, words: str, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert words in refusal(tmp_path / name)


def test_faults_do_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "MOST_BAD_RECORDS", 20)
    (tmp_path / "rows.json").write_text("[" + LINE + ",0" * 1000 + "]")
    config = DataConfig(train={"mine": SourceConfig(path=str(tmp_path / "rows.json"))}, cache=False)
    with pytest.raises(InputError, match=r"20 records are left out, of 2\d"):
        load_split(config, "train", check=False)


def test_recipes_without_end_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "long.yaml").write_text("# " + "x" * 5000)
    monkeypatch.setattr(layers, "MOST_CHARACTERS", 4000)
    for name, words in (("zero", "is not a file"), ("pipe", "is not a file"), ("long", "more than 4,000 characters")):
        assert main(["data", "stats", str(tmp_path / f"{name}.yaml")]) == 2
        assert words in capsys.readouterr().err
