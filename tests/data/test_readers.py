"""Every format gives the same records, and whatever is wrong with a file is named with the place."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from finetune.config.schema import SourceConfig
from finetune.data import read_text
from finetune.data.sources import BadRecord, RawRecord, Record, read_raw_records, read_records
from finetune.errors import ConfigError, FinetuneError, InputError

ROWS = [
    {
        "id": f"r{number}",
        "year": 1990 + number,
        "answer": str(number),
        "messages": [
            {"role": "user", "content": f"What is 0 + {number}, “exactly”?"},
            {"role": "assistant", "content": str(number), "thinking": "easy"},
        ],
    }
    for number in range(1, 6)
]
TABLE = [row | {"note": None} for row in ROWS]


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def write_array(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=1))


def write_csv(path: Path, delimiter: str = ",") -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(ROWS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(row | {"messages": json.dumps(row["messages"], indent=1)} for row in ROWS)
    packed = text.getvalue().encode()
    path.write_bytes(gzip.compress(packed) if path.suffix == ".gz" else packed)


def write_parquet(path: Path) -> None:
    parquet.write_table(pa.Table.from_pylist(TABLE), path)


WRITERS = {
    "rows.jsonl": write_jsonl,
    "rows.json": write_array,
    "one_line.json": lambda path: path.write_text(json.dumps(ROWS)),
    "rows.csv": write_csv,
    "rows.csv.gz": write_csv,
    "rows.tsv": lambda path: write_csv(path, "\t"),
    "rows.parquet": write_parquet,
    "saved": lambda path: datasets.Dataset.from_list(TABLE).save_to_disk(path),
}


def read(path: Path | str, **settings: Any) -> list[Record | BadRecord]:
    return list(read_records("mine", SourceConfig(path=str(path), **settings)))


def refusal(kind: type[FinetuneError], path: Path | str, **settings: Any) -> str:
    with pytest.raises(kind) as caught:
        read(path, **settings)
    assert "`mine`" in str(caught.value), "the source's name in the recipe"
    return str(caught.value)


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_records(tmp_path: Path, name: str) -> None:
    write_jsonl(tmp_path / "expected.jsonl")
    WRITERS[name](tmp_path / name)
    expected, found = read(tmp_path / "expected.jsonl"), read(tmp_path / name)
    assert len(found) == 5
    for one, other in zip(expected, found, strict=True):
        assert isinstance(one, Record) and isinstance(other, Record)
        assert (one.id, one.answer, one.conversation, dict(one.fields)) == (
            other.id,
            other.answer,
            other.conversation,
            dict(other.fields),
        )
        assert other.where.startswith(f"{tmp_path / name}")
    places = [row.where.removeprefix(str(tmp_path / name)) for row in found]
    if "csv" in name or "tsv" in name:
        assert places[:2] == [":2", ":13"], "the line on which the row begins, whatever its cells hold"
    else:
        assert places == [f"{':' if 'jsonl' in name else '#'}{number}" for number in range(1, 6)]
    kept = read(tmp_path / name, where={"year": "1992"})
    assert [row.id for row in kept if isinstance(row, Record)] == ["r2"]
    assert len(read(tmp_path / name, limit=3)) == 3


def test_globs_take_files_in_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        write_jsonl(tmp_path / name)
    (tmp_path / "c.jsonl").mkdir()
    write_parquet(tmp_path / "part.parquet")
    found = read(tmp_path / "*.jsonl")
    assert [row.where for row in found[::5]] == [f"{tmp_path / 'a.jsonl'}:1", f"{tmp_path / 'b.jsonl'}:1"]
    assert len(read(tmp_path / "*.[jp]*")) == 15, "formats may differ"
    assert len(read(tmp_path / "*.jsonl", limit=7)) == 7, "the limit is the source's"
    (tmp_path / "sub").mkdir()
    write_jsonl(tmp_path / "sub" / "d.jsonl")
    assert len(read(tmp_path / "**" / "*.jsonl")) == 15
    assert "no file matches" in refusal(InputError, tmp_path / "*.csv")
    assert "directories only" in refusal(InputError, tmp_path / "c.json[l]")
    shipped = read("shipped://legal/*.jsonl.gz", limit=2)
    assert shipped[1].where == "shipped://legal/cuad_clause_type.jsonl.gz:2"


def test_a_name_with_brackets_is_a_name_if_it_exists(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows[1].jsonl")
    assert len(read(tmp_path / "rows[1].jsonl")) == 5


def test_columns_are_renamed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    renamed = [{"conv": row["messages"], "label": row["answer"], "answer": "not this", "messages": 3} for row in ROWS]
    path.write_text("".join(json.dumps(row) + "\n" for row in renamed))
    found = read(path, columns={"messages": "conv", "answer": "label"})
    assert [row.answer for row in found if isinstance(row, Record)] == ["1", "2", "3", "4", "5"]
    assert all(isinstance(row, BadRecord) for row in read(path)), "without them the rows are wrong"
    swapped = read(
        path, columns={"messages": "conv", "answer": "label", "label": "answer"}, where={"label": "not this"}
    )
    assert len(swapped) == 5
    text = refusal(ConfigError, path, columns={"messages": "convs"})
    assert "columns.messages" in text and "did you mean conv?" in text


def test_a_column_may_be_missing_in_some_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"messages": ROWS[0]["messages"]}, {"messages": ROWS[1]["messages"], "label": "2"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row.answer for row in read(path, columns={"answer": "label"}) if isinstance(row, Record)] == [None, "2"]


def test_splits_of_a_saved_dataset_dict(tmp_path: Path) -> None:
    path = tmp_path / "saved"
    both = {"train": datasets.Dataset.from_list(TABLE[:4]), "held_out": datasets.Dataset.from_list(TABLE[4:])}
    datasets.DatasetDict(both).save_to_disk(path)
    assert [row.where for row in read(path, split="held_out")] == [f"{path}[held_out]#1"]
    assert len(read(path, split="train")) == 4
    assert "choose one: split: train" in refusal(ConfigError, path)
    assert "did you mean held_out?" in refusal(ConfigError, path, split="heldout")
    datasets.Dataset.from_list(TABLE).save_to_disk(tmp_path / "plain")
    assert "has no splits" in refusal(ConfigError, tmp_path / "plain", split="train")
    write_jsonl(tmp_path / "rows.jsonl")
    assert "has no splits" in refusal(ConfigError, tmp_path / "rows.jsonl", split="train")


def test_a_hub_name_goes_to_load_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`load_dataset` takes a local folder where it takes a hub name, so the same code runs without a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Path("owner/name").mkdir(parents=True)
    write_parquet(Path("owner/name/train.parquet"))
    whole = read("hub://owner/name", split="train")
    assert [row.id for row in whole if isinstance(row, Record)] == ["r1", "r2", "r3", "r4", "r5"]
    assert whole[0].where == "hub://owner/name[train]#1"
    streamed = read("hub://owner/name", split="train", streaming=True, limit=2)
    assert [row.id for row in streamed if isinstance(row, Record)] == ["r1", "r2"]
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(FinetuneError, match="hub://owner/none"):
        read("hub://owner/none")


def test_without_datasets_the_installation_is_suggested(tmp_path: Path) -> None:
    datasets.Dataset.from_list(TABLE).save_to_disk(tmp_path / "saved")
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "from finetune.config.schema import SourceConfig\nfrom finetune.data.sources import read_records\n"
        "from finetune.errors import MachineError\n"
        "try: list(read_records('mine', SourceConfig(path=sys.argv[1])))\n"
        "except MachineError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "saved"], capture_output=True, text=True, check=True)
    assert 'pip install "gpt-oss-finetune[data]"' in done.stdout


def test_other_directories_are_refused_with_the_way_out(tmp_path: Path) -> None:
    text = refusal(InputError, tmp_path)
    assert "not one that `datasets` saved" in text and "*.jsonl" in text


HEADER = b"prompt,completion\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (HEADER, "a header and no record"),
        (b"a,b,a\n1,2,3\n", "names a column twice: a"),
        (b"a,,b\n1,2,3\n", "a column without a name"),
        (b"a,caf\xe9\n1,2\n", "is not UTF-8"),
        (HEADER + b'1,"never closed\n' * 3, "quote that is not closed"),
        (HEADER + b'1,"a"b\n', "cannot be followed after line 2"),
    ],
)
def test_broken_csv_files_are_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    text = refusal(InputError, path)
    assert words in text and str(path) in text


def test_json_in_cells_is_read_as_json_in_records_is(tmp_path: Path) -> None:
    """One reader: what it refuses inside a record it refuses in a cell, NaN among it."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["messages", "tools"])
    schema = json.dumps([{"name": "f", "parameters": {"type": "object"}}])
    for tools in (schema, schema.replace('"object"', "NaN"), "[{"):
        writer.writerow([json.dumps(ROWS[0]["messages"]), tools])
    (tmp_path / "rows.csv").write_text(text.getvalue())
    good, nan, broken = read(tmp_path / "rows.csv")
    assert isinstance(good, Record) and good.conversation.tools.functions[0].name == "f"
    assert isinstance(nan, BadRecord) and "`tools` contains NaN" in nan.reason
    assert isinstance(broken, BadRecord) and broken.kind == "bad JSON inside"


