"""Examples and their records as Arrow tables: written batch by batch and read in place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from finetune.config.schema import DataForm, ThinkTags
from finetune.data.harmony.render import Example
from finetune.data.sources import RawRecord, Record, parse_record, raw_record
from finetune.files import JsonObject

EXAMPLES_FILE, RECORDS_FILE = "examples.arrow", "records.arrow"

_EXAMPLES = pa.schema(
    [
        ("ids", pa.list_(pa.int32())),
        ("weights", pa.list_(pa.float32())),
        ("channels", pa.list_(pa.int8())),
        ("id", pa.string()),
        ("record", pa.int64()),
        ("num_without_thinking", pa.int32()),
        ("shared", pa.int32()),
        ("score", pa.float64()),
    ]
)
_RECORDS = pa.schema([("where", pa.string()), ("form", pa.string()), ("raw", pa.large_string())])
_TOKENS_PER_BATCH = 2**20


@dataclass(frozen=True, eq=False)
class Tables:
    """The output of a `TableWriter`.

    Attributes:
        examples, records: Arrow tables over memory-mapped files, or over memory.
    """

    examples: pa.Table
    records: pa.Table


class TableWriter:
    """Writes examples and records as they come; buffers about a million tokens.

    Args:
        directory: where the two files are written. None: into memory.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._sinks = [
            pa.BufferOutputStream() if directory is None else pa.OSFile(str(directory / name), "wb")
            for name in (EXAMPLES_FILE, RECORDS_FILE)
        ]
        schemas = (_EXAMPLES, _RECORDS)
        self._writers = [pa.ipc.new_file(sink, schema) for sink, schema in zip(self._sinks, schemas, strict=True)]
        self._examples: list[tuple[Example, int]] = []
        self._records: list[tuple[str, str, str]] = []
        self._num_records = self._num_tokens = 0

    def add(self, raw: RawRecord, form: DataForm, examples: Sequence[Example]) -> None:
        """Add a record and the examples made of it."""
        self._records.append((raw.where, form, _as_json(raw.raw)))
        self._examples += [(example, self._num_records) for example in examples]
        self._num_records += 1
        self._num_tokens += sum(len(example.ids) for example in examples)
        if self._num_tokens >= _TOKENS_PER_BATCH:
            self._flush()

    def close(self) -> Tables:
        """Write the rest and open the tables."""
        self._flush()
        for writer in self._writers:
            writer.close()
        buffers = [sink.getvalue() for sink in self._sinks] if self._directory is None else []
        for sink in self._sinks:
            sink.close()
        return open_tables(self._directory) if self._directory is not None else Tables(*map(_opened, buffers))

    def abandon(self) -> None:
        """Close the files after a failure, whatever their contents."""
        for sink in self._sinks:
            sink.close()

    def _flush(self) -> None:
        if self._examples:
            examples = [example for example, _ in self._examples]
            columns = [
                _list_array([example.ids for example in examples], pa.int32()),
                _list_array([example.weights for example in examples], pa.float32()),
                _list_array([example.channels for example in examples], pa.int8()),
                pa.array([example.id for example in examples], pa.string()),
                pa.array([record for _, record in self._examples], pa.int64()),
                pa.array([example.num_without_thinking for example in examples], pa.int32()),
                pa.array([example.shared for example in examples], pa.int32()),
                pa.array([example.score for example in examples], pa.float64()),
            ]
            self._writers[0].write_batch(pa.record_batch(columns, schema=_EXAMPLES))
        if self._records:
            fields = zip(*self._records, strict=True)
            columns = [pa.array(values, field.type) for values, field in zip(fields, _RECORDS, strict=True)]
            self._writers[1].write_batch(pa.record_batch(columns, schema=_RECORDS))
        self._examples, self._records, self._num_tokens = [], [], 0


def open_tables(directory: Path) -> Tables:
    """Map the files of finished tables into memory; their bytes are read on access."""
    paths = (str(directory / EXAMPLES_FILE), str(directory / RECORDS_FILE))
    return Tables(*(_opened(pa.memory_map(path)) for path in paths))


