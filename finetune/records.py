"""JSON files read into dataclasses, and checksums of what stands in them.

Every fault of a file that is read here is named with the file, the key and what to do; none ends in a traceback.
Free of torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from finetune.errors import InputError
from finetune.files import JsonObject, read_json, write_json

Record = TypeVar("Record")

CHECKSUMS = "sha256"
"""Key of a JSON file with the SHA-256 of the values of its other keys."""
LINE_CHECK = "check"
"""Key of a line of a JSONL file with the start of the SHA-256 of its other keys and values."""
_LINE_CHECK_LENGTH = 8  # hexadecimal digits: 1 in 4 billion changes goes unnoticed


# Types


def parse_record(kind: type[Record], content: object, where: str, *, fix: str | None = None) -> Record:
    """Convert JSON data into a dataclass, or another annotated type, whose annotations say what each key must be.

    Args:
        kind: the type.
        content: as JSON was parsed.
        where: the file, and the line if it has several, for the error message.
        fix: what to do if it is something else.

    Raises:
        InputError: names the first key that is missing or has a value of another type.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        raise InputError(f"{where}: {_describe(error.errors()[0])}", fix=fix) from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise InputError(f"{where}: {type(error).__name__}: {error}", fix=fix) from error


def read_record(kind: type[Record], path: Path, what: str, *, fix: str | None = None) -> Record:
    """Read a JSON file into a dataclass, see `parse_record`.

    Raises:
        InputError: it is missing, not a JSON object, or a key is missing or has a value of another type.
    """
    return parse_record(kind, read_json(path, what, fix), str(path), fix=fix)


def _describe(fault: Mapping[str, Any]) -> str:
    """One fault that pydantic has found, in a sentence."""
    key = ".".join(map(str, fault["loc"])) or "the content"
    if fault["type"] in ("missing", "missing_argument"):
        return f"{key} is missing"
    return f"{key} is {_short(fault['input'])}: {fault['msg'][:1].lower()}{fault['msg'][1:]}"


def _short(value: object) -> str:
    try:
        text = repr(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


# Checksums


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_checked_json(path: Path, content: JsonObject) -> None:
    """Replace a JSON file in one step; a last key has the SHA-256 of every other key's value."""
    write_json(path, {**content, CHECKSUMS: {key: _digest(value) for key, value in content.items()}})


def without_checksums(content: JsonObject, path: Path, fix: str) -> dict[str, Any]:
    """Compare the values of a file that `write_checked_json` wrote with their checksums, and leave these out.

    A file without checksums is of an earlier version, and passes.

    Raises:
        InputError: names the keys whose values are not those that were written.
    """
    rest = {key: value for key, value in content.items() if key != CHECKSUMS}
    listed = content.get(CHECKSUMS)
    if listed is None:
        return rest
    found = {key: _digest(value) for key, value in rest.items()}
    if not isinstance(listed, dict):
        raise InputError(f"{path}: {CHECKSUMS} is {_short(listed)}, not a list of hashes", fix=fix)
    if differing := sorted(key for key in {*found, *listed} if found.get(key) != listed.get(key)):
        raise InputError(
            f"{path} was changed since it was written: {', '.join(differing)}",
            why="their SHA-256 is not the one in the file",
            fix=fix,
        )
    return rest


def with_line_check(line: JsonObject) -> dict[str, Any]:
    """A line of a JSONL file with its checksum as the last key."""
    return {**line, LINE_CHECK: _digest(line)[:_LINE_CHECK_LENGTH]}


def parse_line(text: str) -> dict[str, Any]:
    """A line of a JSONL file without its checksum; one that has none is of an earlier version, and passes.

    Raises:
        ValueError: it is not a JSON object, or not as it was written.
    """
    try:
        line = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(line, dict):
        raise ValueError(f"it is a JSON {type(line).__name__}, not an object")
    check = line.pop(LINE_CHECK, None)
    if check is not None and check != _digest(line)[:_LINE_CHECK_LENGTH]:
        raise ValueError("it was changed since it was written: its checksum differs")
    return line
