"""Read the records of JSONL, JSON, CSV, Parquet, saved datasets and the hub as plain objects, each with its place.

A fault of one record is a `BadRecordError` in its place; a fault of a whole file is an `InputError`.
"""

from __future__ import annotations

import codecs
import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from finetune.config.paths import HUB_PREFIX
from finetune.config.schema import SourceConfig
from finetune.config.suggest import suggest_word
from finetune.data.checks import BadRecordError, parse_json
from finetune.data.files import (
    broken_file,
    find_files,
    label_of,
    open_bytes,
    refuse_other_delimiter,
    refuse_plain_text,
    refuse_utf16,
    refuse_whole_object,
)
from finetune.errors import ConfigError, InputError, MachineError
from finetune.files import JsonObject

PlacedRecord = tuple[str, JsonObject | BadRecordError]
"""The place (`file:line` for text, `file#n` for the n-th record of other formats) and the record, or its fault."""

MAX_LINE_BYTES = 2**28
"""A line longer than 256 MiB is no record; it is skipped in pieces, so that it cannot fill the memory."""

_PIECE_BYTES = 2**20
_RECORDS_PER_BATCH = 256


def read_source(name: str, source: SourceConfig) -> Iterator[PlacedRecord]:
    """Read one source's records in the order of its files, whatever their format.

    Args:
        name: the source's name in the recipe, for messages.
        source: which files.

    Raises:
        ConfigError: `split` is needed and not set, or set and not there.
        InputError: a file is missing, empty, unreadable, or broken beyond one record.
        MachineError: `datasets` is needed and not installed.
    """
    if source.path.startswith(HUB_PREFIX):
        yield from read_hub(name, source)
        return
    for path in find_files(name, source.path):
        label = label_of(source.path, path)
        place = f"source `{name}`: {label}"
        if path.is_dir():
            yield from read_dataset_directory(place, label, path, source)
            continue
        if source.split is not None:
            raise ConfigError(f"{place} is a file and has no splits", fix="use `where` on one of its fields")
        suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
        if suffix == ".parquet":
            yield from read_parquet(place, label, path)
        elif suffix in (".csv", ".tsv"):
            yield from read_csv(place, label, path, "\t" if suffix == ".tsv" else ",")
        else:
            yield from read_json(place, label, path)


def read_json(place: str, label: str, path: Path) -> Iterator[PlacedRecord]:
    """Read JSON lines, or one JSON array if the content begins with `[`.

    Args:
        place: source and file, for messages.
        label: the file's name in the places of its records.
        path: plain or gzipped.

    Raises:
        InputError: the file is empty, unreadable or of another kind.
    """
    with broken_file(place, lambda: "its beginning"), open_bytes(path) as file:
        start = file.read(4096)
    refuse_utf16(place, start)
    start = start.removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b"["):
        yield from _read_array(place, label, path)
        return
    refuse_plain_text(place, path, start)
    if _begins_a_spread_object(start):
        with broken_file(place, lambda: "its beginning"), open_bytes(path) as file:
            refuse_whole_object(place, file.read(MAX_LINE_BYTES))
    empty = True
    for number, line in _lines(place, path):
        empty = False
        try:
            yield f"{label}:{number}", _parse_object(line)
        except BadRecordError as error:
            yield f"{label}:{number}", error
    if empty:
        raise InputError(f"{place} is empty", fix="give a file with one JSON record per line")


def _begins_a_spread_object(start: bytes) -> bool:
    """Whether a first line is the beginning of an object, but not a whole one."""
    first, line_end, _ = start.partition(b"\n")
    return bool(line_end) and first.rstrip().endswith((b"{", b"[", b","))


def _lines(place: str, path: Path) -> Iterator[tuple[int, bytes | BadRecordError]]:
    """Yield (line number from 1, line) for every line that is not blank."""
    number = 0
    with broken_file(place, lambda: f"line {number:,}"), open_bytes(path) as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(_PIECE_BYTES)
                yield number, BadRecordError("line too long", f"the line has more than {MAX_LINE_BYTES:,} bytes")
            elif line.strip():
                yield number, line


