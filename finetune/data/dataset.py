"""One split of a recipe's data: every record of its sources is read, checked, rendered as tokens, cut and stored."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from finetune import log
from finetune.config.schema import DataConfig, SourceConfig
from finetune.config.suggest import suggest_word
from finetune.data.bad_records import count_kinds, fix_for, named
from finetune.data.cache import MOST_ANSWERS, SplitStats, locked_entry
from finetune.data.checks import BadRecordError
from finetune.data.control_text import control_text_lines, count_control_text
from finetune.data.example_table import ExampleTable, RecordTable, TableWriter
from finetune.data.forms import unused_keys
from finetune.data.harmony.render import Example, render_examples
from finetune.data.harmony.tokenizer import LONGEST_TOKEN_BYTES
from finetune.data.harmony.truncate import group_length, truncate, truncate_group
from finetune.data.sources import (
    BadRecord,
    RawRecord,
    Record,
    SplitName,
    bad_record,
    belongs_to,
    counts_broken_records,
    parse_record,
    read_raw_records,
    sources_of,
)
from finetune.errors import ConfigError, InputError
from finetune.log import printable

_RECORDS_SHOWN = 3
MOST_BAD_RECORDS = 1_000_000


@dataclass(frozen=True, eq=False)
class Split:
    """One split, read and rendered.

    Attributes:
        name: `train`, `validation` or `test`.
        records: `records[i]` is the record of `examples[i]`; a record of several examples occurs several times.
        examples: the tokenised records, in the order of the sources and their files.
        stats: counts of records, tokens, and what was left out.
    """

    name: SplitName
    records: Sequence[Record]
    examples: Sequence[Example]
    stats: SplitStats = field(default_factory=SplitStats)

    def first_examples(self) -> list[int]:
        """The number of each record's first example."""
        if isinstance(self.records, RecordTable):
            return self.records.first_examples().tolist()
        return [n for n, record in enumerate(self.records) if not n or record.where != self.records[n - 1].where]


def load_split(config: DataConfig, split: SplitName, *, check: bool = True) -> Split:
    """Read a split's sources and tokenise every record, or find all of it in the cache.

    The sources are read to their end before anything is refused, so that one message counts all faults. Memory does not
    grow with the number of records: with `data.cache` the examples are in a memory-mapped file.

    Args:
        config: sources, length limit and the policy for records that cannot be used.
        split: which of the recipe's splits.
        check: refuse a split that a run must not be given. Off for commands that show it: a split may then be empty.

    Raises:
        ConfigError: the recipe has no source for this split, or a source's settings name what is not there.
        InputError: a source cannot be read; a record cannot be used and `on_bad_record` is `stop`; more than
            `max_skipped_ratio` of the records would be skipped; or no usable record is left.
        MachineError: the cache cannot be written, or a package is missing.
    """
    sources_of(config, split)
    if not config.cache:
        writer = TableWriter(None)
        stats = tokenise(config, split, writer)
        tables = writer.close()
    else:
        with locked_entry(config, split) as entry:
            if (found := entry.read()) is not None:
                tables, stats = found
            else:
                with entry.writer() as writer:
                    stats = tokenise(config, split, writer)
                    entry.complete(writer, stats)
                tables = entry.open()
    if check:
        check_left_out(config, split, stats)
    return Split(split, RecordTable(tables, config.think_tags), ExampleTable(tables), stats)


def tokenise(config: DataConfig, split: SplitName, writer: TableWriter) -> SplitStats:
    """Read a split's sources to their end and write the examples of every usable record.

    Args:
        config: sources, rendering and length.
        split: which of the recipe's splits.
        writer: stores the examples.

    Raises:
        ConfigError: see `read_raw_records`; or no training record has the field of `validation_split.key`.
        InputError: see `read_raw_records`.
    """
    stats, digest = SplitStats(), hashlib.sha256()
    with log.Progress(f"tokenising {split}", None, "records") as progress:
        for name, source in sources_of(config, split).items():
            split_key, counts_broken = _SplitKey(config, name), counts_broken_records(config, split, name)
            stats.source_sizes[name] = 0
            answers = stats.answers.setdefault(name, {})
            for raw in read_raw_records(name, source):
                progress.advance()
                _refuse_if_most_are_bad(split, stats)
                if isinstance(raw, BadRecord):
                    if counts_broken:
                        stats.bad_records.append(raw)
                    continue
                split_key.see(raw.fields)
                if not belongs_to(raw.fields, config, split):
                    continue
                examples = _usable_examples(raw, source, config, stats)
                if not examples:
                    continue
                writer.add(raw, source.form, examples)
                stats.num_records += 1
                if not math.isnan(examples[0].score) and len(examples) == 1:
                    label = "desirable" if examples[0].score > 0 else "undesirable"
                    stats.labels[label] = stats.labels.get(label, 0) + 1
                _count_answer(raw.fields.get("answer"), answers)
                stats.source_sizes[name] += len(examples)
                for example in examples:
                    _count(example, stats, digest)
            if split != "test":  # test records are not split, and need no such field
                split_key.check()
    stats.fingerprint = digest.hexdigest()
    return stats


