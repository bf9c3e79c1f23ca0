"""Read, check and render one split of a recipe's data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from finetune.config.schema import DataConfig
from finetune.data.build import Facts, build
from finetune.data.cache import cached
from finetune.data.example_table import ExampleTable, RecordTable, TableWriter
from finetune.data.harmony.render import Example
from finetune.data.sources import BadRecord, Record, SplitName, sources_of
from finetune.errors import InputError

_ROWS_SHOWN = 3


@dataclass(frozen=True, eq=False)
class Split:
    """One split, read and rendered.

    Attributes:
        name: `train`, `validation` or `test`.
        records: `records[i]` is what `samples[i]` was rendered from; a record of several samples stands several times.
        samples: the tokens, in the order of the sources and their files.
        bad_records: the rows that were skipped, each with its reason.
        dropped: the rows left out because the recipe says so, each with its reason.
        num_truncated: samples that lost context to fit.
        source_sizes: samples of each source, in order.
        forms: how many records came in which form.
        unused: key that nothing is read from -> how many records have it.
        num_records: records that the samples were made of.
        num_tokens, num_trained_tokens: of all samples; trained is what has a loss weight above 0.
        answers: by source, how many records have which `answer` (see `Facts`).
        fingerprint: sha256 over the samples' token ids and weights, in order: what is trained, wherever it is from.
    """

    name: SplitName
    records: Sequence[Record]
    samples: Sequence[Example]
    bad_records: tuple[BadRecord, ...] = ()
    dropped: tuple[BadRecord, ...] = ()
    num_truncated: int = 0
    source_sizes: Mapping[str, int] = field(default_factory=dict)
    forms: Mapping[str, int] = field(default_factory=dict)
    unused: Mapping[str, int] = field(default_factory=dict)
    num_records: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    answers: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    fingerprint: str = ""


def load_split(config: DataConfig, split: SplitName, *, check: bool = True) -> Split:
    """Read a split's sources and render every record, or find all of it in the cache.

    The sources are read to their end before anything is refused, so that one message counts all that is wrong. Memory
    does not grow with the rows: with `data.cache` the samples lie in a memory-mapped file.

    Args:
        config: sources, length limit and what to do with rows that cannot be used.
        split: which of the recipe's splits.
        check: refuse what a run must not be given; off, to show it: a split may then be empty.

    Raises:
        ConfigError: the recipe has no source for this split, or a source's settings name what is not there.
        InputError: a source cannot be read; a row cannot be used and `on_bad_record` is `stop`; more than
            `max_skipped_ratio` of the rows would be skipped; or no usable row is left.
        MachineError: the cache cannot be written, or a package is missing.
    """
    sources_of(config, split)
    if config.cache:
        tables, facts = cached(config, split)
    else:
        writer = TableWriter(None)
        facts = build(config, split, writer)
        tables = writer.close()
    if check:
        _check_left_out(config, split, facts)
    return Split(
        split,
        RecordTable(tables),
        ExampleTable(tables),
        tuple(facts.bad_records),
        tuple(facts.dropped),
        facts.num_truncated,
        facts.source_sizes,
        facts.forms,
        facts.unused,
        facts.num_records,
        facts.num_tokens,
        facts.num_trained_tokens,
        facts.answers,
        facts.fingerprint,
    )


def describe(split: Split) -> str:
    """One line on a split: rows, tokens, which forms they came in if not all as `messages`, and what was skipped.

    >>> describe(Split("train", (), ()))
    'train: 0 rows, 0 tokens, 0 trained (0.0 %)'
    """
    share = split.num_trained_tokens / max(1, split.num_tokens)
    text = (
        f"{split.name}: {len(split.samples):,} rows, {split.num_tokens:,} tokens, "
        f"{split.num_trained_tokens:,} trained ({share:.1%})".replace("%", " %")
    )
    if set(split.forms) - {"messages"}:
        text += "; read as " + ", ".join(f"{form} ({count:,})" for form, count in split.forms.items())
    if split.unused:
        text += f"; keys not used: {', '.join(split.unused)}"
    if split.num_truncated:
        text += f"; {split.num_truncated:,} truncated"
    if split.dropped:
        text += f"; {len(split.dropped):,} dropped ({count_kinds(split.dropped)})"
    if split.bad_records:
        text += f"; {len(split.bad_records):,} rows skipped ({count_kinds(split.bad_records)})"
    return text


def count_kinds(bad_records: Sequence[BadRecord]) -> str:
    """How many bad rows there are of each kind, most frequent first, such as `2 unknown role, 1 too long`."""
    return ", ".join(f"{count:,} {kind}" for kind, count in Counter(row.kind for row in bad_records).most_common())


def _check_left_out(config: DataConfig, split: SplitName, facts: Facts) -> None:
    bad_records, num_good = facts.bad_records, facts.num_records
    num_rows = num_good + len(bad_records) + len(facts.dropped)
    shown = [f"{row.where}: {row.reason}" for row in bad_records[:_ROWS_SHOWN]]
    if len(bad_records) > _ROWS_SHOWN:
        shown.append(f"and {len(bad_records) - _ROWS_SHOWN:,} more")
    why = "\n       ".join([count_kinds(bad_records), *shown]) if bad_records else None
    what = f"data.{split}: {len(bad_records):,} of {num_rows:,} rows cannot be used"
    if num_good == 0:
        if num_rows == 0:
            raise _nothing_falls_to(config, split)
        if why is None:
            first = facts.dropped[0]
            why = f"data.too_long={config.too_long} drops them all ({first.where}: {first.reason})"
        raise InputError(f"data.{split}: none of {num_rows:,} rows can be used", why=why)
    if bad_records and config.on_bad_record == "stop":
        raise InputError(what, why=why, fix="correct them, or set data.on_bad_record=skip to leave them out")
    if len(bad_records) > config.max_skipped_ratio * num_rows:
        raise InputError(
            f"{what}: more than data.max_skipped_ratio ({100 * config.max_skipped_ratio:g} %) allows",
            why=why,
            fix="correct them, or raise data.max_skipped_ratio",
        )


def _nothing_falls_to(config: DataConfig, split: SplitName) -> InputError:
    """A split without a row, good or bad: all are on the other side of `validation_split`, or broken for all splits."""
    given = config.validation_split
    if given.key is None or split == "test":
        why = "no row of its sources is a record; data.train counts them, since it reads the same file"
        return InputError(f"data.{split} has no rows", why=why, fix="finetune data stats names them")
    way = "raise" if split == "validation" else "lower"
    return InputError(
        f"data.{split} has no rows: none falls to {split}",
        why=f"data.validation_split goes by `{given.key}`, share {given.share:g}",
        fix=f"{way} data.validation_split.share, go by a key with more values, or name sources in data.validation",
    )