def _parse_object(line: bytes | BadRecordError) -> JsonObject:
    if isinstance(line, BadRecordError):
        raise line
    try:
        raw = parse_json(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRecordError("not UTF-8", f"the line is not UTF-8 text (byte {error.start + 1} of the line)") from None
    if not isinstance(raw, dict):
        raise BadRecordError("not an object", f"the line is JSON, but not an object: {str(raw)[:40]}")
    return raw


def _read_array(place: str, label: str, path: Path) -> Iterator[PlacedRecord]:
    """One JSON array of records. It is read whole: JSONL is the format for files larger than memory."""
    try:
        with broken_file(place, lambda: "its beginning"), open_bytes(path) as file:
            records = parse_json(file.read().decode("utf-8-sig"), "it")
    except (BadRecordError, UnicodeDecodeError) as error:
        why = error.reason if isinstance(error, BadRecordError) else f"it is not UTF-8: {error}"
        fix = "correct it, or write one record per line (JSONL), which is checked record by record"
        raise InputError(f"{place} begins like a JSON array, but cannot be read as one", why=why, fix=fix) from None
    if not records:
        raise InputError(f"{place} is an empty array")
    for number, raw in enumerate(records, start=1):
        if isinstance(raw, dict):
            yield f"{label}#{number}", raw
        else:
            yield f"{label}#{number}", BadRecordError("not an object", f"the record is not an object: {str(raw)[:40]}")


def read_csv(place: str, label: str, path: Path, delimiter: str) -> Iterator[PlacedRecord]:
    """Read a CSV or TSV file whose first line names the columns; every value is text, an empty cell is no value.

    Args:
        place, label, path: as in `read_json`.
        delimiter: between cells.

    Raises:
        InputError: no header or an ambiguous one, no record, or quoting that cannot be followed.
    """
    csv.field_size_limit(MAX_LINE_BYTES)  # the standard library stops at 128 KiB per cell
    with broken_file(place, lambda: "its beginning"), open_bytes(path) as file:
        refuse_utf16(place, file.read(2))
        file.seek(0)
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            with broken_file(place, lambda: f"line {rows.line_num:,}"):
                header = next(rows, [])
                _check_header(place, header)
                start, empty = rows.line_num + 1, True
                for cells in rows:
                    if cells:
                        empty = False
                        yield f"{label}:{start}", _csv_record(header, cells)
                    start = rows.line_num + 1
        except csv.Error as error:
            raise InputError(
                f"{place} cannot be followed after line {rows.line_num:,}",
                why=f"{error}; a quote that is not closed swallows the lines after it",
                fix="correct the quoting there; the records after it cannot be told apart",
            ) from None
    if empty:
        raise InputError(f"{place} has a header and no record")


def _check_header(place: str, header: Sequence[str]) -> None:
    if not header:
        raise InputError(f"{place} is empty", fix="the first line names the columns")
    refuse_other_delimiter(place, header)
    problem = None
    if len(set(header)) < len(header):
        problem = f"names a column twice: {next(name for name in header if header.count(name) > 1)}"
    elif "" in (name.strip() for name in header):
        problem = "leaves a column without a name"
    elif _not_utf8(header):
        problem = "is not UTF-8"
    if problem:
        raise InputError(f"{place}: its first line {problem}", fix="name every column once in the first line")


def _csv_record(header: Sequence[str], cells: Sequence[str]) -> JsonObject | BadRecordError:
    if len(cells) != len(header):
        return BadRecordError("wrong number of cells", f"the row has {len(cells)} cells, the header {len(header)}")
    if _not_utf8(cells):
        column = next(name for name, cell in zip(header, cells, strict=True) if _not_utf8([cell]))
        return BadRecordError("not UTF-8", f"the cell of column `{column}` is not UTF-8 text")
    return {name: cell for name, cell in zip(header, cells, strict=True) if cell != ""}


def _not_utf8(cells: Sequence[str]) -> bool:
    """Whether a byte that is not UTF-8 was read: `surrogateescape` leaves it as half a surrogate pair."""
    return any("\udc80" <= character <= "\udcff" for cell in cells if not cell.isascii() for character in cell)


def read_parquet(place: str, label: str, path: Path) -> Iterator[PlacedRecord]:
    """Read a Parquet file in batches.

    Raises:
        InputError: it is not Parquet, damaged, or has no record.
    """
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_RECORDS_PER_BATCH):
                for raw in batch.to_pylist():
                    number += 1
                    yield f"{label}#{number}", _plain_object(raw)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{place} cannot be read as Parquet after record {number:,}",
            why=str(error).splitlines()[0],
            fix="write or download it again; Parquet needs no gzip around it",
        ) from None
    if number == 0:
        raise InputError(f"{place} has no record")