def _refuse_if_most_are_bad(split: SplitName, stats: SplitStats) -> None:
    """Stop before the faults of a file of another kind fill the memory."""
    for left_out in (stats.bad_records, stats.dropped):
        if len(left_out) > MOST_BAD_RECORDS:
            raise InputError(
                f"data.{split}: {MOST_BAD_RECORDS:,} records are left out, of {stats.num_records + len(left_out):,}",
                why="\n       ".join([count_kinds(left_out), *named(left_out, _RECORDS_SHOWN)]),
                fix=fix_for(left_out),
            )


def _usable_examples(raw: RawRecord, source: SourceConfig, config: DataConfig, stats: SplitStats) -> Sequence[Example]:
    """Make a record's examples; a record or example that is left out is counted."""
    try:
        record, examples = _make_examples(raw, source, config)
    except BadRecordError as error:
        left_out = stats.dropped if error.kind == "too long" and config.too_long != "error" else stats.bad_records
        left_out.append(bad_record(raw.where, error))
        return ()
    if record.conversation.answers:
        kept = _shorten_group(examples, config, stats)
    else:
        kept = [shortened for example in examples if (shortened := _shorten(example, config, stats)) is not None]
    if kept:
        form = record.conversation.form
        stats.forms[form] = stats.forms.get(form, 0) + 1
        stats.num_moved_thinking += record.conversation.has_moved_thinking
        count_control_text(record.conversation, printable(raw.where), stats.control_text)
        for key in unused_keys(raw.raw, form):
            if key not in source.where and key != config.validation_split.key:
                stats.unused_keys[key] = stats.unused_keys.get(key, 0) + 1
    return kept


def _make_examples(raw: RawRecord, source: SourceConfig, config: DataConfig) -> tuple[Record, list[Example]]:
    """From a record to messages to tokens with loss weights: the examples that have a token to train.

    Raises:
        BadRecordError: the record cannot be used, has nothing to train, or is too long and `too_long` is `error`.
    """
    record = parse_record(raw, source.form, config.think_tags)
    # Encoding takes quadratic time in a long word (3 s for 100,000 letters), so text that can never fit is not encoded.
    num_characters = record.conversation.num_characters
    if record.conversation.text is None and num_characters > LONGEST_TOKEN_BYTES * config.max_length:
        reason = f"{num_characters:,} characters cannot fit data.max_length ({config.max_length:,} tokens)"
        raise BadRecordError("too long", reason)
    rendered = render_examples(record, config)
    examples = [example for example in rendered if example.num_trained_tokens]
    is_group = bool(record.conversation.answers)
    if not examples or (is_group and len(examples) < len(rendered)):
        raise BadRecordError("nothing to train", f"no token of {'an answer' if is_group else 'it'} would be trained")
    longest = group_length(examples) if is_group else max(len(example.ids) for example in examples)
    if longest > config.max_length and config.too_long == "error":
        reason = f"{longest:,} tokens are more than data.max_length ({config.max_length:,})"
        raise BadRecordError("too long", reason)
    return record, examples


def _shorten(example: Example, config: DataConfig, stats: SplitStats) -> Example | None:
    if len(example.ids) <= config.max_length:
        return example
    short = truncate(example, config.max_length) if config.too_long == "truncate" else None
    if short is not None:
        stats.num_truncated += 1
        return short
    reason = f"{len(example.ids):,} tokens are more than data.max_length ({config.max_length:,})"
    if config.too_long == "truncate":
        reason += ", and the trained part alone does not fit"
    stats.dropped.append(bad_record(example.where, BadRecordError("too long", reason)))
    return None


def _shorten_group(examples: list[Example], config: DataConfig, stats: SplitStats) -> list[Example]:
    """Cut the prompt of a record's answers alike, or leave the record out: an answer is never cut."""
    length = group_length(examples)
    if length <= config.max_length:
        return examples
    short = truncate_group(examples, config.max_length) if config.too_long == "truncate" else None
    if short is not None:
        stats.num_truncated += len(short)
        return short
    reason = f"prompt and answers have {length:,} tokens, more than data.max_length ({config.max_length:,})"
    if config.too_long == "truncate":
        reason += ", and the answers alone do not fit"
    stats.dropped.append(bad_record(examples[0].where, BadRecordError("too long", reason)))
    return []


def _count_answer(answer: str | None, answers: dict[str, int]) -> None:
    if answer is not None and (answer in answers or len(answers) < MOST_ANSWERS):
        answers[answer] = answers.get(answer, 0) + 1


def _count(example: Example, stats: SplitStats, digest: hashlib._Hash) -> None:
    stats.num_tokens += len(example.ids)
    stats.num_trained_tokens += example.num_trained_tokens
    digest.update(len(example.ids).to_bytes(8, "little"))
    digest.update(example.ids.astype("<i4").tobytes())
    digest.update(example.weights.astype("<f4").tobytes())
    if not math.isnan(example.score):
        digest.update(struct.pack("<qd", example.shared, example.score))


