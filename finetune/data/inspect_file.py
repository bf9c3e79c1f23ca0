"""Inspect a data file for `finetune recipes new`: its form, lengths, splits, and the records that cannot be used."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from finetune import log
from finetune.config.schema import DataConfig, DataForm, SourceConfig, ThinkTags, ValidationSplitConfig
from finetune.data.bad_records import count_kinds, fix_for, named
from finetune.data.checks import BadRecordError
from finetune.data.control_text import ControlText, count_control_text
from finetune.data.conversation import Message
from finetune.data.forms import KEYS_OF_FORM, fitting_forms, propose_columns, unused_keys
from finetune.data.harmony.render import render_examples
from finetune.data.harmony.truncate import group_length
from finetune.data.preferences import LABELS_ALONE, PREFERENCE_KEYS
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
from finetune.files import JsonObject
from finetune.log import printable

RECORDS_READ = 100_000
RECORDS_TOKENISED = 2000  # of them, since tokenising takes longest
BAD_RECORDS_SHOWN = 5
_LONGEST_NAME = 40
_MOST_VALUES = 20
_SPLIT_WORDS: dict[str, SplitName] = {
    "train": "train", "training": "train",
    "validation": "validation", "val": "validation", "valid": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test",
}  # fmt: skip
_SPLIT_FIELDS = ("set", "subset", "partition", "fold")
_SHARES = (ValidationSplitConfig.share, 0.1, 0.2)


@dataclass(frozen=True)
class SplitField:
    """A field that names splits, or seems to.

    Attributes:
        name: the field.
        splits: split -> the values that name it. Empty: the field may mean something else.
        others: value that names no split -> how many records have it.
        missing: records without the field.
    """

    name: str
    splits: Mapping[SplitName, tuple[str, ...]]
    others: Mapping[str, int]
    missing: int

    @property
    def num_unnamed(self) -> int:
        """Records that no value assigns to a split."""
        return sum(self.others.values()) + self.missing


@dataclass
class FileSummary:
    """Counts over a file's first records.

    Attributes:
        source: how they were read.
        num_read: how many were read, `RECORDS_READ` at most.
        has_more: the file has more.
        bad_records: those that cannot be used.
        forms: how many of the others came in which form.
        lengths: tokens of each example of the first `RECORDS_TOKENISED` records; of a preference record, tokens of its
            prompt and answers side by side.
        num_trained_tokens: how many of these would be trained.
        split: the field that names splits, or seems to.
        has_ids: every record has an `id`.
        id_share: the least share of `validation_split` by `id` that leaves training records on both sides; None if
            none does, or if the file names validation records.
        num_with_thinking: records with thinking in them.
        num_with_turns: records with an assistant's turn before the last.
        control_text: kind -> records whose texts another template or channel would read as control.
        num_moved_thinking: records whose thinking the recipe moves out of tags (`data.think_tags`).
        unused_keys: key that nothing is read from -> how many records have it, without the field of the splits.
    """

    source: SourceConfig
    num_read: int = 0
    has_more: bool = False
    bad_records: list[BadRecord] = field(default_factory=list)
    forms: Counter[DataForm] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    num_trained_tokens: int = 0
    split: SplitField | None = None
    has_ids: bool = False
    id_share: float | None = None
    num_with_thinking: int = 0
    num_with_turns: int = 0
    control_text: dict[str, ControlText] = field(default_factory=dict)
    num_moved_thinking: int = 0
    unused_keys: Counter[str] = field(default_factory=Counter)

    @property
    def num_usable(self) -> int:
        """Records that can be used."""
        return self.forms.total()

    @property
    def objective(self) -> str:
        """The option of configs/objective/ that learns from the file's form.

        Raises:
            InputError: none does: the records are single answers with labels.
        """
        form = self.forms.most_common(1)[0][0]
        if form == "labelled":
            raise InputError("the file's records are single answers with labels", why=LABELS_ALONE, fix="give pairs")
        return "dpo" if form in PREFERENCE_KEYS else "sft"

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(self.lengths)

    @property
    def length_of_most(self) -> int:
        """Tokens that 99 % of the examples do not exceed."""
        return sorted(self.lengths)[math.ceil(0.99 * len(self.lengths)) - 1]

    @property
    def has_validation(self) -> bool:
        """Whether there are records for validation, named as such or chosen by `id`."""
        return self.id_share is not None or (self.split is not None and "validation" in self.split.splits)

    @property
    def has_test(self) -> bool:
        """Whether the file names test records."""
        return self.split is not None and "test" in self.split.splits

    @property
    def is_skippable(self) -> bool:
        """Whether a run that skips the bad records continues without them."""
        return len(self.bad_records) <= DataConfig.max_skipped_ratio * self.num_read


def inspect_file(path: str) -> FileSummary:
    """Read the first records of a file.

    Raises:
        InputError: the file is missing, unreadable, or none of these records can be used.
    """
    summary, first = _read(SourceConfig(path=path))
    if not summary.num_usable and first is not None and (proposed := _propose_source(first, path)):
        summary, _ = _read(proposed)
    if "tool_calls" in summary.control_text or any("form: hermes" in bad.reason for bad in summary.bad_records):
        hermes, _ = _read(dataclasses.replace(summary.source, form="hermes"))
        if hermes.num_usable and hermes.num_usable >= summary.num_usable:
            summary = hermes
    if not summary.num_usable:
        bad = summary.bad_records
        raise InputError(
            f"none of the first {summary.num_read:,} records of {path} can be used",
            why="\n       ".join([count_kinds(bad), *named(bad, BAD_RECORDS_SHOWN)]) if bad else "there is none",
            fix=fix_for(bad) if bad else None,
        )
    if "think_tags" in summary.control_text:
        moved, _ = _read(summary.source, "move")
        if moved.num_usable == summary.num_usable:
            return moved
    return summary


def _propose_source(raw: JsonObject, path: str) -> SourceConfig | None:
    """Settings for a file whose records fit several forms or none; the recipe writes them beside the path."""
    fitting = fitting_forms(raw)
    if len(fitting) > 1:
        return SourceConfig(path=path, form=fitting[0])
    columns = propose_columns(raw)
    return SourceConfig(path=path, columns=columns) if columns else None


def _read(source: SourceConfig, think_tags: ThinkTags = "keep") -> tuple[FileSummary, JsonObject | None]:
    """Read the first records. Returns their summary, and the first record as it was read, usable or not."""
    summary, config = FileSummary(source), DataConfig(train={}, max_length=2**20)
    first: JsonObject | None = None
    all_names: list[Mapping[str, str]] = []
    usable_names: list[Mapping[str, str]] = []
    with log.Progress(f"reading {source.path}", None, "records") as progress:
        for raw in islice(read_raw_records("mine", source), RECORDS_READ + 1):
            if summary.num_read == RECORDS_READ:
                summary.has_more = True
                break
            summary.num_read += 1
            progress.advance()
            if isinstance(raw, BadRecord):
                summary.bad_records.append(raw)
                continue
            first = first or raw.raw
            # A split's name is short, and all texts together may not fit into memory.
            names = {key: value for key, value in raw.fields.items() if len(value) <= _LONGEST_NAME or key == "id"}
            all_names.append(names)
            try:
                record = parse_record(raw, source.form, think_tags)
                examples = render_examples(record, config) if summary.num_usable < RECORDS_TOKENISED else []
            except BadRecordError as error:
                summary.bad_records.append(bad_record(raw.where, error))
                continue
            usable_names.append(names)
            if record.conversation.answers and examples:
                summary.lengths.append(group_length(examples))
            else:
                summary.lengths += [len(example.ids) for example in examples]
            summary.num_trained_tokens += sum(example.num_trained_tokens for example in examples)
            _count(summary, raw, record)
    summary.split = find_split_field(
        all_names, {"id", "answer", *(key for keys in KEYS_OF_FORM.values() for key in keys)}
    )
    summary.has_ids = all("id" in names for names in usable_names)
    summary.id_share = _id_share(usable_names, summary.split)
    if summary.split is not None:
        del summary.unused_keys[summary.split.name]
    return summary, first


def _count(summary: FileSummary, raw: RawRecord, record: Record) -> None:
    summary.forms[record.conversation.form] += 1
    summary.unused_keys.update(unused_keys(raw.raw, record.conversation.form))
    count_control_text(record.conversation, printable(record.where), summary.control_text)
    summary.num_moved_thinking += record.conversation.has_moved_thinking
    summary.num_with_thinking += any(message.thinking for message in record.messages)
    summary.num_with_turns += not record.conversation.answers and _has_turns(record.messages)


def _has_turns(messages: Sequence[Message]) -> bool:
    """Whether the assistant writes between the first and the last message of the user."""
    users = [number for number, message in enumerate(messages) if message.role == "user"]
    return bool(users) and any(message.role == "assistant" for message in messages[users[0] : users[-1]])


def _id_share(records: Sequence[Mapping[str, str]], split: SplitField | None) -> float | None:
    if split is not None and "validation" in split.splits:
        return None
    if split is not None and split.splits:
        records = [names for names in records if names.get(split.name) in split.splits["train"]]
    if any("id" not in names for names in records):
        return None
    places = [share_of(names["id"]) for names in records]
    return next((share for share in _SHARES if 0 < sum(place < share for place in places) < len(places)), None)


def find_split_field(records: Sequence[Mapping[str, str]], ignored: Collection[str]) -> SplitField | None:
    """Find the field with `train` among its values that leaves the fewest records without a split.

    A value that is no split's name (`holdout`) may occur beside `train` if the field is named like one for splits or
    names two of them; such records belong to no split. Where neither holds, or a field with such a name has no `train`,
    the field is returned without splits, so that the user can be asked.

    Args:
        records: the fields of each record, without texts that are too long for a name.
        ignored: fields that are known to mean something else.

    Returns:
        The field, or None if none looks like one.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for fields in records:
        for name, value in fields.items():
            if name not in ignored:
                counts[name][value] += 1
    found = [_split_field(name, values, len(records)) for name, values in counts.items() if len(values) <= _MOST_VALUES]
    candidates = [candidate for candidate in found if candidate is not None]
    return min(candidates, key=lambda candidate: (not candidate.splits, candidate.num_unnamed), default=None)


def _split_field(name: str, values: Counter[str], num_records: int) -> SplitField | None:
    words = {value: _SPLIT_WORDS.get(value.strip().lower()) for value in sorted(values)}
    splits = {split: tuple(value for value in words if words[value] == split) for split in SPLITS}
    splits = {split: named for split, named in splits.items() if named}
    others = {value: values[value] for value, split in words.items() if split is None}
    candidate = SplitField(name, splits, others, num_records - values.total())
    is_named_so = "split" in name.lower() or name.lower() in _SPLIT_FIELDS
    if "train" in splits and (is_named_so or len(splits) > 1 or not candidate.num_unnamed):
        return candidate
    if "train" in splits or is_named_so:
        return SplitField(name, {}, dict(sorted(values.items())), candidate.missing)
    return None
