"""Read records of text files, JSON lines, a JSON array, CSV or TSV, within bounds of memory and time.

A fault of one record is a `BadRecordError` in its place; a fault of a whole file is an `InputError`.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from finetune.data.checks import BadRecordError, parse_json
from finetune.data.files import (
    broken_file,
    open_bytes,
    refuse_binary,
    refuse_other_delimiter,
    refuse_plain_text,
    refuse_utf16,
    refuse_whole_object,
)
from finetune.errors import InputError
from finetune.files import JsonObject

PlacedRecord = tuple[str, JsonObject | BadRecordError]
"""The place (`file:line` for text, `file#n` for the n-th record of other formats) and the record, or its fault."""

MAX_LINE_BYTES = 2**26
"""A line longer than 64 MiB is no record; it is skipped in pieces, so that it cannot fill the memory."""
MAX_UNBROKEN_BYTES = 2**30
MAX_BLANK_LINES = 1_000_000

_PIECE_BYTES = 2**20
_MAX_WHOLE_BYTES = 2**24  # one object over several lines is recognised up to 16 MiB


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
    refuse_binary(place, start)
    start = start.removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b"["):
        yield from _read_array(place, label, path)
        return
    refuse_plain_text(place, path, start)
    if _begins_a_spread_object(start):
        with broken_file(place, lambda: "its beginning"), open_bytes(path) as file:
            refuse_whole_object(place, file.read(_MAX_WHOLE_BYTES))
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
    number = num_blank = 0
    with broken_file(place, lambda: f"line {number:,}"), open_bytes(path) as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                _skip_line(place, number, line, file)
                yield number, BadRecordError("line too long", f"the line has more than {MAX_LINE_BYTES:,} bytes")
            elif line.strip():
                num_blank = 0
                yield number, line
            else:
                num_blank = _counted_blank(place, number, num_blank)


def _skip_line(place: str, number: int, line: bytes, file: IO[bytes]) -> None:
    """Read the rest of a line in pieces, unless it is so long that the file has no lines."""
    size = len(line)
    while line and not line.endswith(b"\n"):
        line = file.readline(_PIECE_BYTES)
        size += len(line)
        if size > MAX_UNBROKEN_BYTES:
            raise InputError(
                f"{place}: line {number:,} does not end within {MAX_UNBROKEN_BYTES:,} bytes",
                why="records are lines of JSON, so this is a file of another kind",
                fix="write one record per line",
            )


def _counted_blank(place: str, number: int, num_blank: int) -> int:
    if num_blank >= MAX_BLANK_LINES:
        raise InputError(
            f"{place}: {MAX_BLANK_LINES:,} blank lines one after the other, up to line {number:,}",
            fix="remove them, if there are records behind them",
        )
    return num_blank + 1


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
    """One JSON array of records, read piece by piece."""
    number = 0
    try:
        with broken_file(place, lambda: f"record {number:,}"), open_bytes(path) as file:
            for text in _ArrayText(file).items():
                number += 1
                try:
                    raw = parse_json(text, "the record")
                    if not isinstance(raw, dict):
                        raise BadRecordError("not an object", f"the record is not an object: {str(raw)[:40]}")
                except BadRecordError as error:
                    yield f"{label}#{number}", error
                else:
                    yield f"{label}#{number}", raw
    except (BadRecordError, UnicodeDecodeError) as error:
        why = error.reason if isinstance(error, BadRecordError) else f"it is not UTF-8: {error.reason}"
        fix = "correct it, or write one record per line (JSONL), which is checked record by record"
        where = f"after record {number:,}: " if number else ""
        raise InputError(
            f"{place} begins like a JSON array, but cannot be read as one", why=where + why, fix=fix
        ) from None
    if not number:
        raise InputError(f"{place} is an empty array")


class _ArrayText:
    """The text of a JSON array, of which only a piece is in memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._scan = json.JSONDecoder().raw_decode
        self._text, self._at, self._ended = "", 0, False

    def items(self) -> Iterator[str]:
        """Yield each item as JSON text.

        Raises:
            BadRecordError: there is no end of an item, or of the array.
        """
        self._next()
        self._at += 1  # the bracket
        if self._next() != "]":
            yield self._item()
            while (mark := self._next()) == ",":
                self._at += 1
                yield self._item()
            if mark != "]":
                raise BadRecordError("broken JSON", f"it needs a comma or ] here, not {mark or 'the end of the file'}")
        self._at += 1
        if self._next():
            raise BadRecordError("broken JSON", "there is more behind the array")

    def _next(self) -> str:
        """Go to the next character that is not white space; nothing at the end."""
        while True:
            while self._at < len(self._text):
                if not (character := self._text[self._at]).isspace():
                    return character
                self._at += 1
            if self._ended:
                return ""
            self._grow()

    def _item(self) -> str:
        self._next()
        while True:
            try:
                _, end = self._scan(self._text, self._at)
            except json.JSONDecodeError as error:
                end, problem = len(self._text), error.msg  # perhaps because it is not all there yet
            except RecursionError:
                raise BadRecordError("broken JSON", "it nests JSON too deeply") from None
            except ValueError as error:
                raise BadRecordError("broken JSON", f"it contains a value that cannot be read: {error}") from None
            else:
                problem = ""
            if not problem and (end < len(self._text) or self._ended):
                item, self._at = self._text[self._at : end], end
                return item
            if self._ended:
                raise BadRecordError("broken JSON", f"it is not JSON: {problem}")
            if len(self._text) - self._at > MAX_LINE_BYTES:
                raise BadRecordError("broken JSON", f"{problem or 'no end'} within {MAX_LINE_BYTES:,} characters")
            self._grow()

    def _grow(self) -> None:
        """Drop what was read, and read as much again as is left, so that an item is scanned a few times only."""
        left = self._text[self._at :]
        piece = self._file.read(max(_PIECE_BYTES, len(left)))
        self._ended = not piece
        self._text, self._at = left + self._decode(piece, self._ended), 0


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
        start = file.read(4096)
    refuse_utf16(place, start)
    refuse_binary(place, start)
    with broken_file(place, lambda: "its beginning"), open_bytes(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        rows = csv.reader(_csv_lines(place, text), delimiter=delimiter, strict=True)
        try:
            with broken_file(place, lambda: f"line {rows.line_num:,}"):
                header = next(rows, [])
                _check_header(place, header)
                line, empty, num_blank = rows.line_num + 1, True, 0
                for cells in rows:
                    if cells:
                        empty, num_blank = False, 0
                        yield f"{label}:{line}", _csv_record(header, cells)
                    else:
                        num_blank = _counted_blank(place, rows.line_num, num_blank)
                    line = rows.line_num + 1
        except csv.Error as error:
            raise InputError(
                f"{place} cannot be followed after line {rows.line_num:,}",
                why=f"{error}; a quote that is not closed swallows the lines after it",
                fix="correct the quoting there; the records after it cannot be told apart",
            ) from None
    if empty:
        raise InputError(f"{place} has a header and no record")


def _csv_lines(place: str, text: io.TextIOWrapper) -> Iterator[str]:
    """Lines of a table; one without an end must not fill the memory."""
    while line := text.readline(MAX_LINE_BYTES):
        if len(line) == MAX_LINE_BYTES:
            raise InputError(
                f"{place} has a line of more than {MAX_LINE_BYTES:,} characters", fix="break the table into lines"
            )
        yield line


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
