"""Read the records of JSONL, JSON, CSV, Parquet, saved datasets and the hub as plain objects, each with its place.

A fault of one record is a `BadRecordError` in its place; a fault of a whole file is an `InputError`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from finetune.config.paths import HUB_PREFIX
from finetune.config.schema import SourceConfig
from finetune.config.suggest import suggest_word
from finetune.data.checks import BadRecordError
from finetune.data.files import (
    find_files,
    label_of,
)
from finetune.data.read_text import MAX_LINE_BYTES, PlacedRecord, read_csv, read_json
from finetune.errors import ConfigError, InputError, MachineError
from finetune.files import JsonObject

MAX_VALUES, MAX_COLUMN_VALUES = 2**22, 2**28
"""Values in one record of a table (four million), and in one column of a row group."""

_RECORDS_PER_BATCH = 64


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
            _refuse_giant_columns(place, file.metadata)
            first = next(file.iter_batches(batch_size=1), None)  # long texts that repeat take no room in the file
            size = MAX_LINE_BYTES // max(1, first.nbytes if first else 1)
            for batch in file.iter_batches(batch_size=max(1, min(size, _RECORDS_PER_BATCH))):
                for record in _table_records(batch):
                    number += 1
                    yield f"{label}#{number}", record
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{place} cannot be read as Parquet after record {number:,}",
            why=str(error).splitlines()[0],
            fix="write or download it again; Parquet needs no gzip around it",
        ) from None
    if number == 0:
        raise InputError(f"{place} has no record")


def _refuse_giant_columns(place: str, metadata: Any) -> None:
    """Refuse columns whose values, which repeat and so take no room in the file, would fill the memory when read."""
    for group in range(metadata.num_row_groups):
        described = metadata.row_group(group)
        for number in range(described.num_columns):
            column = described.column(number)
            if column.num_values > MAX_COLUMN_VALUES or column.num_values > MAX_VALUES * max(1, described.num_rows):
                raise InputError(
                    f"{place}: column {column.path_in_schema} has {column.num_values:,} values in "
                    f"{described.num_rows:,} records",
                    why="no conversation has so many, and they would not fit into memory",
                    fix="write the file without this column, or in smaller row groups",
                )


def _table_records(batch: Any) -> Iterator[JsonObject | BadRecordError]:
    """The records of a table's batch, converted one by one if they are large together."""
    if _num_values_of(batch) <= MAX_VALUES and batch.nbytes <= MAX_LINE_BYTES:
        yield from map(_plain_object, batch.to_pylist())
        return
    for number in range(len(batch)):
        row = batch.slice(number, 1)
        if (count := _num_values_of(row)) > MAX_VALUES:
            yield BadRecordError("too large", f"the record has {count:,} values, and {MAX_VALUES:,} are the most")
        elif row.nbytes > MAX_LINE_BYTES:
            yield BadRecordError("too large", f"the record has more than {MAX_LINE_BYTES:,} bytes")
        else:
            yield _plain_object(row.to_pylist()[0])


def _num_values_of(batch: Any) -> int:
    return sum(_num_values(column) for column in batch.columns)


def _num_values(column: Any) -> int:
    """Values in an Arrow array, those of nested lists included."""
    from pyarrow import types

    kind = column.type
    if types.is_struct(kind):
        return sum(_num_values(column.field(number)) for number in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind) or types.is_map(kind):
        return len(column) + _num_values(column.flatten())
    return len(column)


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
