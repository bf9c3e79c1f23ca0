"""A first look at somebody's file: how it holds conversations, how long they are, how it is split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from finetune.config.schema import DataConfig, SourceConfig
from finetune.data.dataset import count_kinds
from finetune.data.message import BadRowError
from finetune.data.render import render_samples
from finetune.data.sources import BadRow, Record, bad_row, parse_record, read_raw_records
from finetune.errors import InputError

ROWS_READ = 2000
ROWS_SCANNED = 100_000  # further rows whose fields alone are looked at
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing", "eval"),
}


@dataclass(frozen=True)
class FileFacts:
    """What a file's first records show.

    Attributes:
        records: how many were read (`ROWS_READ` at most), whether there are more, and how many cannot be used.
        form: how they hold their conversation; the most frequent one.
        longest, most: tokens of the longest record, and of 99 % of them.
        trained_share: share of tokens that would be trained.
        split_field: the field whose values are split names, or None.
        splits: split -> the value that names it in that field.
        has_ids: every record has an `id` of its own.
        answers: how many different answers; 0 if a record has none.
        thinking_share: share of records with thinking in them.
    """

    records: int
    has_more: bool
    bad_rows: tuple[BadRow, ...]
    form: str
    longest: int
    most: int
    trained_share: float
    split_field: str | None
    splits: dict[str, str]
    has_ids: bool
    answers: int
    thinking_share: float


def look_at(path: str) -> FileFacts:
    """Read the first records of a file.

    Raises:
        InputError: the file is missing, unreadable, or none of its first records can be used.
    """
    stream = read_raw_records("mine", SourceConfig(path=path))
    rows = list(islice(stream, ROWS_READ))
    records: list[Record] = []
    bad: list[BadRow] = []
    for row in rows:
        try:
            if isinstance(row, BadRow):
                bad.append(row)
            else:
                records.append(parse_record(row, "auto"))
        except BadRowError as error:
            bad.append(bad_row(row.where, error))
    if not records:
        raise InputError(
            f"none of the first {len(rows)} records of {path} can be used",
            why=f"{count_kinds(bad)}; {bad[0].where}: {bad[0].reason}" if bad else "there is none",
            fix="docs/guide/harmony.md lists the forms a record can have",
        )
    config = DataConfig(train={}, max_length=2**20)
    samples = [sample for record in records for sample in render_samples(record, config)]
    lengths = np.array([len(sample.ids) for sample in samples])
    answers = {record.answer for record in records}
    # Splits often stand one after the other, so their names are looked for further on.
    further = [row.fields for row in islice(stream, ROWS_SCANNED) if not isinstance(row, BadRow)]
    field, splits = _splits([*(record.fields for record in records), *further])
    return FileFacts(
        records=len(rows),
        has_more=bool(further),
        bad_rows=tuple(bad),
        form=Counter(record.conversation.form for record in records).most_common(1)[0][0],
        longest=int(lengths.max()),
        most=int(np.quantile(lengths, 0.99, method="higher")),
        trained_share=float(sum(sample.num_trained_tokens for sample in samples) / lengths.sum()),
        split_field=field,
        splits=splits,
        has_ids=all("id" in record.fields for record in records),
        answers=0 if None in answers else len(answers),
        thinking_share=sum(any(m.thinking for m in record.messages) for record in records) / len(records),
    )


def _splits(rows: Sequence[Mapping[str, str]]) -> tuple[str | None, dict[str, str]]:
    """The first field of all rows whose values are names of splits, `train` among them."""
    known = {word: split for split, words in _SPLIT_WORDS.items() for word in words}
    for field in rows[0]:
        values = {fields.get(field, "") for fields in rows}
        if len(values) <= 8 and all(value.lower() in known for value in values):
            splits = {known[value.lower()]: value for value in sorted(values)}
            if "train" in splits:
                return field, splits
    return None, {}
