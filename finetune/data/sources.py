"""From a recipe's sources to checked records; a record that cannot be used is named with file and line."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from finetune.config.schema import DataConfig, DataForm, SourceConfig, ThinkTags
from finetune.config.suggest import suggest_word
from finetune.data.checks import BadRecordError
from finetune.data.control_text import settle_think_tags
from finetune.data.conversation import Conversation, Message
from finetune.data.forms import parse_conversation, with_our_columns
from finetune.data.readers import read_source
from finetune.errors import ConfigError, InputError
from finetune.files import JsonObject
from finetune.log import printable

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")

_JSON_KEYS = ("messages", "conversations", "tools", "functions")
"""Keys whose text is never a field: a CSV cell or a table's text column holds JSON there."""


@dataclass(frozen=True)
class Record:
    """One item of a source, checked.

    Attributes:
        id: the record's own `id`, or `where` if it has none.
        where: `file:line` with the file as the recipe writes it; `file#n` for the n-th record of a format without
            lines.
        conversation: the messages, with tools and the record's own settings.
        answer: the label that evaluation scores, or None.
        fields: the record's text, numbers and booleans, as text; `id` and `answer` too.
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
class RawRecord:
    """A record before its conversation is checked.

    Attributes:
        where: as in `Record`.
        raw: its keys and values, columns renamed.
        fields: as in `Record`.
    """

    where: str
    raw: JsonObject
    fields: Mapping[str, str]


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used.

    Attributes:
        where: as in `Record`.
        kind: the group that it is counted in.
        reason: its fault.
    """

    where: str
    kind: str
    reason: str


def split_names(config: DataConfig) -> tuple[SplitName, ...]:
    """The splits that a recipe has."""
    return tuple(split for split in SPLITS if _sources(config, split))


def sources_of(config: DataConfig, split: SplitName) -> Mapping[str, SourceConfig]:
    """The sources that a split reads; with `validation_split`, validation reads the training sources.

    Raises:
        ConfigError: the recipe has none.
    """
    sources = _sources(config, split)
    if not sources:
        raise ConfigError(f"data.{split} names no source", fix=f"set data.{split}.NAME.path in the recipe")
    return sources


def _sources(config: DataConfig, split: SplitName) -> Mapping[str, SourceConfig]:
    if split == "validation" and config.validation_split.key is not None:
        return config.train
    sources: Mapping[str, SourceConfig] = getattr(config, split)
    return sources


def counts_broken_records(config: DataConfig, split: SplitName, name: str) -> bool:
    """Whether a source counts the file's broken records, which have no field for `where` or `validation_split`.

    The first source that reads the file to its end counts them, in the order train, validation, test, so that each is
    counted once.
    """
    source = sources_of(config, split)[name]
    for earlier in SPLITS:
        for other_name, other in _sources(config, earlier).items():
            if (earlier, other_name) == (split, name):
                return True
            if (other.path, other.split, other.limit) == (source.path, source.split, None):
                return False
    return True


def belongs_to(fields: Mapping[str, str], config: DataConfig, split: SplitName) -> bool:
    """Whether a record of one of the split's sources is in the split.

    `validation_split` decides by a hash of the field's value alone: no seed, so that a record stays on its side when
    others are added, and records that share the value are never on both sides. A record without the field is trained.
    """
    key = config.validation_split.key
    if key is None or split == "test":
        return True
    held_out = key in fields and share_of(fields[key]) < config.validation_split.share
    return held_out == (split == "validation")


