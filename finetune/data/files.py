"""Find and open the files of a source, and refuse files of another kind than their name or content suggests."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from finetune.config.paths import (
    SHIPPED_PREFIX,
    fix_for_missing_data,
    is_glob,
    matching_files,
    refuse_special_file,
    resolve_data_path,
    shipped_dir,
)
from finetune.config.suggest import suggest_word
from finetune.errors import InputError
from finetune.log import printable

_GZIP_MAGIC = b"\x1f\x8b"
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_MAGIC = (
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "zstd -d FILE"),
    (b"BZh", "compressed with bzip2", "bzip2 -d FILE"),
    (b"\xfd7zXZ\x00", "compressed with xz", "xz -d FILE"),
    (b"PK\x03\x04", "a zip archive (or a spreadsheet)", "unpack it, or save the sheet as CSV"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"\x1f\x8b", "gzipped twice", "gzip -d FILE"),
    (b"PAR1", "Parquet", "name it .parquet"),
    (b"ARROW1", "an Arrow file", "give the directory that `datasets` saved, or write it as Parquet"),
    (b"SQLite format 3\x00", "a database", "export its records as JSON lines"),
    (b"\x89HDF", "an HDF5 file", "export its records as JSON lines"),
    (b"%PDF", "a PDF", "write its text as records"),
)
_PIECE_BYTES = 2**18
MAX_RATIO, ALWAYS_INFLATED = 250, 2**28
"""Text is seldom compressed more than 20-fold, gzip can reach 1,030-fold; 256 MiB are read in any case."""
_TEXT_SUFFIXES = (".txt", ".md")
_DELIMITERS = {";": "a semicolon", "\t": "a tab", "|": "a bar"}


def find_files(name: str, path: str) -> list[Path]:
    """Find the files of a source's `path`, sorted by name.

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
        fix = fix_for_missing_data(path) or suggest_word(missing.name, siblings)
        fix = fix or "check the source's path in the recipe"
        raise InputError(f"{place} there is no file {path}", why=looked_from, fix=fix)
    for file in found:
        refuse_special_file(place, file)
    if is_glob(path):
        found = [file for file in found if file.is_file()]
    for directory in (file for file in found if file.is_dir()):
        if not any((directory / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
            fix = f"name its files with a pattern, such as {path.rstrip('/')}/*.jsonl"
            raise InputError(f"{place} {path} is a directory, and not one that `datasets` saved", fix=fix)
        for file in directory.rglob("*"):
            refuse_special_file(place, file)
    if not found:
        raise InputError(f"{place} {path} matches directories only", fix="write the pattern so that it names files")
    return found


def label_of(written: str, path: Path) -> str:
    """The name of a file in messages and records: the recipe's path where that means this file alone."""
    label = written
    if is_glob(written):
        is_shipped = written.startswith(SHIPPED_PREFIX)
        label = f"{SHIPPED_PREFIX}{path.relative_to(shipped_dir('data')).as_posix()}" if is_shipped else str(path)
    return printable(label)


def open_bytes(path: Path) -> IO[bytes]:
    """Open for reading bytes; gzip is recognised by the file's first bytes, or demanded by its name.

    Reading raises InputError when a compressed file gives implausibly more bytes than it has.
    """
    with path.open("rb") as file:
        packed = file.read(2) == _GZIP_MAGIC
    if packed or path.suffix == ".gz":
        return cast(IO[bytes], io.BufferedReader(_Inflated(path), _PIECE_BYTES))
    return path.open("rb")


class _Inflated(io.RawIOBase):
    """The content of a gzip file, up to `MAX_RATIO` times its size (`ALWAYS_INFLATED` at least)."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, gzip.GzipFile(path, "rb")
        self._limit = max(ALWAYS_INFLATED, MAX_RATIO * path.stat().st_size)
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._file.read1(len(buffer))  # what is there: a file that breaks off is read up to there
        count = len(piece)
        buffer[:count] = piece
        self._count += count
        if self._count > self._limit:
            raise InputError(
                f"{self._path} gives more than {self._limit:,} bytes when it is decompressed",
                why=f"that is more than {MAX_RATIO} times its size, which no text is",
                fix="decompress it and look at it; records that repeat so often teach nothing",
            )
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def broken_file(place: str, position: Callable[[], str]) -> Iterator[None]:
    """Turn the errors of reading a broken file into an InputError.

    Args:
        place: the source and the file.
        position: called on an error: how far reading came.
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


def refuse_binary(place: str, start: bytes) -> None:
    """Raise InputError if a text file begins like something else: an archive, another table format, zeros.

    Args:
        place: source and file, for messages.
        start: its first bytes, decompressed if it was gzipped.
    """
    for magic, what, fix in _MAGIC:
        if start.startswith(magic):
            raise InputError(f"{place} is {what}, not text", fix=fix)
    if start and (not any(start[:4:2]) or (len(start) > 3 and not any(start[1:4:2]))):
        fix = "if it is UTF-16 without a mark: iconv -f UTF-16LE -t UTF-8 FILE > OTHER"
        raise InputError(f"{place} begins with zero bytes, which text has not", fix=fix)


def refuse_utf16(place: str, start: bytes) -> None:
    """Raise InputError if a text file begins with the byte-order mark of UTF-16."""
    if start.startswith(_UTF16_MARKS):
        fix = "iconv -f UTF-16 -t UTF-8 FILE > OTHER"
        raise InputError(f"{place} is UTF-16, and data files are UTF-8", fix=fix)


def refuse_plain_text(place: str, path: Path, start: bytes) -> None:
    """Raise InputError for a file that is named like plain text and does not begin like JSON.

    Args:
        place: source and file, for messages.
        path: the file.
        start: its first bytes without leading white space.
    """
    if Path(path.name.removesuffix(".gz")).suffix.lower() in _TEXT_SUFFIXES and start and not start.startswith(b"{"):
        raise InputError(
            f"{place} is plain text, not records",
            why="it does not show where one document ends and the next begins",
            fix='write one {"text": "..."} per line for each document',
        )


def refuse_whole_object(place: str, content: bytes) -> None:
    """Raise InputError if a file is one JSON object over several lines; a list of records in it is named.

    Args:
        place: source and file, for messages.
        content: the whole file.
    """
    try:
        whole = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return  # the faults of each line are reported
    if not isinstance(whole, dict):
        return
    lists = [key for key, value in whole.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    is_record = not lists or lists[0] in ("messages", "conversations") or not lists[0].isidentifier()
    raise InputError(
        f"{place} is one JSON object over several lines, not a list of records",
        why=f"its keys are {printable(', '.join(whole))}",
        fix="write one record per line: jq -c . FILE > rows.jsonl"
        if is_record
        else f"keep the list under `{lists[0]}` alone: jq -c '.{lists[0]}[]' FILE > rows.jsonl",
    )


def refuse_other_delimiter(place: str, header: Sequence[str]) -> None:
    """Raise InputError for a table with one column whose name contains another delimiter."""
    found = next((mark for mark in _DELIMITERS if len(header) == 1 and mark in header[0]), None)
    if found is not None:
        raise InputError(
            f"{place}: its first line names one column, {header[0]!r}",
            why=f"{_DELIMITERS[found]} seems to separate its cells, and commas are read (tabs in .tsv)",
            fix="write the table with commas" + (", or name it .tsv" if found == "\t" else ""),
        )
