"""Rows of JSONL and JSON files as plain objects, each with its place, and the way to every other format.

Whatever is wrong with one row comes as a `BadRowError` beside its place; what is wrong with a file is an `InputError`.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from finetune.config.keys import suggest_word
from finetune.config.locate import (
    HUB_PREFIX,
    SHIPPED_PREFIX,
    how_to_get,
    is_glob,
    matching_files,
    resolve_data_path,
    shipped_dir,
)
from finetune.config.schema import SourceConfig
from finetune.data.kinds import refuse_plain_text, refuse_utf16, refuse_whole_object
from finetune.data.message import BadRowError
from finetune.data.printable import printable
from finetune.errors import ConfigError, InputError

Row = tuple[str, dict[str, Any] | BadRowError]
"""Where it stands (`file:line` for text, `file#n` for the n-th record of other formats), and what it holds."""

MAX_LINE_BYTES = 2**28
"""A line longer than 256 MiB is no record; it is passed over in pieces, so that it cannot fill the memory."""

_GZIP_MAGIC = b"\x1f\x8b"
_PIECE_BYTES = 2**20


def read_rows(name: str, source: SourceConfig) -> Iterator[Row]:
    """Read one source's rows in the order of its files, whatever their format.

    Args:
        name: the source's name in the recipe, for messages.
        source: which files.

    Yields:
        A `Row` for each record, or a BadRowError with the place where one should be.

    Raises:
        ConfigError: `split` is needed and not set, or set and not there.
        InputError: a file is missing, empty, unreadable, or broken beyond the row.
        MachineError: `datasets` is needed and not installed.
    """
    from finetune.data.formats import read_csv, read_dataset_directory, read_hub, read_parquet

    if source.path.startswith(HUB_PREFIX):
        yield from read_hub(name, source)
        return
    for path in find_files(name, source.path):
        label = _label(source.path, path)
        place = f"source `{name}`: {label}"
        if path.is_dir():
            yield from read_dataset_directory(place, label, path, source)
            continue
        if source.split is not None:
            raise ConfigError(f"{place} is a file and has no splits", fix="use `where` on one of its fields")
        kind = Path(path.name.removesuffix(".gz")).suffix.lower()
        if kind == ".parquet":
            yield from read_parquet(place, label, path)
        elif kind in (".csv", ".tsv"):
            yield from read_csv(place, label, path, "\t" if kind == ".tsv" else ",")
        else:
            yield from _read_json(place, label, path)


def find_files(name: str, path: str) -> list[Path]:
    """Find the files that a source's `path` means, sorted by name.

    Args:
        name: the source's name in the recipe, for messages.
        path: a file, a glob, or a directory that `datasets` saved, as in `resolve_data_path`.

    Raises:
        InputError: there is no such file (one beside it with a similar name is suggested), nothing matches the glob, or
            a directory is no saved dataset.
    """
    found = matching_files(path)
    place = f"source `{name}`:"
    looked_from = None if resolve_data_path(path).is_absolute() else f"it was looked for from {Path.cwd()}"
    if not found and is_glob(path):
        raise InputError(f"{place} no file matches {path}", why=looked_from, fix="check the pattern in the recipe")
    if not found:
        missing = resolve_data_path(path)
        siblings = sorted(file.name for file in missing.parent.iterdir()) if missing.parent.is_dir() else []
        fix = how_to_get(path) or suggest_word(missing.name, siblings) or "check the source's path in the recipe"
        raise InputError(f"{place} there is no file {path}", why=looked_from, fix=fix)
    if is_glob(path):
        found = [file for file in found if file.is_file()]
    for directory in (file for file in found if file.is_dir()):
        if not any((directory / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
            fix = f"name its files with a pattern, such as {path.rstrip('/')}/*.jsonl"
            raise InputError(f"{place} {path} is a directory, and not one that `datasets` saved", fix=fix)
    if not found:
        raise InputError(f"{place} {path} matches directories only", fix="write the pattern so that it names files")
    return found


def open_bytes(path: Path) -> IO[bytes]:
    """Open for reading bytes; gzip is told by the file's first bytes, or demanded by its name."""
    with path.open("rb") as file:
        packed = file.read(2) == _GZIP_MAGIC
    if packed or path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    return path.open("rb")