def share_of(value: str) -> float:
    """A number from 0 to 1, evenly spread over values and always the same for the same value."""
    return int.from_bytes(hashlib.sha256(value.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64


def read_raw_records(name: str, source: SourceConfig) -> Iterator[RawRecord | BadRecord]:
    """Read one source's records in file order, those that `where` keeps, at most `limit`, with its columns renamed.

    A record that is no JSON object has no fields for `where`: it is yielded as a BadRecord in any case. Blank lines are
    skipped.

    Args:
        name: the source's name in the recipe, for messages.
        source: which files, and which of their records.

    Raises:
        ConfigError: `columns` or `where` names what no record has, or `limit` is below 1.
        InputError: a file is missing, empty, unreadable or cut short, or `where` keeps none of its records.
    """
    if source.limit is not None and source.limit < 1:
        raise ConfigError(f"source `{name}`: limit must be at least 1, not {source.limit}")
    columns, kept_records = _Columns(name, source), _Filter(name, source)
    for where, content in read_source(name, source):
        if isinstance(content, BadRecordError):
            yield bad_record(where, content)
            continue
        renamed = columns.rename(content)
        record = raw_record(where, renamed if source.columns else with_our_columns(renamed))
        if kept_records.keep(record.fields):
            yield record
        if kept_records.num_kept == source.limit:
            break
    columns.check()
    kept_records.check()


def read_records(name: str, source: SourceConfig) -> Iterator[Record | BadRecord]:
    """Read and check one source's records; arguments and errors as in `read_raw_records`."""
    for raw in read_raw_records(name, source):
        try:
            yield raw if isinstance(raw, BadRecord) else parse_record(raw, source.form)
        except BadRecordError as error:
            yield bad_record(raw.where, error)


def raw_record(where: str, raw: JsonObject) -> RawRecord:
    """A record whose columns are renamed already, as the cache keeps it."""
    return RawRecord(where, raw, _fields(raw))


def parse_record(raw: RawRecord, form: DataForm, think_tags: ThinkTags = "keep") -> Record:
    """Check a record's contents.

    Args:
        raw: the record.
        form: its form.
        think_tags: as `data.think_tags`.

    Raises:
        BadRecordError: it cannot be used.
    """
    name = _checked_id(raw.raw.get("id"), raw.where)
    conversation = settle_think_tags(parse_conversation(raw.raw, form), think_tags)
    return Record(name, raw.where, conversation, _checked_answer(raw.raw.get("answer")), dict(raw.fields))


def bad_record(where: str, error: BadRecordError) -> BadRecord:
    """Name a record's fault; text quoted from the record is made safe to print."""
    return BadRecord(printable(where), error.kind, printable(error.reason))


class _Columns:
    """Renames a source's columns and tracks the names that it saw, for the message when one is never there."""

    def __init__(self, name: str, source: SourceConfig) -> None:
        self._name, self._source = name, source
        self._missing = dict(source.columns)
        self._seen: set[str] = set()

    def rename(self, raw: JsonObject) -> JsonObject:
        columns = self._source.columns
        if self._missing:
            self._seen.update(raw)
            self._missing = {ours: theirs for ours, theirs in self._missing.items() if theirs not in raw}
        taken = set(columns.values())
        renamed = {key: value for key, value in raw.items() if key not in taken and key not in columns}
        return renamed | {ours: raw[theirs] for ours, theirs in columns.items() if theirs in raw}

    def check(self) -> None:
        """Raise if no record has a column that the recipe names."""
        for ours, theirs in self._missing.items():
            if self._seen:
                raise ConfigError(
                    f"source `{self._name}`: columns.{ours}: no record of {self._source.path} has `{theirs}`",
                    fix=suggest_word(theirs, sorted(self._seen)) or f"it has {', '.join(sorted(self._seen))}",
                )


class _Filter:
    """Applies a source's `where` and tracks the values that it saw, for the message when it keeps no record."""

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
    text = ", ".join(f"{value} ({count:,})" for value, count in values.most_common(most))
    return f"{text} and {len(values) - most:,} others" if len(values) > most else text


def _fields(raw: JsonObject) -> dict[str, str]:
    """The record's scalar values as text; booleans as JSON writes them, since recipes say `true`."""
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in raw.items()
        if isinstance(value, str | int | float) and key not in _JSON_KEYS
    }


def _checked_id(value: object, where: str) -> str:
    if value is None:
        return where
    if not isinstance(value, str | int | float) or value == "" or not _is_encodable(str(value)):
        raise BadRecordError("bad id", "`id` must be text or a number")
    return value if isinstance(value, str) else json.dumps(value)


def _is_encodable(text: str) -> bool:
    """Whether no character is half of a surrogate pair, as JSON can spell it."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _checked_answer(value: object) -> str | None:
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise BadRecordError(
            "bad answer",
            "`answer` must be text (a number in quotes), and not empty; leave the key out if there is none",
        )
    return value
