"""From the rows of a source to checked records; a row that cannot be used is named with file and line."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune.config.keys import suggest_word
from finetune.config.schema import DataForm, SourceConfig
from finetune.data.conversation import Conversation, parse_conversation
from finetune.data.files import read_rows
from finetune.data.message import BadRowError, Message
from finetune.data.printable import printable
from finetune.errors import ConfigError, InputError

_NO_FIELDS = ("messages", "conversations", "tools", "functions")
"""Keys whose value is never a plain text: in a CSV cell or a table's text column it is JSON."""


@dataclass(frozen=True)
class Record:
    """One conversation.

    Attributes:
        id: the record's own `id`, or `file:line` if it has none.
        where: `file:line` as the recipe writes the file; `file#n` for the n-th record of a format without lines.
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
    """A row that cannot be used.

    Attributes:
        where: `file:line`, or `file#n` for the n-th record of a format without lines.
        kind: the group that it is counted in.
        reason: what is wrong with it.
    """

    where: str
    kind: str
    reason: str


@dataclass(frozen=True)
class RawRecord:
    """A row before its conversation is checked.

    Attributes:
        where: as in `Record`.
        raw: what stood there, columns renamed.
        fields: as in `Record`.
    """

    where: str
    raw: Mapping[str, Any]
    fields: Mapping[str, str]


def read_raw_records(name: str, source: SourceConfig) -> Iterator[RawRecord | BadRow]:
    """Read one source's rows in file order, those that `where` keeps, at most `limit`, with its columns renamed.

    A row that is no JSON object belongs to no value of `where`, so it comes as a BadRow whatever `where` says. Blank
    lines are passed over.

    Args:
        name: the source's name in the recipe, for messages.
        source: which files, and what to keep of them.

    Raises:
        ConfigError: `columns` or `where` names what no record has, or `limit` is below 1.
        InputError: a file is missing, empty, unreadable or cut short, or `where` keeps none of it.
    """
    if source.limit is not None and source.limit < 1:
        raise ConfigError(f"source `{name}`: limit must be at least 1, not {source.limit}")
    columns, kept_rows = _Columns(name, source), _Filter(name, source)
    for where, content in read_rows(name, source):
        if isinstance(content, BadRowError):
            yield bad_row(where, content)
            continue
        raw = columns.rename(content)
        fields = _fields(raw)
        if kept_rows.keep(fields):
            yield RawRecord(where, raw, fields)
        if kept_rows.num_kept == source.limit:
            break
    columns.check()
    kept_rows.check()


def parse_record(row: RawRecord, form: DataForm) -> Record:
    """Check what a row holds.

    Raises:
        BadRowError: it cannot be used.
    """
    return Record(
        _id(row.raw, row.where), row.where, parse_conversation(row.raw, form), _answer(row.raw), dict(row.fields)
    )


def read_records(name: str, source: SourceConfig) -> Iterator[Record | BadRow]:
    """Read and check one source's records; arguments and errors as in `read_raw_records`.

    Yields:
        A Record or a BadRow for each row that `where` keeps.
    """
    for row in read_raw_records(name, source):
        try:
            yield row if isinstance(row, BadRow) else parse_record(row, source.form)
        except BadRowError as error:
            yield bad_row(row.where, error)


def bad_row(where: str, error: BadRowError) -> BadRow:
    """Name a row's fault; text quoted from the row is made safe to print."""
    return BadRow(printable(where), error.kind, printable(error.reason))


def raw_record(where: str, raw: Mapping[str, Any]) -> RawRecord:
    """A row whose columns are renamed already, as the cache keeps it."""
    return RawRecord(where, raw, _fields(raw))


class _Columns:
    """Renames a source's columns and remembers what it saw, for the message when one is never there."""

    def __init__(self, name: str, source: SourceConfig) -> None:
        self._name, self._source = name, source
        self._missing = dict(source.columns)
        self._seen: set[str] = set()

    def rename(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        columns = self._source.columns
        if self._missing:
            self._seen.update(raw)
            self._missing = {ours: theirs for ours, theirs in self._missing.items() if theirs not in raw}
        taken = set(columns.values())
        renamed = {key: value for key, value in raw.items() if key not in taken and key not in columns}
        return renamed | {ours: raw[theirs] for ours, theirs in columns.items() if theirs in raw}

    def check(self) -> None:
        """Raise if a column that the recipe names stood in no row."""
        for ours, theirs in self._missing.items():
            if self._seen:
                raise ConfigError(
                    f"source `{self._name}`: columns.{ours}: no record of {self._source.path} has `{theirs}`",
                    fix=suggest_word(theirs, sorted(self._seen)) or f"it has {', '.join(sorted(self._seen))}",
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


def _fields(raw: Mapping[str, Any]) -> dict[str, str]:
    """The record's scalar values as text; booleans as JSON writes them, since recipes say `true`."""
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in raw.items()
        if isinstance(value, str | int | float) and key not in _NO_FIELDS
    }


def _id(raw: Mapping[str, Any], where: str) -> str:
    value = raw.get("id")
    if value is None:
        return where
    if not isinstance(value, str | int | float) or value == "" or not _is_whole(str(value)):
        raise BadRowError("bad id", "`id` must be text or a number")
    return value if isinstance(value, str) else json.dumps(value)


def _is_whole(text: str) -> bool:
    """Whether no character is half of a pair, as JSON can spell it."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _answer(raw: Mapping[str, Any]) -> str | None:
    value = raw.get("answer")
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise BadRowError(
            "bad answer",
            "`answer` must be text (a number in quotes), and not empty; leave the key out if there is none",
        )
    return value
