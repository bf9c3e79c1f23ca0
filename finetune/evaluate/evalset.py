"""Evaluation sets: the recipe's test examples, and retention sets that show what training has made a model forget."""

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
from finetune.data.preferences import PREFERENCE_KEYS
from finetune.data.sources import Record
from finetune.errors import ConfigError

T = TypeVar("T")
AnswersBySource = Mapping[str, Mapping[str, int]]
"""By training source, how many records have which answer."""

MOST_LABELS = 64
SUBSET_SEED = 0
"""Fixed: every run scores the same examples whatever its seed, so that seeds differ in training alone."""
SHIPPED = {
    "legal": "legal/cuad_clause_type.jsonl.gz",
    "medical": "medical/pubmedqa_labeled.jsonl.gz",
    "creative": "creative/fiction_continuation.jsonl.gz",
}
"""Shipped file of each domain. A run on one of them shows what it has forgotten on the others."""
_PLAIN_TEXT = "plain text"
_ANSWERS_SHOWN = 5


@dataclass(frozen=True)
class EvalSet:
    """Examples that are scored together, before and after training.

    Attributes:
        name: `test`, or a domain of the retention sets.
        data: how prompts are rendered.
        records, examples: the same items, as read and as tokens; a record of several examples is repeated.
        labels: candidate answers, or None when labels are not scored.
        notes: what to know about the examples and their answers, in sentences.
    """

    name: str
    data: DataConfig
    records: tuple[Record, ...]
    examples: tuple[Example, ...]
    labels: tuple[str, ...] | None
    notes: tuple[str, ...] = ()

    @cached_property
    def record_numbers(self) -> NDArray[np.int64]:
        """int64 [n]: the record of each example, numbered from 0 in their order."""
        numbers: dict[str, int] = {}
        return np.array([numbers.setdefault(record.where, len(numbers)) for record in self.records], dtype=np.int64)

    @cached_property
    def first_examples(self) -> tuple[int, ...]:
        """The first example of each record."""
        return tuple(np.unique(self.record_numbers, return_index=True)[1].tolist())

    @cached_property
    def labelled_examples(self) -> frozenset[int]:
        """The examples whose label is scored: one of each record, since a record has one answer."""
        return frozenset(self.first_examples if self.labels is not None else ())

    @cached_property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Pairs of answers to the same prompt with different scores, as numbers of examples, the better one first."""
        of_record: dict[int, list[int]] = {}
        for number, record in enumerate(self.record_numbers.tolist()):
            of_record.setdefault(record, []).append(number)
        scores = [example.score for example in self.examples]
        return tuple(
            (one, other)
            for numbers in of_record.values()
            for one in numbers
            for other in numbers
            if scores[one] > scores[other]
        )

    def answered_examples(self, count: int) -> list[int]:
        """Up to `count` examples to generate answers for: one of each conversation, evenly spread."""
        asking = [n for n in self.first_examples if self.records[n].conversation.text is None]
        return list(evenly_spread(asking, count))

    def by_record(self, values: NDArray[np.float64], numbers: Sequence[int] | None = None) -> NDArray[np.float64]:
        """Sum values of examples over each record: records are what a sample of the world consists of.

        Args:
            values: float64 [n], or one for each of `numbers`.
            numbers: which examples the values are of. None: all.

        Returns:
            float64 [records].
        """
        records = self.record_numbers if numbers is None else self.record_numbers[list(numbers)]
        return np.bincount(np.unique(records, return_inverse=True)[1], values).astype(np.float64)


def validation_examples(split: Split, count: int | None) -> tuple[Example, ...]:
    """The examples of the validation loss, `count` evenly spread ones; of preference records the best answer alone.

    Args:
        split: the validation data.
        count: how many. None: all.
    """
    if not split.stats.forms.keys() & PREFERENCE_KEYS.keys():
        return evenly_spread(split.examples, count)
    best = [split.examples[number] for number in split.first_examples()]  # answers come best first
    return evenly_spread([example for example in best if example.score > 0] or best, count)


def evenly_spread(items: Sequence[T], count: int | None) -> tuple[T, ...]:
    """Up to `count` items, evenly spread over all and so independent of any seed; None: all."""
    if count is None or count >= len(items):
        return tuple(items)
    return tuple(items[number * len(items) // count] for number in range(count))


def label_set(records: Sequence[Record]) -> tuple[str, ...] | None:
    """The different answers of the records, sorted; None if one has no answer or there are more than MOST_LABELS."""
    answers = {record.answer for record in records}
    if None in answers or not 2 <= len(answers) <= MOST_LABELS:
        return None
    return tuple(sorted(answer for answer in answers if answer is not None))


def stratified_subset(records: Sequence[Record], count: int | None, seed: int = SUBSET_SEED) -> list[int]:
    """Numbers of `count` records with answers in proportion to all, the same for the same seed.

    Answers get their share rounded by largest remainder; within an answer the choice is random. Records without an
    answer count as one kind. None or a large count: all records.
    """
    if count is None or count >= len(records):
        return list(range(len(records)))
    rng = np.random.default_rng(seed)
    kinds: dict[str, list[int]] = {}
    for number, record in enumerate(records):
        kinds.setdefault(record.answer or "", []).append(number)
    exact = {kind: count * len(numbers) / len(records) for kind, numbers in kinds.items()}
    take = {kind: int(share) for kind, share in exact.items()}
    by_remainder = sorted(kinds, key=lambda kind: (take[kind] - exact[kind], kind))
    for kind in by_remainder[: count - sum(take.values())]:
        take[kind] += 1
    chosen = [n for kind, numbers in kinds.items() for n in rng.choice(numbers, take[kind], replace=False).tolist()]
    return sorted(chosen)


def choose_test_set(split: Split, config: RunConfig, train: AnswersBySource) -> EvalSet:
    """Choose the recipe's test examples, stratified by answer; warns of whatever is odd about the answers.

    The choice does not depend on the recipe's seed, so that seeds are compared on the same examples.

    Args:
        split: the recipe's test split.
        config: how many, and whether labels are scored.
        train: answers in the training data; see `choose_candidates`.

    Raises:
        ConfigError: `evaluate.labels=always`, but the records do not form a label set.
    """
    wanted, labels, notes = config.evaluate.labels, None, tuple[str, ...]()
    if wanted != "never":
        found = choose_candidates(split.records, train)
        labels, notes = found.labels, found.notes
        if wanted == "always" and found.why_not:
            raise ConfigError(
                "evaluate.labels is always, but the test records do not form a label set",
                why=found.why_not,
                fix="set evaluate.labels=never, or give the records answers",
            )
    for note in notes:
        log.warning(note)
    if split.stats.forms.keys() & PREFERENCE_KEYS.keys():
        chosen = _whole_groups(split, config.evaluate.test_examples)
    else:
        chosen = stratified_subset(split.records, config.evaluate.test_examples)
    return _subset("test", config.data, split, chosen, labels, notes)


def _whole_groups(split: Split, count: int | None) -> list[int]:
    """The examples of `count` preference records, chosen at random: all answers of a record or none."""
    by_record: dict[str, list[int]] = {}
    for number, example in enumerate(split.examples):
        by_record.setdefault(example.where, []).append(number)
    groups = list(by_record.values())
    if count is None or count >= len(groups):
        return list(range(len(split.examples)))
    taken = np.random.default_rng(SUBSET_SEED).choice(len(groups), count, replace=False)
    return [number for group in sorted(taken.tolist()) for number in groups[group]]


def retention_sets(
    config: DataConfig, trained: Mapping[str, SourceConfig], count: int, *, scores_labels: bool = True
) -> list[EvalSet]:
    """Examples of the shipped domains that were not trained on, and their texts as plain text.

    Args:
        config: the recipe's data; prompts are rendered accordingly.
        trained: the sources that were trained on.
        count: examples of each set, always the same ones.
        scores_labels: whether domains with labels are scored by them too.

    Returns:
        One set per domain, and one of plain text; domains that are not installed are left out with a warning.
    """
    files = {file.resolve() for source in trained.values() for file in _files(source)}
    sets = []
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
        labels = label_set(split.records) if scores_labels else None
        sets.append(_subset(domain, data, split, stratified_subset(split.records, count), labels))
    return [*sets, plain_text_set(sets, count, config)] if sets else []


def plain_text_set(sets: Sequence[EvalSet], count: int, config: DataConfig) -> EvalSet:
    """The texts of other sets without the harmony format, an equal number of each."""
    each = max(1, count // len(sets))
    records = [
        replace(record, conversation=Conversation((), text=_text_of(record), form="text"), answer=None)
        for evalset in sets
        for record in evalset.records[:each]
    ]
    data = replace(config, max_length=max(4096, config.max_length))
    pairs = [(record, example) for record in records for example in render_examples(record, data)]
    examples = tuple(example for _, example in pairs)
    return EvalSet(_PLAIN_TEXT, data, tuple(record for record, _ in pairs), examples, None)


def _text_of(record: Record) -> str:
    return "\n\n".join(message.content for message in record.messages if message.role in ("user", "assistant"))


def _subset(
    name: str,
    data: DataConfig,
    split: Split,
    chosen: Sequence[int],
    labels: tuple[str, ...] | None,
    notes: tuple[str, ...] = (),
) -> EvalSet:
    records, examples = tuple(split.records[n] for n in chosen), tuple(split.examples[n] for n in chosen)
    return EvalSet(name, data, records, examples, labels, notes)


def _files(source: SourceConfig) -> list[Path]:
    return [] if source.path.startswith("hub://") else matching_files(source.path)


# Candidate labels


@dataclass(frozen=True)
class Candidates:
    """The labels that examples are scored against.

    Attributes:
        labels: sorted, or None when labels cannot be scored.
        why_not: the reason then.
        notes: what to know about the answers, in sentences.
    """

    labels: tuple[str, ...] | None
    why_not: str | None = None
    notes: tuple[str, ...] = ()


def choose_candidates(records: Sequence[Record], train: AnswersBySource) -> Candidates:
    """Find the labels that test records are scored against: their answers and those trained beside them.

    A label that occurs in training alone is a candidate too, or the task would be easier than the one trained. Sources
    that share no answer with the test records contain another task's labels and are left out.

    Args:
        records: of the whole test split; a record of several examples may be repeated.
        train: answers by training source; empty if there is no training data.
    """
    unique = list({record.where: record for record in records}.values())
    answers = Counter(record.answer for record in unique if record.answer is not None)
    if not answers:
        return Candidates(None, "no test record has an `answer`")
    trained: Counter[str] = Counter()
    for of_source in train.values():
        if not answers.keys().isdisjoint(of_source):
            trained.update(of_source)
    notes = [*_differing(unique), *_unknown(answers, trained, any(train.values()))]
    labels = tuple(sorted({*answers, *trained}))
    why_not = _why_not(unique, answers.total(), labels)
    if why_not:
        notes.append(f"labels are not scored: {why_not}")
    return Candidates(None if why_not else labels, why_not, tuple(notes))


def _why_not(records: Sequence[Record], num_answered: int, labels: Sequence[str]) -> str | None:
    total = f"{len(records):,} test records"
    if num_answered < len(records):
        return f"{len(records) - num_answered:,} of {total} have no `answer`"
    plain = sum(record.conversation.text is not None for record in records)
    if plain:
        return f"{plain:,} of {total} are plain text, which has no prompt to answer"
    if len(labels) < 2:
        return "all records have the same answer"
    if len(labels) > MOST_LABELS:
        return f"test and training records have {len(labels):,} different answers, more than {MOST_LABELS}"
    return None


def _differing(records: Sequence[Record]) -> list[str]:
    """`answer` is scored, the last message is trained: a record where they differ contradicts itself."""
    differing = [
        record
        for record in records
        if record.answer is not None
        and record.messages
        and record.messages[-1].content.strip() != record.answer.strip()
    ]
    if not differing:
        return []
    return [
        f"{len(differing):,} of {len(records):,} test records have an `answer` that differs from their last message "
        f"(the first: {differing[0].where}); the loss is the message's, the accuracy the `answer`'s"
    ]


def _unknown(answers: Counter[str], trained: Counter[str], trains_answers: bool) -> list[str]:
    """Answers that could not be learned, above all misspelt ones."""
    if not trained:
        return ["no training record has an answer of the test records"] if trains_answers else []
    unknown = [answer for answer in answers if answer not in trained]
    if not unknown:
        return []
    named = [
        f"{answer!r} ({answers[answer]:,} records{_suggestion(answer, sorted(trained))})"
        for answer in sorted(unknown, key=lambda answer: (-answers[answer], answer))[:_ANSWERS_SHOWN]
    ]
    more = f" and {len(unknown) - _ANSWERS_SHOWN:,} more" if len(unknown) > _ANSWERS_SHOWN else ""
    count = sum(answers[answer] for answer in unknown)
    return [f"{count:,} of {answers.total():,} test answers occur in no training record: {', '.join(named)}{more}"]


def _suggestion(answer: str, known: Sequence[str]) -> str:
    other_case = next((word for word in known if word.casefold() == answer.casefold()), None)
    suggestion = f"did you mean {other_case}?" if other_case else suggest_word(answer, list(known))
    return f"; {suggestion}" if suggestion else ""