def read_dataset_directory(place: str, label: str, path: Path, source: SourceConfig) -> Iterator[PlacedRecord]:
    """Read what `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote, memory-mapped.

    Raises:
        ConfigError: it has splits and the source names none, or one that is not there.
        InputError: it is damaged.
        MachineError: `datasets` is not installed.
    """
    datasets = _import_datasets(place)
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # pyarrow's, json's and datasets' own errors for damaged files have no common class
        raise InputError(f"{place} cannot be read by `datasets`", why=_first_line(error)) from None
    yield from _read_dataset(place, label, _chosen_split(place, loaded, source.split), source)


def read_hub(name: str, source: SourceConfig) -> Iterator[PlacedRecord]:
    """Read a data set of the hub through `datasets`; no code from its repository runs.

    Raises:
        ConfigError: see `read_dataset_directory`.
        InputError: the hub has no such data set, or it cannot be read.
        MachineError: `datasets` is not installed, or there is no network.
    """
    place = f"source `{name}`: {source.path}"
    datasets = _import_datasets(place)
    try:
        loaded = datasets.load_dataset(
            source.path.removeprefix(HUB_PREFIX), source.subset, revision=source.revision, streaming=source.streaming
        )
    except (ConnectionError, TimeoutError) as error:
        fix = "check the network and HF_ENDPOINT; HF_HUB_OFFLINE=1 reads what was downloaded before"
        raise MachineError(f"{place} cannot be reached", why=_first_line(error), fix=fix) from None
    except Exception as error:  # hub, http and format errors have no common class
        fix = "check its name, data.NAME.subset and revision; private ones need HF_TOKEN"
        raise InputError(f"{place} cannot be read", why=_first_line(error), fix=fix) from None
    yield from _read_dataset(place, source.path, _chosen_split(place, loaded, source.split), source)


def _import_datasets(place: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise MachineError(
            f"{place} needs the package `datasets`",
            why="saved dataset directories and hub data sets are read through it",
            fix='pip install "gpt-oss-finetune[data]"',
        ) from None
    datasets.disable_progress_bars()
    return datasets


def _chosen_split(place: str, loaded: Any, split: str | None) -> Any:
    if not isinstance(loaded, Mapping):
        if split is not None:
            raise ConfigError(f"{place} has no splits, but the source names {split}", fix="remove `split`")
        return loaded
    names = list(loaded)
    if split is None and len(names) > 1:
        raise ConfigError(f"{place} has the splits {', '.join(names)}", fix=f"choose one: split: {names[0]}")
    if split is not None and split not in names:
        fix = suggest_word(split, names) or f"it has {', '.join(names)}"
        raise ConfigError(f"{place} has no split {split}", fix=fix)
    return loaded[split or names[0]]


def _read_dataset(place: str, label: str, dataset: Any, source: SourceConfig) -> Iterator[PlacedRecord]:
    number, iterator = 0, iter(dataset)
    label = f"{label}[{source.split}]" if source.split else label
    while True:
        try:
            batch = list(islice(iterator, _RECORDS_PER_BATCH))
        except Exception as error:  # as in `read_hub`
            raise InputError(f"{place} cannot be read after record {number:,}", why=_first_line(error)) from None
        if not batch:
            break
        for raw in batch:
            number += 1
            yield f"{label}#{number}", _plain_object(raw)
    if number == 0:
        raise InputError(f"{place} has no record")


def _plain_object(raw: JsonObject) -> JsonObject:
    """A table's row as JSON would have it: columns give every row every key, so null means no key.

    Nulls further inside stay: `finetune.data.tool_schemas` tells those that Arrow wrote from those that are meant.
    """
    return {str(key): _plain(value) for key, value in raw.items() if not _is_missing(value)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
