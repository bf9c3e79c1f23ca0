"""One pass over a split's sources: read, check, render, cut, and write tokens; what is left out is counted."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from finetune import log
from finetune.config.schema import DataConfig, SourceConfig
from finetune.config.suggest import suggest_word
from finetune.data.example_table import TableWriter
from finetune.data.forms import unused_keys
from finetune.data.harmony.render import Example, render_examples
from finetune.data.harmony.tokenizer import LONGEST_TOKEN_BYTES
from finetune.data.harmony.truncate import truncate
from finetune.data.message import BadRecordError
from finetune.data.sources import (
    BadRecord,
    RawRecord,
    SplitName,
    bad_record,
    belongs_to,
    counts_broken_records,
    parse_record,
    read_raw_records,
    sources_of,
)
from finetune.errors import ConfigError

ANSWERS_KEPT = 1000
"""Different answers counted of a source: far more than make a label set, far fewer than a large source may have."""


@dataclass
class Facts:
    """What a pass found.

    Attributes:
        source_sizes: samples of each source, in order; a source's samples stand together.
        forms: how many records came in which form.
        unused: key that nothing is read from -> how many of these records have it.
        num_records: records that gave at least one sample.
        num_tokens, num_trained_tokens: of all samples.
        num_truncated: samples that lost context.
        bad_records: rows that cannot be used.
        dropped: rows left out because the recipe says so, such as too long ones.
        answers: by source, how many records have which `answer`; only the first `ANSWERS_KEPT` different ones.
        fingerprint: sha256 over the samples' token ids and weights, in order.
    """

    source_sizes: dict[str, int] = field(default_factory=dict)
    forms: dict[str, int] = field(default_factory=dict)
    unused: dict[str, int] = field(default_factory=dict)
    num_records: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    num_truncated: int = 0
    bad_records: list[BadRecord] = field(default_factory=list)
    dropped: list[BadRecord] = field(default_factory=list)
    answers: dict[str, dict[str, int]] = field(default_factory=dict)
    fingerprint: str = ""


def build(config: DataConfig, split: SplitName, writer: TableWriter) -> Facts:
    """Read a split's sources to their end and write every sample.

    Args:
        config: sources, rendering and length.
        split: which of the recipe's splits.
        writer: where samples go.

    Raises:
        ConfigError: see `read_raw_records`; or no training record has the field of `validation_split.key`.
        InputError: see `read_raw_records`.
    """
    facts, digest = Facts(), hashlib.sha256()
    with log.Progress(f"tokenising {split}", None, "rows") as progress:
        for name, source in sources_of(config, split).items():
            keys, counts_broken = _SplitKeys(config, name), counts_broken_records(config, split, name)
            facts.source_sizes[name] = 0
            answers = facts.answers.setdefault(name, {})
            for row in read_raw_records(name, source):
                progress.advance()
                if isinstance(row, BadRecord):
                    if counts_broken:
                        facts.bad_records.append(row)
                    continue
                keys.see(row.fields)
                if not belongs_to(row.fields, config, split):
                    continue
                samples = _samples(row, source, config, facts)
                if not samples:
                    continue
                writer.add(row, source.form, samples)
                facts.num_records += 1
                _count_answer(row.fields.get("answer"), answers)
                facts.source_sizes[name] += len(samples)
                for sample in samples:
                    _count(sample, facts, digest)
            if split != "test":  # test rows are not split, and need no such field
                keys.check()
    facts.fingerprint = digest.hexdigest()
    return facts


def _samples(row: RawRecord, source: SourceConfig, config: DataConfig, facts: Facts) -> Sequence[Example]:
    """The samples of a row that are to be trained on; what is left out is counted."""
    try:
        record = parse_record(row, source.form)
        # Encoding takes quadratic time in a long word (3 s for 100,000 letters), so what can never fit is not encoded.
        num_characters = record.conversation.num_characters
        if record.conversation.text is None and num_characters > LONGEST_TOKEN_BYTES * config.max_length:
            reason = f"{num_characters:,} characters cannot fit data.max_length ({config.max_length:,} tokens)"
            raise BadRecordError("too long", reason)
        trained = [sample for sample in render_examples(record, config) if sample.num_trained_tokens]
        if not trained:
            raise BadRecordError("nothing to train", "no token of it would be trained")
        longest = max(len(sample.ids) for sample in trained)
        if longest > config.max_length and config.too_long == "error":
            reason = f"{longest:,} tokens are more than data.max_length ({config.max_length:,})"
            raise BadRecordError("too long", reason)
    except BadRecordError as error:
        left_out = facts.dropped if error.kind == "too long" and config.too_long != "error" else facts.bad_records
        left_out.append(bad_record(row.where, error))
        return ()
    kept = [short for sample in trained if (short := _shortened(sample, config, facts)) is not None]
    if kept:
        form = record.conversation.form
        facts.forms[form] = facts.forms.get(form, 0) + 1
        for key in unused_keys(row.raw, form):
            if key not in source.where and key != config.validation_split.key:
                facts.unused[key] = facts.unused.get(key, 0) + 1
    return kept


def _shortened(sample: Example, config: DataConfig, facts: Facts) -> Example | None:
    if len(sample.ids) <= config.max_length:
        return sample
    short = truncate(sample, config.max_length) if config.too_long == "truncate" else None
    if short is not None:
        facts.num_truncated += 1
        return short
    reason = f"{len(sample.ids):,} tokens are more than data.max_length ({config.max_length:,})"
    if config.too_long == "truncate":
        reason += ", and what is trained alone does not fit"
    facts.dropped.append(bad_record(sample.where, BadRecordError("too long", reason)))
    return None


def _count_answer(answer: str | None, answers: dict[str, int]) -> None:
    if answer is not None and (answer in answers or len(answers) < ANSWERS_KEPT):
        answers[answer] = answers.get(answer, 0) + 1


def _count(sample: Example, facts: Facts, digest: hashlib._Hash) -> None:
    facts.num_tokens += len(sample.ids)
    facts.num_trained_tokens += sample.num_trained_tokens
    digest.update(len(sample.ids).to_bytes(8, "little"))
    digest.update(sample.ids.astype("<i4").tobytes())
    digest.update(sample.weights.astype("<f4").tobytes())


class _SplitKeys:
    """Sees whether the field that `validation_split` goes by is there at all."""

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
