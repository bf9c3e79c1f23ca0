"""Read JSONL files of conversations line by line; a row that cannot be used is named with file and line."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from finetune.config.keys import suggest_word
from finetune.config.locate import resolve_data_path
from finetune.config.schema import SourceConfig
from finetune.data.conversation import BadRowError, Conversation, Message, parse_conversation
from finetune.errors import ConfigError, InputError

_GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True)
class Record:
    """One conversation.

    Attributes:
        id: the record's own `id`, or `file:line` if it has none.
        where: `file:line` as the recipe writes the file.
        conversation: the messages, with tools and whatever of the recipe's settings the record overrides.
        answer: the label that evaluation scores, or None.
        fields: the record's other values that are text, numbers or booleans, as text; `id` and `answer` too.
    """

    id: str
    where: str
    conversation: Conversation
    answer: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation's messages."""
        return self.conversation.messages


@dataclass(frozen=True)
class BadRow:
    """A line that cannot be used.

    Attributes:
        where: `file:line`.
        kind: the group that it is counted in.
        reason: what is wrong with it.
    """

    where: str
    kind: str
    reason: str


def read_records(name: str, source: SourceConfig) -> Iterator[Record | BadRow]:
    """Read one source's records in file order, those that `where` keeps, at most `limit`.

    A line that is no JSON object belongs to no value of `where`, so it comes as a BadRow whatever `where` says; a wrong
    conversation does only in the rows that `where` keeps. Blank lines are passed over.

    Args:
        name: the source's name in the recipe, for messages.
        source: which file, and what to keep of it.

    Yields:
        A Record or a BadRow for each line.

    Raises:
        ConfigError: `where` names a field that no record has, or `limit` is below 1.
        InputError: the file is missing, empty, unreadable, cut short, a JSON array, or `where` keeps none of it.
    """
    if source.limit is not None and source.limit < 1:
        raise ConfigError(f"source `{name}`: limit must be at least 1, not {source.limit}")
    kept_rows = _Filter(name, source)
    for number, line in _lines(name, source):
        where = f"{source.path}:{number}"
        try:
            raw = _parse_object(line)
            fields = _fields(raw)
            if not kept_rows.keep(fields):
                continue
            yield Record(_id(raw, where), where, parse_conversation(raw, source.form), _answer(raw), fields)
        except BadRowError as error:
            yield BadRow(where, error.kind, error.reason)
        if kept_rows.num_kept == source.limit:
            return
    kept_rows.check()


def find_file(name: str, path: str) -> Path:
    """Find the file that a source's `path` means.

    Args:
        name: the source's name in the recipe, for messages.
        path: `shipped://...` below the toolkit's `data/`, or a path from the working directory.

    Raises:
        InputError: there is no such file; one beside it with a similar name is suggested.
    """
    found = resolve_data_path(path)
    if found.is_file():
        return found
    if found.is_dir():
        raise InputError(f"source `{name}`: {path} is a directory", fix="name one JSONL file in it")
    siblings = sorted(file.name for file in found.parent.iterdir()) if found.parent.is_dir() else []
    raise InputError(
        f"source `{name}`: there is no file {path}",
        why=None if found.is_absolute() else f"it was looked for from {Path.cwd()}",
        fix=suggest_word(found.name, siblings) or "check the source's path in the recipe",
    )


class _Filter:
    """Applies a source's `where` and remembers what it saw, for the message when nothing is kept."""

    def __init__(self, name: str, source: SourceConfig) -> None:
        self._name, self._source = name, source
        self._wanted = dict(source.where)
        self._names: set[str] = set()
        self._values: dict[str, Counter[str]] = {key: Counter() for key in self._wanted}
        self.num_seen = self.num_kept = 0

    def keep(self, fields: Mapping[str, str]) -> bool:
        self.num_seen += 1
        if all(fields.get(key) == value for key, value in self._wanted.items()):
            self.num_kept += 1
            return True
        self._names.update(fields)
        for key, counter in self._values.items():
            if key in fields:
                counter[fields[key]] += 1
        return False

    def check(self) -> None:
        """Raise if there were records and none of them was kept."""
        if self.num_kept or not self.num_seen:
            return
        place = f"source `{self._name}`: where"
        for key, values in self._values.items():
            if not values:
                raise ConfigError(
                    f"{place}.{key}: no record of {self._source.path} has a field `{key}`",
                    fix=suggest_word(key, sorted(self._names)) or f"fields are {', '.join(sorted(self._names))}",
                )
        seen = "; ".join(f"{key} is {_listed(values)}" for key, values in self._values.items())
        wanted = ", ".join(f"{key}: {value}" for key, value in self._wanted.items())
        raise InputError(
            f"{place} {{{wanted}}} keeps none of {self.num_seen:,} records", why=f"in {self._source.path} {seen}"
        )


def _listed(values: Counter[str], most: int = 8) -> str:
    shown = ", ".join(f"{value} ({count:,})" for value, count in values.most_common(most))
    return f"{shown} and {len(values) - most:,} others" if len(values) > most else shown


def _lines(name: str, source: SourceConfig) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line) for every line that is not blank."""
    path = find_file(name, source.path)
    number, any_content = 0, False
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                if not any_content and line.lstrip(codecs.BOM_UTF8).lstrip().startswith(b"["):
                    raise InputError(
                        f"source `{name}`: {source.path} is a JSON array, not JSONL",
                        fix=f"write one record a line, for instance with: jq -c '.[]' {source.path}",
                    )
                any_content = True
                yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"source `{name}`: {source.path} is not a complete gzip file: it breaks off after line {number:,}",
            why=str(error),
            fix="copy or download it again",
        ) from error
    except OSError as error:
        place = f"source `{name}`: {source.path}"
        raise InputError(f"{place} cannot be read after line {number:,}", why=str(error)) from error
    if not any_content:
        raise InputError(f"source `{name}`: {source.path} is empty", fix="give a file with one JSON record a line")


def _open(path: Path) -> IO[bytes]:
    """Open for reading bytes; gzip is told by the file's first bytes, or demanded by its name."""
    with path.open("rb") as file:
        packed = file.read(2) == _GZIP_MAGIC
    if packed or path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    return path.open("rb")


def _parse_object(line: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_object_without_repeats)
    except UnicodeDecodeError as error:
        raise BadRowError("not UTF-8", f"the line is not UTF-8 text (byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        raise BadRowError("broken JSON", f"the line is not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise BadRowError("broken JSON", "the line nests JSON too deeply") from None
    if not isinstance(raw, dict):
        raise BadRowError("not an object", f"the line is JSON, but no object: {str(raw)[:40]}")
    return raw


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise BadRowError("repeated key", f"the key `{repeated}` stands twice in one object")
    return result


def _fields(raw: Mapping[str, Any]) -> dict[str, str]:
    """The record's scalar values as text; booleans as JSON writes them, since recipes say `true`."""
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in raw.items()
        if isinstance(value, str | int | float)
    }


def _id(raw: Mapping[str, Any], where: str) -> str:
    value = raw.get("id", where)
    if not isinstance(value, str | int) or value == "":
        raise BadRowError("bad id", "`id` must be text or a number")
    return str(value)


def _answer(raw: Mapping[str, Any]) -> str | None:
    value = raw.get("answer")
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise BadRowError("bad answer", "`answer` must be text, and not empty; leave the key out if there is none")
    return value