@contextmanager
def broken_file(place: str, position: Callable[[], str]) -> Iterator[None]:
    """Turn what a broken file raises while it is read into an InputError.

    Args:
        place: the source and the file.
        position: called when it breaks: how far reading came.
    """
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"{place} is not a complete gzip file: it breaks off after {position()}",
            why=str(error),
            fix="copy or download it again",
        ) from error
    except OSError as error:
        raise InputError(f"{place} cannot be read after {position()}", why=str(error)) from error


def parse_json(text: str) -> Any:
    """JSON with repeated keys refused.

    Raises:
        BadRowError: it is not JSON, nests too deeply, or an object has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_object_without_repeats)
    except json.JSONDecodeError as error:
        raise BadRowError("broken JSON", f"the line is not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise BadRowError("broken JSON", "the line nests JSON too deeply") from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise BadRowError("broken JSON", f"the line holds what cannot be read: {str(error)[:60]}") from None


def _label(written: str, path: Path) -> str:
    """How messages and records call a file: as the recipe writes it where that names it alone."""
    label = written
    if is_glob(written):
        is_shipped = written.startswith(SHIPPED_PREFIX)
        label = f"{SHIPPED_PREFIX}{path.relative_to(shipped_dir('data')).as_posix()}" if is_shipped else str(path)
    return printable(label)


def _read_json(place: str, label: str, path: Path) -> Iterator[Row]:
    """JSON lines, or one JSON array when the content begins with `[` on a line that is no whole array of its own."""
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
        except BadRowError as error:
            yield f"{label}:{number}", error
    if empty:
        raise InputError(f"{place} is empty", fix="give a file with one JSON record a line")


def _begins_a_spread_object(start: bytes) -> bool:
    """Whether a first line is the beginning of an object, and no whole one."""
    first, line_end, _ = start.partition(b"\n")
    return bool(line_end) and first.rstrip().endswith((b"{", b"[", b","))


def _lines(place: str, path: Path) -> Iterator[tuple[int, bytes | BadRowError]]:
    """Yield (line number from 1, line) for every line that is not blank."""
    number = 0
    with broken_file(place, lambda: f"line {number:,}"), open_bytes(path) as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(_PIECE_BYTES)
                yield number, BadRowError("line too long", f"the line has more than {MAX_LINE_BYTES:,} bytes")
            elif line.strip():
                yield number, line


def _parse_object(line: bytes | BadRowError) -> dict[str, Any]:
    if isinstance(line, BadRowError):
        raise line
    try:
        raw = parse_json(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRowError("not UTF-8", f"the line is not UTF-8 text (byte {error.start + 1} of the line)") from None
    if not isinstance(raw, dict):
        raise BadRowError("not an object", f"the line is JSON, but no object: {str(raw)[:40]}")
    return raw


def _read_array(place: str, label: str, path: Path) -> Iterator[Row]:
    """One JSON array of records. It is read whole, so JSONL is the format for files larger than memory."""
    try:
        with broken_file(place, lambda: "its beginning"), open_bytes(path) as file:
            rows = parse_json(file.read().decode("utf-8-sig"))
    except (BadRowError, UnicodeDecodeError) as error:
        why = error.reason.replace("the line", "it") if isinstance(error, BadRowError) else f"it is not UTF-8: {error}"
        fix = "correct it, or write one record a line (JSONL), which is checked row by row"
        raise InputError(f"{place} begins like a JSON array, but cannot be read as one", why=why, fix=fix) from None
    if not rows:
        raise InputError(f"{place} is an empty array")
    for number, raw in enumerate(rows, start=1):
        if isinstance(raw, dict):
            yield f"{label}#{number}", raw
        else:
            yield f"{label}#{number}", BadRowError("not an object", f"the record is no object: {str(raw)[:40]}")


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise BadRowError("repeated key", f"the key `{repeated}` stands twice in one object")
    return result
