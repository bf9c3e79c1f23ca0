"""Which rows are scored: the recipe's test rows, and others that show what was forgotten.

`TestSet` is what is scored before and after; a `Suite` gives it a name and the settings its prompts are rendered with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune import log
from finetune.config.locate import SHIPPED_PREFIX, matching_files, resolve_data_path
from finetune.config.schema import DataConfig, RunConfig, SourceConfig, ValidationSplitConfig
from finetune.data.conversation import Conversation
from finetune.data.dataset import Split, load_split
from finetune.data.render import Sample, render_samples
from finetune.data.sources import Record
from finetune.errors import ConfigError
from finetune.evaluate.candidates import AnswersBySource, choose_candidates
from finetune.evaluate.labels import label_set, stratified_subset

# Domain: its shipped file. A run on one of them shows what it forgot on the others.
SHIPPED = {
    "legal": "legal/cuad_clause_type.jsonl.gz",
    "medical": "medical/pubmedqa_labeled.jsonl.gz",
    "creative": "creative/fiction_continuation.jsonl.gz",
}
_PLAIN_TEXT = "plain text"


@dataclass(frozen=True)
class TestSet:
    """The rows scored before and after.

    Attributes:
        records, samples: the same rows, as read and as tokens; a record of several samples stands several times.
        labels: candidate answers, or None when labels are not scored.
        notes: what a person should know of the rows and their answers, a sentence each.
    """

    records: tuple[Record, ...]
    samples: tuple[Sample, ...]
    labels: tuple[str, ...] | None
    notes: tuple[str, ...] = ()

    @cached_property
    def record_numbers(self) -> NDArray[np.int64]:
        """int64 [n]: which record each row is of, counted from 0 as they come."""
        numbers: dict[str, int] = {}
        return np.array([numbers.setdefault(record.where, len(numbers)) for record in self.records], dtype=np.int64)

    @cached_property
    def first_rows(self) -> tuple[int, ...]:
        """The first row of each record."""
        return tuple(np.unique(self.record_numbers, return_index=True)[1].tolist())

    @property
    def labelled_rows(self) -> frozenset[int]:
        """The rows whose label is scored: one of each record, since a record has one answer."""
        return frozenset(self.first_rows if self.labels is not None else ())

    def by_record(self, values: NDArray[np.float64], rows: Sequence[int] | None = None) -> NDArray[np.float64]:
        """Sum figures of rows over each record, which are the units that chance draws.

        Args:
            values: float64 [n], or one for each of `rows`.
            rows: which rows the values are of. None: all.

        Returns:
            float64 [records].
        """
        numbers = self.record_numbers if rows is None else self.record_numbers[list(rows)]
        return np.bincount(np.unique(numbers, return_inverse=True)[1], values).astype(np.float64)


def choose_test_set(split: Split, config: RunConfig, train: AnswersBySource) -> TestSet:
    """Pick the recipe's test rows, stratified by answer; what is odd about their answers is said.

    The rows do not depend on the recipe's seed, so that seeds are compared on the same ones.

    Args:
        split: the recipe's test rows.
        config: how many, and whether labels are scored.
        train: answers in the training data; see `choose_candidates`.

    Raises:
        ConfigError: `evaluate.labels=always`, but the records do not make a label set.
    """
    wanted, labels, notes = config.evaluate.labels, None, tuple[str, ...]()
    if wanted != "never":
        found = choose_candidates(split.records, train)
        labels, notes = found.labels, found.notes
        if wanted == "always" and found.why_not:
            raise ConfigError(
                "evaluate.labels is always, but the test records do not make a label set",
                why=found.why_not,
                fix="set evaluate.labels=never, or give the records answers",
            )
    for note in notes:
        log.warning(note)
    chosen = stratified_subset(split.records, config.evaluate.test_examples)
    return _take(split.records, split.samples, chosen, labels, notes)


@dataclass(frozen=True)
class Suite:
    """Rows that are scored together.

    Attributes:
        name: `test`, or a domain of the retention suites.
        rows: what is scored.
        data: how its prompts are rendered.
    """

    name: str
    rows: TestSet
    data: DataConfig


def retention_suites(
    config: DataConfig, trained: Mapping[str, SourceConfig], rows: int, *, scores_labels: bool = True
) -> list[Suite]:
    """Rows of the shipped domains that were not trained on, and their texts as plain text.

    Args:
        config: the recipe's data; prompts are rendered as there.
        trained: the sources that were trained on.
        rows: rows of each suite; the same ones each time.
        scores_labels: whether domains with labels are scored by them too.

    Returns:
        One suite a domain, and one of plain text; a domain that is not installed is left out, and that is said.
    """
    files = {file.resolve() for source in trained.values() for file in _files(source)}
    suites = []
    for domain, name in SHIPPED.items():
        path = resolve_data_path(SHIPPED_PREFIX + name)
        if path.resolve() in files:
            continue
        if not path.is_file():
            log.warning(f"retention: {domain} is not installed; `finetune data prepare {domain}` builds it")
            continue
        source = SourceConfig(path=str(path), where={"split": "test"})
        data = replace(
            config,
            train={},
            validation={},
            validation_split=ValidationSplitConfig(),
            test={domain: source},
            max_length=max(4096, config.max_length),
        )
        split = load_split(data, "test")
        chosen = stratified_subset(split.records, rows)
        labels = label_set(split.records) if scores_labels else None
        suites.append(Suite(domain, _take(split.records, split.samples, chosen, labels), data))
    if suites:
        suites.append(_plain_text(suites, rows, config))
    return suites


def _plain_text(suites: Sequence[Suite], rows: int, config: DataConfig) -> Suite:
    """The other suites' texts without any harmony around them, taken in turn."""
    each = max(1, rows // len(suites))
    records = [
        replace(record, conversation=Conversation((), text=_text_of(record), form="text"), answer=None)
        for suite in suites
        for record in suite.rows.records[:each]
    ]
    data = replace(config, max_length=max(4096, config.max_length))
    pieces = [(record, sample) for record in records for sample in render_samples(record, data)]
    samples = tuple(sample for _, sample in pieces)
    return Suite(_PLAIN_TEXT, TestSet(tuple(record for record, _ in pieces), samples, None), data)


def _text_of(record: Record) -> str:
    return "\n\n".join(message.content for message in record.messages if message.role in ("user", "assistant"))


def _take(
    records: Sequence[Record],
    samples: Sequence[Sample],
    chosen: Sequence[int],
    labels: tuple[str, ...] | None,
    notes: tuple[str, ...] = (),
) -> TestSet:
    return TestSet(tuple(records[n] for n in chosen), tuple(samples[n] for n in chosen), labels, notes)


def _files(source: SourceConfig) -> list[Path]:
    return [] if source.path.startswith("hub://") else matching_files(source.path)
