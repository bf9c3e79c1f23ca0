"""Text of unknown origin, made safe to print: what would steer a terminal or turn text around is spelled out."""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from finetune.config.paths import (
    HUB_PREFIX,
    SHIPPED_PREFIX,
    fix_for_missing_data,
    is_glob,
    matching_files,
    resolve_data_path,
    shipped_dir,
)
from finetune.config.schema import SourceConfig
from finetune.config.suggest import suggest_word
from finetune.data.message import BadRecordError
from finetune.errors import ConfigError, InputError

# C0 without newline and tab, DEL and C1 steer terminals; the rest reorders or hides what stands around it
# (bidirectional marks and overrides, zero-width characters, line separators, tags), as in "Trojan Source" attacks, or
# is half a character, which cannot be printed at all.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    r"""Spell out control characters and what reorders text; newlines and tabs stay.

    >>> printable("red: \x1b[31m")
    'red: \\x1b[31m'
    """
    return _UNSAFE.sub(lambda match: _spelled(ord(match[0])), text)


def _spelled(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


# Files that are of another kind than they were taken for, told by their beginning and named as what they are.

_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_TEXT_SUFFIXES = (".txt", ".md")
_DELIMITERS = {";": "a semicolon", "\t": "a tab", "|": "a bar"}


def refuse_utf16(place: str, start: bytes) -> None:
    """Refuse a text file that begins with the mark of UTF-16.

    Args:
        place: source and file, for messages.
        start: its first bytes.

    Raises:
        InputError: it does.
    """
    if start.startswith(_UTF16_MARKS):
        fix = "iconv -f UTF-16 -t UTF-8 FILE > OTHER"
        raise InputError(f"{place} is UTF-16, and data files are UTF-8", fix=fix)


def refuse_plain_text(place: str, path: Path, start: bytes) -> None:
    """Refuse a text file by its name that does not begin like JSON.

    Args:
        place: source and file, for messages.
        path: the file.
        start: its first bytes, white space left out.

    Raises:
        InputError: it is one.
    """
    if Path(path.name.removesuffix(".gz")).suffix.lower() in _TEXT_SUFFIXES and start and not start.startswith(b"{"):
        raise InputError(
            f"{place} is plain text, not records",
            why="nothing says where one document ends and the next begins",
            fix='write one {"text": "..."} a line for each document',
        )


def refuse_whole_object(place: str, content: bytes) -> None:
    """Refuse one JSON object that is written over several lines.

    Args:
        place: source and file, for messages.
        content: the whole file.

    Raises:
        InputError: it is one; the list of records in it is named if there is one.
    """
    try:
        whole = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return  # each line is named for itself
    if not isinstance(whole, dict):
        return
    lists = [key for key, value in whole.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    is_record = not lists or lists[0] in ("messages", "conversations") or not lists[0].isidentifier()
    raise InputError(
        f"{place} is one JSON object over several lines, not a list of records",
        why=f"its keys are {printable(', '.join(whole))}",
        fix="write one record a line: jq -c . FILE > rows.jsonl"
        if is_record
        else f"keep the list under `{lists[0]}` alone: jq -c '.{lists[0]}[]' FILE > rows.jsonl",
    )


def refuse_other_delimiter(place: str, header: Sequence[str]) -> None:
    """Refuse a table with one column whose name shows that something else stands between cells.

    Args:
        place: source and file, for messages.
        header: names of the columns.

    Raises:
        InputError: it does.
    """
    found = next((mark for mark in _DELIMITERS if len(header) == 1 and mark in header[0]), None)
    if found is not None:
        raise InputError(
            f"{place}: its first line names one column, {header[0]!r}",
            why=f"{_DELIMITERS[found]} seems to stand between its cells, and commas are read (tabs in .tsv)",
            fix="write the table with commas" + (", or name it .tsv" if found == "\t" else ""),
        )


# Rows of JSONL and JSON files as plain objects, each with its place, and the way to every other format.
#
# Whatever is wrong with one row comes as a `BadRecordError` beside its place; what is wrong with a file is an
# `InputError`.

Row = tuple[str, dict[str, Any] | BadRecordError]
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
        A `Row` for each record, or a BadRecordError with the place where one should be.

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
        fix = (
            fix_for_missing_data(path)
            or suggest_word(missing.name, siblings)
            or "check the source's path in the recipe"
        )
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
        BadRecordError: it is not JSON, nests too deeply, or an object has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_object_without_repeats)
    except json.JSONDecodeError as error:
        raise BadRecordError("broken JSON", f"the line is not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise BadRecordError("broken JSON", "the line nests JSON too deeply") from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise BadRecordError("broken JSON", f"the line holds what cannot be read: {str(error)[:60]}") from None


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
        except BadRecordError as error:
            yield f"{label}:{number}", error
    if empty:
        raise InputError(f"{place} is empty", fix="give a file with one JSON record a line")


def _begins_a_spread_object(start: bytes) -> bool:
    """Whether a first line is the beginning of an object, and no whole one."""
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


def _parse_object(line: bytes | BadRecordError) -> dict[str, Any]:
    if isinstance(line, BadRecordError):
        raise line
    try:
        raw = parse_json(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRecordError("not UTF-8", f"the line is not UTF-8 text (byte {error.start + 1} of the line)") from None
    if not isinstance(raw, dict):
        raise BadRecordError("not an object", f"the line is JSON, but no object: {str(raw)[:40]}")
    return raw


def _read_array(place: str, label: str, path: Path) -> Iterator[Row]:
    """One JSON array of records. It is read whole, so JSONL is the format for files larger than memory."""
    try:
        with broken_file(place, lambda: "its beginning"), open_bytes(path) as file:
            rows = parse_json(file.read().decode("utf-8-sig"))
    except (BadRecordError, UnicodeDecodeError) as error:
        why = (
            error.reason.replace("the line", "it") if isinstance(error, BadRecordError) else f"it is not UTF-8: {error}"
        )
        fix = "correct it, or write one record a line (JSONL), which is checked row by row"
        raise InputError(f"{place} begins like a JSON array, but cannot be read as one", why=why, fix=fix) from None
    if not rows:
        raise InputError(f"{place} is an empty array")
    for number, raw in enumerate(rows, start=1):
        if isinstance(raw, dict):
            yield f"{label}#{number}", raw
        else:
            yield f"{label}#{number}", BadRecordError("not an object", f"the record is no object: {str(raw)[:40]}")


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise BadRecordError("repeated key", f"the key `{repeated}` stands twice in one object")
    return result