def test_broken_csv_rows_are_named_and_skipped(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    long = b"x" * 300_000
    path.write_bytes(HEADER + b'"2\n+ 2?",4\n1,2,3\ncaf\xe9,4\n' + long + b",4\n\nlast?,4\n")
    found = read(path)
    assert [type(row) for row in found] == [Record, BadRecord, BadRecord, Record, Record]
    assert [row.where.rsplit(":", 1)[1] for row in found] == ["2", "4", "5", "6", "8"]
    assert [row.reason for row in found if isinstance(row, BadRecord)] == [
        "the row has 3 cells, the header 2",
        "the cell of column `prompt` is not UTF-8 text",
    ]


def test_damaged_parquet_and_dataset_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    write_parquet(path)
    whole = path.read_bytes()
    for damaged in (
        b"",
        b"PAR1",
        whole[: len(whole) // 2],
        whole[:60] + b"\xff" * 200 + whole[260:],
        b"\x1f\x8b" + whole,
    ):
        path.write_bytes(damaged)
        assert "cannot be read as Parquet" in refusal(InputError, path)
    parquet.write_table(pa.table({"messages": pa.array([], pa.string())}), path)
    assert "has no record" in refusal(InputError, path)
    saved = tmp_path / "saved"
    datasets.Dataset.from_list(TABLE).save_to_disk(saved)
    arrow = next(saved.glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:100])
    assert "cannot be read" in refusal(InputError, saved)


def test_mixed_types_are_named_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    content = [
        ROWS[0],
        {"messages": 3},
        {"messages": {"role": "user"}},
        {"messages": ["x"]},
        ROWS[1] | {"id": [1.5]},
        ROWS[2],
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    assert [isinstance(row, Record) for row in read(path)] == [True, False, False, False, False, True]
    parquet.write_table(pa.table({"messages": pa.array([1, 2, 3])}), tmp_path / "rows.parquet")
    assert [
        row.where.rsplit("#", 1)[1] for row in read(tmp_path / "rows.parquet") if isinstance(row, BadRecord)
    ] == list("123")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "an empty array"),
        ("[{}", "cannot be read as one"),
        ("[" * 100_000, "too deeply"),
        ("[1, 2]\n[3]\n", "write one record per line"),
    ],
)
def test_broken_arrays_are_named(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    assert words in refusal(InputError, path)


WRAPPED = {"version": 1, "data": ROWS}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", json.dumps(ROWS[0]).encode("utf-16"), "is UTF-16"),
        ("rows.csv", "prompt,completion\n1,2\n".encode("utf-16"), "is UTF-16"),
        ("rows.json", json.dumps(WRAPPED, indent=1).encode(), "keep the list under `data` alone"),
        (
            "rows.json.gz",
            gzip.compress(json.dumps(WRAPPED, indent=1).encode(), mtime=0),
            "one JSON object over several lines",
        ),
        ("rows.jsonl", json.dumps(ROWS[0], indent=1).encode(), "write one record per line"),
        ("rows.txt", b"It was a bright cold day.\nAnd so on.\n", '{"text": "..."} per line'),
        ("rows.csv", b"prompt;completion\n1;2\n", "a semicolon seems to separate its cells"),
        ("rows.csv", b"prompt\tcompletion\n1\t2\n", "or name it .tsv"),
    ],
)
def test_a_file_of_another_kind_is_named_as_what_it_is(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert words in refusal(InputError, path)


def test_files_of_odd_names_or_first_lines_are_still_read(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.txt")
    assert all(isinstance(row, Record) for row in read(tmp_path / "rows.txt"))
    (tmp_path / "rows.jsonl").write_text('{"messages": [\n' + json.dumps(ROWS[0]) + "\n")
    bad, good = read(tmp_path / "rows.jsonl")
    assert isinstance(bad, BadRecord) and bad.kind == "broken JSON" and isinstance(good, Record)


def test_members_of_an_array_that_are_no_records(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([ROWS[0], 7, ROWS[1]])[:-1] + ', {"a": 1, "a": 2}]')
    first, bad, last, twice = read(path)
    assert isinstance(first, Record) and isinstance(last, Record)
    assert isinstance(bad, BadRecord) and (bad.where, bad.kind) == (f"{path}#2", "not an object")
    assert isinstance(twice, BadRecord) and (twice.where, twice.kind) == (f"{path}#4", "repeated key")


def test_a_line_too_long_to_be_a_record_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_text, "MAX_LINE_BYTES", 5_000)
    monkeypatch.setattr(read_text, "_PIECE_BYTES", 700)
    path = tmp_path / "rows.jsonl"
    good = json.dumps(ROWS[0])
    path.write_text("\n".join([good, "x" * 20_000, good, "y" * 20_000]))
    found = read(path)
    assert [row.kind if isinstance(row, BadRecord) else "good" for row in found] == [
        "good",
        "line too long",
        "good",
        "line too long",
    ]
    assert [row.where.rsplit(":", 1)[1] for row in found] == list("1234")


def test_text_quoted_from_a_record_cannot_steer_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps("\x1b[31m red \x07") + "\n" + json.dumps({"messages": "\x9b31m\u202e"}) + "\n")
    reasons = " ".join(row.reason for row in read(path) if isinstance(row, BadRecord))
    assert "red" in reasons
    assert not any(character in reasons for character in "\x1b\x07\x9b\u202e")


def test_nulls_of_tables_are_no_keys(tmp_path: Path) -> None:
    write_parquet(tmp_path / "rows.parquet")
    first = next(read_raw_records("mine", SourceConfig(path=str(tmp_path / "rows.parquet"))))
    assert isinstance(first, RawRecord)
    assert "note" not in first.raw, "null in the file"
    messages = [{key: value for key, value in each.items() if value is not None} for each in first.raw["messages"]]
    assert first.raw | {"messages": messages} == ROWS[0], "nulls further inside stay, for `is_padded`"
