"""Rows of CSV, Parquet and `datasets` as plain objects like those of JSON."""

from __future__ import annotations

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
from finetune.data.files import MAX_LINE_BYTES, Row, broken_file, open_bytes, refuse_other_delimiter, refuse_utf16
from finetune.data.message import BadRecordError
from finetune.errors import ConfigError, InputError, MachineError

_ROWS_AT_A_TIME = 256


def read_csv(place: str, label: str, path: Path, delimiter: str) -> Iterator[Row]:
    """Read a CSV or TSV file whose first line names the columns; every value is text, an empty cell is no value.

    Args:
        place: source and file, for messages.
        label: what rows call the file.
        path: plain or gzipped.
        delimiter: between cells.

    Raises:
        InputError: no header or an ambiguous one, no row, or quoting that cannot be followed.
    """
    csv.field_size_limit(MAX_LINE_BYTES)  # the standard library stops at 128 KiB a cell
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
                        yield f"{label}:{start}", _csv_row(header, cells)
                    start = rows.line_num + 1
        except csv.Error as error:
            raise InputError(
                f"{place} cannot be followed after line {rows.line_num:,}",
                why=f"{error}; a quote that is not closed swallows the lines after it",
                fix="correct the quoting there; what comes after cannot be told apart",
            ) from None
    if empty:
        raise InputError(f"{place} has a header and no row")


def _check_header(place: str, header: Sequence[str]) -> None:
    if not header:
        raise InputError(f"{place} is empty", fix="the first line names the columns")
    refuse_other_delimiter(place, header)
    problem = None
    if len(set(header)) < len(header):
        problem = f"names a column twice: {next(name for name in header if header.count(name) > 1)}"
    elif "" in (name.strip() for name in header):
        problem = "leaves a column without a name"
    elif _broken(header):
        problem = "is not UTF-8"
    if problem:
        raise InputError(f"{place}: its first line {problem}", fix="name every column once in the first line")


def _csv_row(header: Sequence[str], cells: Sequence[str]) -> dict[str, Any] | BadRecordError:
    if len(cells) != len(header):
        return BadRecordError("wrong number of cells", f"the row has {len(cells)} cells, the header {len(header)}")
    if _broken(cells):
        column = next(name for name, cell in zip(header, cells, strict=True) if _broken([cell]))
        return BadRecordError("not UTF-8", f"the cell of column `{column}` is not UTF-8 text")
    return {name: cell for name, cell in zip(header, cells, strict=True) if cell != ""}


def _broken(cells: Sequence[str]) -> bool:
    """Whether a byte that is not UTF-8 was read: `surrogateescape` leaves it as half a surrogate pair."""
    return any("\udc80" <= character <= "\udcff" for cell in cells if not cell.isascii() for character in cell)


def read_parquet(place: str, label: str, path: Path) -> Iterator[Row]:
    """Read a Parquet file, a few rows at a time.

    Raises:
        InputError: it is not Parquet, damaged, or has no row.
    """
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS_AT_A_TIME):
                for raw in batch.to_pylist():
                    number += 1
                    yield f"{label}#{number}", plain_object(raw)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{place} cannot be read as Parquet after row {number:,}",
            why=str(error).splitlines()[0],
            fix="write or download it again; Parquet needs no gzip around it",
        ) from None
    if number == 0:
        raise InputError(f"{place} has no row")


def read_dataset_directory(place: str, label: str, path: Path, source: SourceConfig) -> Iterator[Row]:
    """Read what `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote, memory-mapped.

    Raises:
        ConfigError: it has splits and the source names none, or one that is not there.
        InputError: it is damaged.
        MachineError: `datasets` is not installed.
    """
    datasets = _datasets(place)
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # pyarrow's, json's and datasets' own errors for damaged files have no common class
        raise InputError(f"{place} cannot be read by `datasets`", why=_first_line(error)) from None
    yield from _rows_of(place, label, _split(place, loaded, source.split), source)


def read_hub(name: str, source: SourceConfig) -> Iterator[Row]:
    """Read a data set of the hub through `datasets`; no code from its repository runs.

    Raises:
        ConfigError: see `read_dataset_directory`.
        InputError: the hub has no such data set, or it cannot be read.
        MachineError: `datasets` is not installed, or there is no network.
    """
    place = f"source `{name}`: {source.path}"
    datasets = _datasets(place)
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
    yield from _rows_of(place, source.path, _split(place, loaded, source.split), source)


def _datasets(place: str) -> Any:
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


def _split(place: str, loaded: Any, split: str | None) -> Any:
    """The one split that is meant."""
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


def _rows_of(place: str, label: str, rows: Any, source: SourceConfig) -> Iterator[Row]:
    number, iterator = 0, iter(rows)
    label = f"{label}[{source.split}]" if source.split else label
    while True:
        try:
            batch = list(islice(iterator, _ROWS_AT_A_TIME))
        except Exception as error:  # as above
            raise InputError(f"{place} cannot be read after row {number:,}", why=_first_line(error)) from None
        if not batch:
            break
        for raw in batch:
            number += 1
            yield f"{label}#{number}", plain_object(raw)
    if number == 0:
        raise InputError(f"{place} has no row")


def plain_object(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a table as JSON would have it: columns give every row every key, so null means no key."""
    return {str(key): _plain(value) for key, value in raw.items() if not _missing(value)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return plain_object(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
