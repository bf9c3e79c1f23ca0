"""Read, check and render one split of a recipe's data."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from finetune.config.schema import DataConfig, SourceConfig
from finetune.data.render import Sample, render_sample
from finetune.data.sources import BadRow, Record, read_records
from finetune.data.tokenizer import LONGEST_TOKEN_BYTES
from finetune.errors import ConfigError, InputError

SplitName = Literal["train", "validation", "test"]

_ROWS_SHOWN = 3


@dataclass(frozen=True, eq=False)
class Split:
    """One split, read and rendered.

    Attributes:
        name: `train`, `validation` or `test`.
        records: the usable records in the order of the sources and their files.
        samples: their tokens; `samples[i]` renders `records[i]`.
        bad_rows: the rows that were skipped, each with its reason.
    """

    name: SplitName
    records: tuple[Record, ...]
    samples: tuple[Sample, ...]
    bad_rows: tuple[BadRow, ...]

    @functools.cached_property
    def num_tokens(self) -> int:
        """Tokens of all samples, trained or context."""
        return sum(len(sample.ids) for sample in self.samples)

    @functools.cached_property
    def num_trained_tokens(self) -> int:
        """Tokens with a loss weight above 0."""
        return sum(sample.num_trained_tokens for sample in self.samples)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over the samples' token ids and weights, in order: what is trained on, wherever it came from."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(len(sample.ids).to_bytes(8, "little"))
            digest.update(sample.ids.astype("<i4").tobytes())
            digest.update(sample.weights.astype("<f4").tobytes())
        return digest.hexdigest()


def load_split(config: DataConfig, split: SplitName) -> Split:
    """Read a split's sources and render every record.

    The sources are read to their end before anything is refused, so that one message counts all that is wrong.

    Args:
        config: sources, length limit and what to do with rows that cannot be used.
        split: which of the recipe's splits.

    Raises:
        ConfigError: the recipe has no source for this split.
        InputError: a source cannot be read; a row cannot be used and `on_bad_row` is `stop`; more than
            `max_skipped_share` of the rows would be skipped; or no usable row is left.
    """
    sources: Mapping[str, SourceConfig] = getattr(config, split)
    if not sources:
        raise ConfigError(f"data.{split} names no source", fix=f"set data.{split}.NAME.path in the recipe")
    records: list[Record] = []
    samples: list[Sample] = []
    bad_rows: list[BadRow] = []
    for name, source in sources.items():
        for row in read_records(name, source):
            rendered = row if isinstance(row, BadRow) else _render(row, config)
            if isinstance(rendered, BadRow):
                bad_rows.append(rendered)
            elif isinstance(row, Record):
                records.append(row)
                samples.append(rendered)
    _check_bad_rows(config, split, bad_rows, len(records))
    return Split(split, tuple(records), tuple(samples), tuple(bad_rows))


def describe(split: Split) -> str:
    """One line on a split: rows, tokens, and what was skipped.

    >>> describe(Split("train", (), (), ()))
    'train: 0 rows, 0 tokens, 0 trained (0.0 %)'
    """
    share = split.num_trained_tokens / max(1, split.num_tokens)
    text = (
        f"{split.name}: {len(split.samples):,} rows, {split.num_tokens:,} tokens, "
        f"{split.num_trained_tokens:,} trained ({share:.1%})".replace("%", " %")
    )
    if split.bad_rows:
        text += f"; {len(split.bad_rows):,} rows skipped ({count_kinds(split.bad_rows)})"
    return text


def count_kinds(bad_rows: tuple[BadRow, ...] | list[BadRow]) -> str:
    """How many bad rows there are of each kind, most frequent first, such as `2 unknown role, 1 too long`."""
    return ", ".join(f"{count:,} {kind}" for kind, count in Counter(row.kind for row in bad_rows).most_common())


def _render(record: Record, config: DataConfig) -> Sample | BadRow:
    # Encoding takes quadratic time in a long word (3 s for 100,000 letters), so what can never fit is not encoded.
    num_characters = record.conversation.num_characters
    if num_characters > LONGEST_TOKEN_BYTES * config.max_length:
        reason = f"{num_characters:,} characters cannot fit data.max_length ({config.max_length:,} tokens)"
        return BadRow(record.where, "too long", reason)
    sample = render_sample(record, config)
    if len(sample.ids) > config.max_length:
        reason = f"{len(sample.ids):,} tokens are more than data.max_length ({config.max_length:,})"
        return BadRow(record.where, "too long", reason)
    if sample.num_trained_tokens == 0:
        return BadRow(record.where, "nothing to train", "no token of it would be trained")
    return sample


def _check_bad_rows(config: DataConfig, split: SplitName, bad_rows: list[BadRow], num_good: int) -> None:
    num_rows = num_good + len(bad_rows)
    shown = [f"{row.where}: {row.reason}" for row in bad_rows[:_ROWS_SHOWN]]
    if len(bad_rows) > _ROWS_SHOWN:
        shown.append(f"and {len(bad_rows) - _ROWS_SHOWN:,} more")
    why = "\n       ".join([count_kinds(bad_rows), *shown]) if bad_rows else None
    what = f"data.{split}: {len(bad_rows):,} of {num_rows:,} rows cannot be used"
    if num_good == 0:
        raise InputError(f"data.{split}: none of {num_rows:,} rows can be used", why=why)
    if bad_rows and config.on_bad_row == "stop":
        raise InputError(what, why=why, fix="correct them, or set data.on_bad_row=skip to leave them out")
    if len(bad_rows) > config.max_skipped_share * num_rows:
        raise InputError(
            f"{what}: more than data.max_skipped_share ({100 * config.max_skipped_share:g} %) allows",
            why=why,
            fix="correct them, or raise data.max_skipped_share",
        )
