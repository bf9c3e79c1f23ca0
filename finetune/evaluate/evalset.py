"""Which labels a set's rows are scored against, and what is odd about its answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from finetune import log
from finetune.config.paths import SHIPPED_PREFIX, matching_files, resolve_data_path
from finetune.config.schema import DataConfig, RunConfig, SourceConfig, ValidationSplitConfig
from finetune.config.suggest import suggest_word
from finetune.data.conversation import Conversation
from finetune.data.dataset import Split, load_split
from finetune.data.harmony.render import Example, render_examples
from finetune.data.sources import Record
from finetune.errors import ConfigError
from finetune.evaluate.labels import MOST_LABELS, label_set, stratified_subset

T = TypeVar("T")

_SHOWN = 5
AnswersBySource = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Candidates:
    """What a set's rows are scored against.

    Attributes:
        labels: sorted, or None when labels cannot be scored.
        why_not: why they cannot; None where they can.
        notes: what a person should know of the answers, a sentence each.
    """

    labels: tuple[str, ...] | None
    why_not: str | None = None
    notes: tuple[str, ...] = ()


def choose_candidates(records: Sequence[Record], train: AnswersBySource) -> Candidates:
    """Find the labels that test rows are scored against: their answers and those trained beside them.

    A label that only stands in training is a candidate too, or the task would be easier than the one learnt. Sources
    that share no answer with the test rows hold another task's labels and are left out.

    Args:
        records: of the whole test split; a record of several samples may stand several times.
        train: by training source, how many records have which answer; empty if there is no training data.
    """
    rows = list({record.where: record for record in records}.values())
    answers = Counter(record.answer for record in rows if record.answer is not None)
    if not answers:
        return Candidates(None, "no test row has an `answer`")
    trained: Counter[str] = Counter()
    for of_source in train.values():
        if not answers.keys().isdisjoint(of_source):
            trained.update(of_source)
    notes = [*_differing(rows), *_unknown(answers, trained, any(train.values()))]
    labels = tuple(sorted({*answers, *trained}))
    why_not = _why_not(rows, answers.total(), labels)
    if why_not:
        notes.append(f"labels are not scored: {why_not}")
    return Candidates(None if why_not else labels, why_not, tuple(notes))


def _why_not(rows: Sequence[Record], num_answered: int, labels: Sequence[str]) -> str | None:
    if num_answered < len(rows):
        return f"{len(rows) - num_answered:,} of {len(rows):,} test rows have no `answer`"
    plain = sum(record.conversation.text is not None for record in rows)
    if plain:
        return f"{plain:,} of {len(rows):,} test rows are plain text, which has no prompt to answer"
    if len(labels) < 2:
        return "all rows have the same answer"
    if len(labels) > MOST_LABELS:
        return f"test and training rows have {len(labels):,} different answers, more than {MOST_LABELS}"
    return None


def _differing(rows: Sequence[Record]) -> list[str]:
    """`answer` is what is scored, the last message what is trained: a row where they differ says two things."""
    differing = [
        record
        for record in rows
        if record.answer is not None
        and record.messages
        and record.messages[-1].content.strip() != record.answer.strip()
    ]
    if not differing:
        return []
    return [
        f"{len(differing):,} of {len(rows):,} test rows have an `answer` that is not what their last message says "
        f"(the first: {differing[0].where}); the loss is the message's, the accuracy the `answer`'s"
    ]


def _unknown(answers: Counter[str], trained: Counter[str], trains_answers: bool) -> list[str]:
    """Answers that could not be learnt, misspelt ones above all."""
    if not trained:
        return ["no training row has an answer of the test rows"] if trains_answers else []
    unknown = [answer for answer in answers if answer not in trained]
    if not unknown:
        return []
    named = [
        f"{answer!r} ({answers[answer]:,} rows{_suggestion(answer, sorted(trained))})"
        for answer in sorted(unknown, key=lambda answer: (-answers[answer], answer))[:_SHOWN]
    ]
    more = f" and {len(unknown) - _SHOWN:,} more" if len(unknown) > _SHOWN else ""
    count = sum(answers[answer] for answer in unknown)
    return [f"{count:,} of {answers.total():,} test answers stand in no training row: {', '.join(named)}{more}"]


def _suggestion(answer: str, known: Sequence[str]) -> str:
    spelt_otherwise = next((word for word in known if word.casefold() == answer.casefold()), None)
    suggestion = f"did you mean {spelt_otherwise}?" if spelt_otherwise else suggest_word(answer, list(known))
    return f"; {suggestion}" if suggestion else ""


# Which rows are scored: the recipe's test rows, and others that show what was forgotten.
#
# `EvalSet` is what is scored before and after; a `Suite` gives it a name and the settings its prompts are rendered
# with.

# Domain: its shipped file. A run on one of them shows what it forgot on the others.
SHIPPED = {
    "legal": "legal/cuad_clause_type.jsonl.gz",
    "medical": "medical/pubmedqa_labeled.jsonl.gz",
    "creative": "creative/fiction_continuation.jsonl.gz",
}
_PLAIN_TEXT = "plain text"


@dataclass(frozen=True)
class EvalSet:
    """The rows scored before and after.

    Attributes:
        records, samples: the same rows, as read and as tokens; a record of several samples stands several times.
        labels: candidate answers, or None when labels are not scored.
        notes: what a person should know of the rows and their answers, a sentence each.
    """

    records: tuple[Record, ...]
    samples: tuple[Example, ...]
    labels: tuple[str, ...] | None
    notes: tuple[str, ...] = ()

    @cached_property
    def record_numbers(self) -> NDArray[np.int64]:
        """int64 [n]: which record each row is of, counted from 0 as they come."""
        numbers: dict[str, int] = {}
        return np.array([numbers.setdefault(record.where, len(numbers)) for record in self.records], dtype=np.int64)

    @cached_property
    def first_examples(self) -> tuple[int, ...]:
        """The first row of each record."""
        return tuple(np.unique(self.record_numbers, return_index=True)[1].tolist())

    @property
    def labelled_examples(self) -> frozenset[int]:
        """The rows whose label is scored: one of each record, since a record has one answer."""
        return frozenset(self.first_examples if self.labels is not None else ())

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


def evenly_spread(items: Sequence[T], count: int | None) -> tuple[T, ...]:
    """Up to `count` items, evenly spread over all and so independent of any seed; None: all."""
    if count is None or count >= len(items):
        return tuple(items)
    return tuple(items[number * len(items) // count] for number in range(count))


def choose_test_set(split: Split, config: RunConfig, train: AnswersBySource) -> EvalSet:
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
    return _take(split.records, split.examples, chosen, labels, notes)


@dataclass(frozen=True)
class Suite:
    """Rows that are scored together.

    Attributes:
        name: `test`, or a domain of the retention suites.
        rows: what is scored.
        data: how its prompts are rendered.
    """

    name: str
    rows: EvalSet
    data: DataConfig


def retention_sets(
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
        suites.append(Suite(domain, _take(split.records, split.examples, chosen, labels), data))
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
    pieces = [(record, sample) for record in records for sample in render_examples(record, data)]
    samples = tuple(sample for _, sample in pieces)
    return Suite(_PLAIN_TEXT, EvalSet(tuple(record for record, _ in pieces), samples, None), data)


def _text_of(record: Record) -> str:
    return "\n\n".join(message.content for message in record.messages if message.role in ("user", "assistant"))


def _take(
    records: Sequence[Record],
    samples: Sequence[Example],
    chosen: Sequence[int],
    labels: tuple[str, ...] | None,
    notes: tuple[str, ...] = (),
) -> EvalSet:
    return EvalSet(tuple(records[n] for n in chosen), tuple(samples[n] for n in chosen), labels, notes)


def _files(source: SourceConfig) -> list[Path]:
    return [] if source.path.startswith("hub://") else matching_files(source.path)
