"""A first look at somebody's file: how it holds conversations, how long they are, how it is split."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from finetune import log
from finetune.config.schema import DataConfig, DataForm, SourceConfig, ValidationSplitConfig
from finetune.data.columns import propose_columns
from finetune.data.dataset import count_kinds
from finetune.data.duplicates import text_of
from finetune.data.forms import KEYS_OF_FORM, fitting_forms, unused_keys
from finetune.data.message import BadRowError, Message
from finetune.data.render import render_samples
from finetune.data.sources import BadRow, RawRecord, Record, bad_row, parse_record, read_raw_records
from finetune.data.split_field import SplitField, find_split_field
from finetune.data.splits import share_of
from finetune.errors import InputError

ROWS_READ = 100_000
RECORDS_MEASURED = 2000  # of them as tokens, which takes longest
_LONGEST_NAME = 40
_FIX_FORM = (
    "a record holds `messages`, `conversations`, `instruction` and `output`, `prompt` and `completion`, or `text`"
)
_FIX_ANSWER = (
    "write answers as text, or in a recipe rename what is no answer: `columns: {label: answer}` beside the path"
)
_SHARES = (ValidationSplitConfig.share, 0.1, 0.2)


@dataclass(frozen=True)
class FileFacts:
    """What a file's first rows show.

    Attributes:
        source: how they were read.
        rows: how many were read, `ROWS_READ` at most.
        has_more: there are more.
        bad_rows: those that cannot be used.
        records: how many can be used.
        form: how these hold their conversation; the most frequent one.
        lengths: tokens of each sample of the first `RECORDS_MEASURED` records.
        trained_share: share of these tokens that would be trained.
        split: the field that names splits, or seems to.
        has_ids: every record has an `id`.
        id_share: the least share of `validation_split` by `id` that leaves training records on both sides; None if
            none does, or if rows are named for validation.
        labelled: records with an `answer`.
        answers: how many different answers.
        with_thinking: records with thinking in them.
        with_turns: records with an assistant's turn before the last.
        repeated: records whose question and answer are those of an earlier one.
        unused: key that nothing is read from -> how many records have it; the field of the splits is not among them.
    """

    source: SourceConfig
    rows: int
    has_more: bool
    bad_rows: tuple[BadRow, ...]
    records: int
    form: DataForm
    lengths: tuple[int, ...]
    trained_share: float
    split: SplitField | None
    has_ids: bool
    id_share: float | None
    labelled: int
    answers: int
    with_thinking: int
    with_turns: int
    repeated: int
    unused: Mapping[str, int]

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(self.lengths)

    @property
    def length_of_most(self) -> int:
        """Tokens that 99 % of the samples do not exceed."""
        return sorted(self.lengths)[math.ceil(0.99 * len(self.lengths)) - 1]

    @property
    def validates(self) -> bool:
        """Whether there are rows for validation, named as such or by `id`."""
        return self.id_share is not None or (self.split is not None and "validation" in self.split.splits)

    @property
    def tests(self) -> bool:
        """Whether rows are named as test rows."""
        return self.split is not None and "test" in self.split.splits

    @property
    def why_no_id_split(self) -> str:
        """What keeps `validation_split` from going by `id`."""
        return "too few different `id`s to split by" if self.has_ids else "the records have no `id` to split by"


@dataclass(frozen=True, slots=True)
class _Glance:
    """What is kept of a record; its texts are not."""

    id: str | None
    form: DataForm
    answer: str | None
    has_thinking: bool
    has_turns: bool
    said: int
    names: Mapping[str, str]


@dataclass
class _Seen:
    """What one pass over a file keeps."""

    source: SourceConfig
    rows: int = 0
    has_more: bool = False
    bad: list[BadRow] = field(default_factory=list)
    names: list[Mapping[str, str]] = field(default_factory=list)
    glances: list[_Glance] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    num_trained: int = 0
    first: Mapping[str, Any] | None = None
    unused: Counter[str] = field(default_factory=Counter)


def look_at(path: str) -> FileFacts:
    """Read the first rows of a file.

    Raises:
        InputError: the file is missing, unreadable, or none of these rows can be used.
    """
    seen = _read(SourceConfig(path=path))
    if not seen.glances and seen.first is not None and (proposed := _proposal(seen.first, path)):
        seen = _read(proposed)
    if not seen.glances:
        raise InputError(
            f"none of the first {seen.rows:,} records of {path} can be used",
            why=f"{count_kinds(seen.bad)}; {seen.bad[0].where}: {seen.bad[0].reason}" if seen.bad else "there is none",
            fix=_FIX_ANSWER if {row.kind for row in seen.bad} == {"bad answer"} else _FIX_FORM,
        )
    glances = seen.glances
    ignored = {"id", "answer", *(key for keys in KEYS_OF_FORM.values() for key in keys)}
    split = find_split_field(seen.names, ignored)
    answers = [glance.answer for glance in glances if glance.answer is not None]
    return FileFacts(
        source=seen.source,
        rows=seen.rows,
        has_more=seen.has_more,
        bad_rows=tuple(seen.bad),
        records=len(glances),
        form=Counter(glance.form for glance in glances).most_common(1)[0][0],
        lengths=tuple(seen.lengths),
        trained_share=seen.num_trained / sum(seen.lengths),
        split=split,
        has_ids=all(glance.id is not None for glance in glances),
        id_share=_id_share(glances, split),
        labelled=len(answers),
        answers=len(set(answers)),
        with_thinking=sum(glance.has_thinking for glance in glances),
        with_turns=sum(glance.has_turns for glance in glances),
        repeated=len(glances) - len({glance.said for glance in glances}),
        unused={key: count for key, count in seen.unused.items() if split is None or key != split.name},
    )


def _proposal(raw: Mapping[str, Any], path: str) -> SourceConfig | None:
    """How to read a file whose records are of several forms or of none: what the recipe then says beside the path."""
    fitting = fitting_forms(raw)
    if len(fitting) > 1:
        return SourceConfig(path=path, form=fitting[0])
    columns = propose_columns(raw)
    return SourceConfig(path=path, columns=columns) if columns else None


def _read(source: SourceConfig) -> _Seen:
    seen, config = _Seen(source), DataConfig(train={}, max_length=2**20)
    with log.Progress(f"reading {source.path}", None, "rows") as progress:
        for row in islice(read_raw_records("mine", source), ROWS_READ + 1):
            if seen.rows == ROWS_READ:
                seen.has_more = True
                break
            seen.rows += 1
            progress.advance()
            if isinstance(row, BadRow):
                seen.bad.append(row)
                continue
            # A split's name is short, and all texts together may not fit the memory.
            seen.names.append({key: value for key, value in row.fields.items() if len(value) <= _LONGEST_NAME})
            seen.first = seen.first or row.raw
            try:
                record = parse_record(row, source.form)
                samples = render_samples(record, config) if len(seen.glances) < RECORDS_MEASURED else ()
            except BadRowError as error:
                seen.bad.append(bad_row(row.where, error))
                continue
            seen.unused.update(unused_keys(row.raw, record.conversation.form))
            seen.glances.append(_glance(row, record, seen.names[-1]))
            seen.lengths += [len(sample.ids) for sample in samples]
            seen.num_trained += sum(sample.num_trained_tokens for sample in samples)
    return seen


def _glance(row: RawRecord, record: Record, names: Mapping[str, str]) -> _Glance:
    text = text_of(record.where, record.conversation)
    return _Glance(
        id=row.fields.get("id"),
        form=record.conversation.form,
        answer=record.answer,
        has_thinking=any(message.thinking for message in record.messages),
        has_turns=_has_turns(record.messages),
        said=hash((text.question, text.answer)),
        names=names,
    )


def _has_turns(messages: Sequence[Message]) -> bool:
    """Whether the assistant speaks between the first and the last message of the user."""
    users = [number for number, message in enumerate(messages) if message.role == "user"]
    return bool(users) and any(message.role == "assistant" for message in messages[users[0] : users[-1]])


def _id_share(glances: Sequence[_Glance], split: SplitField | None) -> float | None:
    trained = glances
    if split is not None and "validation" in split.splits:
        return None
    if split is not None and split.splits:
        trained = [glance for glance in glances if glance.names.get(split.name) in split.splits["train"]]
    if any(glance.id is None for glance in trained):
        return None
    places = [share_of(glance.id) for glance in trained if glance.id is not None]
    return next((share for share in _SHARES if 0 < sum(place < share for place in places) < len(places)), None)
