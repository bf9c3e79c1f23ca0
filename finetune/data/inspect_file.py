"""Which of a file's fields says what split a row belongs to, as far as names can tell."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from finetune import log
from finetune.config.schema import DataConfig, DataForm, SourceConfig, ValidationSplitConfig
from finetune.data.checks import BadRecordError
from finetune.data.conversation import Message
from finetune.data.dataset import count_kinds
from finetune.data.duplicates import text_of
from finetune.data.forms import KEYS_OF_FORM, fitting_forms, propose_columns, unused_keys
from finetune.data.harmony.render import render_examples
from finetune.data.sources import (
    SPLITS,
    BadRecord,
    RawRecord,
    Record,
    SplitName,
    bad_record,
    parse_record,
    read_raw_records,
    share_of,
)
from finetune.errors import InputError

_WORDS: dict[SplitName, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing", "eval"),
}
_SPLIT_OF = {word: split for split, words in _WORDS.items() for word in words}
_MOST_VALUES = 20
_FIELD_NAMES = ("set", "subset", "partition", "fold")


@dataclass(frozen=True)
class SplitField:
    """A field that names splits, or seems to.

    Attributes:
        name: the field.
        splits: split -> the values that name it. Empty: the field may well mean something else.
        others: value that names no split -> how many rows have it.
        missing: rows without the field.
    """

    name: str
    splits: Mapping[SplitName, tuple[str, ...]]
    others: Mapping[str, int]
    missing: int

    @property
    def num_unnamed(self) -> int:
        """Rows that no value assigns to a split."""
        return sum(self.others.values()) + self.missing


def find_split_field(rows: Sequence[Mapping[str, str]], ignored: Collection[str]) -> SplitField | None:
    """Find the field with `train` among its values that leaves the fewest rows without a split.

    A value that is no split's name (`holdout`) may stand beside `train` if the field is called like one for splits or
    names two of them; such rows belong to no split. Where neither holds, or such a name comes without `train`, the
    field is returned without splits, so that the person can be asked.

    Args:
        rows: the fields of each row, texts that are too long for a name left out.
        ignored: fields that are known to mean something else.

    Returns:
        The field, or None if none looks like one.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        for name, value in row.items():
            counts[name][value] += 1
    found = [
        _split_field(name, counter, len(rows))
        for name, counter in counts.items()
        if name not in ignored and len(counter) <= _MOST_VALUES
    ]
    seeming = [field for field in found if field is not None]
    return min(seeming, key=lambda field: (not field.splits, field.num_unnamed), default=None)


def _split_field(name: str, counter: Counter[str], num_rows: int) -> SplitField | None:
    splits: dict[SplitName, tuple[str, ...]] = {}
    others: dict[str, int] = {}
    for value, count in sorted(counter.items()):
        split = _SPLIT_OF.get(value.strip().lower())
        if split is None:
            others[value] = count
        else:
            splits[split] = (*splits.get(split, ()), value)
    splits = {split: splits[split] for split in SPLITS if split in splits}
    field = SplitField(name, splits, others, num_rows - counter.total())
    is_called_so = "split" in name.lower() or name.lower() in _FIELD_NAMES
    if "train" in splits and (is_called_so or len(splits) > 1 or not field.num_unnamed):
        return field
    if "train" in splits or is_called_so:
        return SplitField(name, {}, dict(sorted(counter.items())), field.missing)
    return None


# A first look at somebody's file: how it holds conversations, how long they are, how it is split.

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
        bad_records: those that cannot be used.
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
    bad_records: tuple[BadRecord, ...]
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
    bad: list[BadRecord] = field(default_factory=list)
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
        bad_records=tuple(seen.bad),
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
            if isinstance(row, BadRecord):
                seen.bad.append(row)
                continue
            # A split's name is short, and all texts together may not fit the memory.
            seen.names.append({key: value for key, value in row.fields.items() if len(value) <= _LONGEST_NAME})
            seen.first = seen.first or row.raw
            try:
                record = parse_record(row, source.form)
                samples = render_examples(record, config) if len(seen.glances) < RECORDS_MEASURED else ()
            except BadRecordError as error:
                seen.bad.append(bad_record(row.where, error))
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
