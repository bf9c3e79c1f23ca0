"""Files that are of another kind than they were taken for, told by their beginning and named as what they are."""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from pathlib import Path

from finetune.data.printable import printable
from finetune.errors import InputError

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
