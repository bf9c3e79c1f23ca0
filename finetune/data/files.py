"""Find and open the files of a source, and refuse files of another kind than their name or content suggests."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from finetune.config.paths import (
    SHIPPED_PREFIX,
    fix_for_missing_data,
    is_glob,
    matching_files,
    resolve_data_path,
    shipped_dir,
)
from finetune.config.suggest import suggest_word
from finetune.errors import InputError
from finetune.log import printable

_GZIP_MAGIC = b"\x1f\x8b"
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
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
    if is_glob(path):
        found = [file for file in found if file.is_file()]
    for directory in (file for file in found if file.is_dir()):
        if not any((directory / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
            fix = f"name its files with a pattern, such as {path.rstrip('/')}/*.jsonl"
            raise InputError(f"{place} {path} is a directory, and not one that `datasets` saved", fix=fix)
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
    """Open for reading bytes; gzip is recognised by the file's first bytes, or demanded by its name."""
    with path.open("rb") as file:
        packed = file.read(2) == _GZIP_MAGIC
    if packed or path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    return path.open("rb")


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