class _SplitKey:
    """Checks that some record has the field that `validation_split` goes by."""

    def __init__(self, config: DataConfig, source: str) -> None:
        self._key, self._source = config.validation_split.key, source
        self._seen: set[str] = set()

    def see(self, fields: Mapping[str, str]) -> None:
        if self._key is not None and self._key not in self._seen:
            self._seen.update(fields)

    def check(self) -> None:
        if self._key is not None and self._seen and self._key not in self._seen:
            known = sorted(self._seen)
            raise ConfigError(
                f"data.validation_split.key: no record of source `{self._source}` has a field `{self._key}`",
                fix=suggest_word(self._key, known) or f"fields are {', '.join(known)}",
            )


def describe(split: Split) -> str:
    """One line on a split: examples, tokens, forms if not all are `messages`, and what was left out.

    >>> describe(Split("train", (), ()))
    'train: 0 examples, 0 tokens, 0 trained (0.0 %)'
    """
    stats = split.stats
    share = stats.num_trained_tokens / max(1, stats.num_tokens)
    text = (
        f"{split.name}: {len(split.examples):,} examples, {stats.num_tokens:,} tokens, "
        f"{stats.num_trained_tokens:,} trained ({share:.1%})".replace("%", " %")
    )
    if set(stats.forms) - {"messages"}:
        text += "; read as " + ", ".join(f"{form} ({count:,})" for form, count in stats.forms.items())
    if stats.unused_keys:
        text += f"; keys not used: {', '.join(stats.unused_keys)}"
    if stats.num_moved_thinking:
        text += f"; thinking moved out of tags in {stats.num_moved_thinking:,} records"
    if stats.num_truncated:
        text += f"; {stats.num_truncated:,} truncated"
    if stats.dropped:
        text += f"; {len(stats.dropped):,} dropped ({count_kinds(stats.dropped)})"
    if stats.bad_records:
        text += f"; {len(stats.bad_records):,} records skipped ({count_kinds(stats.bad_records)})"
    return text


def report_split(split: Split) -> None:
    """Log `describe`, and a warning for each kind of control text in its records."""
    log.info(describe(split))
    warn_of_control_text(split)


def warn_of_control_text(split: Split) -> None:
    """Log a warning for each kind of text that another template or channel would read as control."""
    for line in control_text_lines(split.stats.control_text):
        log.warning(f"data.{split.name}: {line}")


def report_left_out(split: Split, limit: int) -> None:
    """Log the place and reason of records that are left out, `limit` skipped and dropped ones at most."""
    for outcome, left_out in (("skipped", split.stats.bad_records), ("dropped", split.stats.dropped)):
        for line in named(left_out, limit):
            log.warning(f"{outcome}: {line}")
        if len(left_out) > limit:
            log.info("`finetune data stats --json` names all")
        if left_out:
            log.info(f"fix: {fix_for(left_out)}")


def check_left_out(config: DataConfig, split: SplitName, stats: SplitStats, limit: int = _RECORDS_SHOWN) -> None:
    """Refuse a split that a run must not be given, see `load_split`; `limit` bad records are named."""
    bad, num_good = stats.bad_records, stats.num_records
    num_records = num_good + len(bad) + len(stats.dropped)
    why = "\n       ".join([count_kinds(bad), *named(bad, limit)]) if bad else None
    what = f"data.{split}: {len(bad):,} of {num_records:,} records cannot be used"
    if num_good == 0:
        if num_records == 0:
            raise _empty_split(config, split)
        if why is None:
            first = stats.dropped[0]
            why = f"data.too_long={config.too_long} drops them all ({first.where}: {first.reason})"
        fix = fix_for(bad or stats.dropped)
        raise InputError(f"data.{split}: none of {num_records:,} records can be used", why=why, fix=fix)
    if bad and config.on_bad_record == "stop":
        raise InputError(what, why=why, fix=f"{fix_for(bad)}; or set data.on_bad_record=skip to leave them out")
    if len(bad) > config.max_skipped_ratio * num_records:
        raise InputError(
            f"{what}: more than data.max_skipped_ratio ({100 * config.max_skipped_ratio:g} %) allows",
            why=why,
            fix=f"{fix_for(bad)}; or raise data.max_skipped_ratio",
        )


def _empty_split(config: DataConfig, split: SplitName) -> InputError:
    """The error for a split without a record: `validation_split` assigns none to it, or all are broken."""
    given = config.validation_split
    if given.key is None or split == "test":
        why = "its sources have no readable record; data.train counts the faults, since it reads the same file"
        return InputError(f"data.{split} has no records", why=why, fix="finetune data stats names them")
    direction = "raise" if split == "validation" else "lower"
    return InputError(
        f"data.{split} has no records: `validation_split` assigns none to it",
        why=f"data.validation_split goes by `{given.key}`, share {given.share:g}",
        fix=f"{direction} data.validation_split.share, use a key with more values, or name sources in data.validation",
    )
