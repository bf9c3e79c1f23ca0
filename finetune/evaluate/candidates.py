"""Which labels a set's rows are scored against, and what is odd about its answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finetune.config.keys import suggest_word
from finetune.data.sources import Record
from finetune.evaluate.labels import MOST_LABELS

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