class ExampleTable(Sequence[Example]):
    """The examples of a table; each is created on access, over the table's own bytes (so read-only).

    Attributes:
        lengths: int64 [n], tokens of each example, known without creating any.
    """

    def __init__(self, tables: Tables) -> None:
        self._batches = tables.examples.to_batches()
        self._where = _TextColumn(tables.records, "where")
        self._starts = np.cumsum([0] + [len(batch) for batch in self._batches])
        names = ("ids", "weights", "channels")
        self._columns = [[_flat(batch.column(name)) for name in names] for batch in self._batches]
        lengths = [np.diff(columns[0][0]) for columns in self._columns]
        self.lengths: NDArray[np.int64] = np.concatenate([np.zeros(0), *lengths]).astype(np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Example, ...]: ...

    def __getitem__(self, index: int | slice) -> Example | tuple[Example, ...]:
        if isinstance(index, slice):
            return tuple(self[number] for number in range(len(self))[index])
        number = range(len(self))[index]
        chunk = int(np.searchsorted(self._starts, number, side="right")) - 1
        place = number - int(self._starts[chunk])
        batch = self._batches[chunk]
        ids, weights, channels = (
            values[offsets[place] : offsets[place + 1]] for offsets, values in self._columns[chunk]
        )
        names = ("id", "record", "num_without_thinking", "shared", "score")
        name, record, *counts = (batch.column(column)[place].as_py() for column in names)
        return Example(ids, weights, name, self._where[record], channels, *counts)


def example_lengths(examples: Sequence[Example]) -> list[int]:
    """Tokens of each example, without creating the examples of a table."""
    if isinstance(examples, ExampleTable):
        return examples.lengths.tolist()
    return [len(example.ids) for example in examples]


class RecordTable(Sequence[Record]):
    """The record of each example (`records[i]` is the one of `examples[i]`), parsed on access.

    Args:
        tables: where they are stored.
        think_tags: as `data.think_tags` when they were tokenised.
    """

    def __init__(self, tables: Tables, think_tags: ThinkTags = "keep") -> None:
        self._think_tags: ThinkTags = think_tags
        self._of_example = tables.examples.column("record").to_numpy()
        self._where, self._form, self._raw = (_TextColumn(tables.records, name) for name in ("where", "form", "raw"))

    def __len__(self) -> int:
        return len(self._of_example)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Record, ...]: ...

    def __getitem__(self, index: int | slice) -> Record | tuple[Record, ...]:
        if isinstance(index, slice):
            return tuple(self[number] for number in range(len(self))[index])
        record = int(self._of_example[range(len(self))[index]])
        raw = json.loads(self._raw[record])
        form = cast(DataForm, self._form[record])
        return parse_record(raw_record(self._where[record], raw), form, self._think_tags)

    def first_examples(self) -> NDArray[np.int64]:
        """int64 [num_records]: index of each record's first example, for visiting every record once."""
        return np.unique(self._of_example, return_index=True)[1].astype(np.int64)


class _TextColumn:
    """Random access to a column of text in a table of many batches."""

    def __init__(self, table: pa.Table, name: str) -> None:
        self._chunks = table.column(name).chunks
        self._starts = np.cumsum([0] + [len(chunk) for chunk in self._chunks])

    def __getitem__(self, number: int) -> str:
        chunk = int(np.searchsorted(self._starts, number, side="right")) - 1
        return cast(str, self._chunks[chunk][number - int(self._starts[chunk])].as_py())


def _as_json(raw: JsonObject) -> str:
    """JSON without escapes, which triple the size of most scripts, unless half a character needs one."""
    text = json.dumps(raw, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(raw, default=str)
    return text


def _opened(source: Any) -> pa.Table:
    return pa.ipc.open_file(source).read_all()


def _list_array(parts: Sequence[NDArray[Any]], kind: pa.DataType) -> pa.ListArray:
    offsets = np.cumsum([0] + [len(part) for part in parts]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(parts), kind))


def _flat(column: pa.ListArray) -> tuple[NDArray[np.int32], NDArray[Any]]:
    """Offsets and values of a list column without a copy."""
    return column.offsets.to_numpy(), column.values.to_numpy()
