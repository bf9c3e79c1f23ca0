"""Lay out the answers of preference records: a prompt once, its answers side by side behind it.

A record's answers are consecutive examples that share their first tokens, the prompt. In a packed sequence the prompt
is one segment and each answer another that continues it: an answer's tokens attend to the prompt and to their own
answer, with the positions they would have in a sequence of their own. Computed once instead of per answer, the prompt's
tokens cost nothing extra, and the results are those of separate sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from finetune.data.batches import LENGTH_MULTIPLE, PADDING_SEGMENT, Answer, Batch, collate
from finetune.data.harmony.render import Example
from finetune.data.harmony.tokenizer import PAD_ID
from finetune.data.harmony.truncate import group_length

Pair = tuple[int, int]
"""Numbers of two answers, the better one first."""


def pairs_of(scores: Sequence[float], how: str) -> list[Pair]:
    """The pairs that an objective learns from.

    Args:
        scores: of a record's answers.
        how: `data.pairs`: `best_worst`, or `all` whose scores differ.

    Raises:
        ValueError: `listwise`, which is no set of pairs.
    """
    match how:
        case "best_worst":
            best, worst = int(np.argmax(scores)), int(np.argmin(scores))
            return [(best, worst)] if scores[best] > scores[worst] else []
        case "all":
            numbers = range(len(scores))
            return [(one, other) for one in numbers for other in numbers if scores[one] > scores[other]]
        case _:
            raise ValueError(f"data.pairs={how} makes no pairs")


@dataclass(frozen=True)
class Groups:
    """The answers that are compared with one another, record by record.

    Attributes:
        members: of each group, the numbers of its examples; answers in no pair are left out.
        pairs: of each group, its pairs, as places in `members`.
    """

    members: tuple[tuple[int, ...], ...]
    pairs: tuple[tuple[Pair, ...], ...]

    @classmethod
    def of(cls, examples: Sequence[Example], first_examples: Sequence[int], how: str) -> Groups:
        """Group the examples of each record, and choose the pairs.

        Args:
            examples: of the whole split.
            first_examples: the number of each record's first example.
            how: `data.pairs`.
        """
        members, pairs = [], []
        for start, end in zip(first_examples, [*first_examples[1:], len(examples)], strict=True):
            found = pairs_of([examples[number].score for number in range(start, end)], how)
            used = sorted({place for pair in found for place in pair})
            if used:
                members.append(tuple(start + place for place in used))
                pairs.append(tuple((used.index(better), used.index(worse)) for better, worse in found))
        return cls(tuple(members), tuple(pairs))

    def lengths(self, examples: Sequence[Example], *, share_prompts: bool) -> list[int]:
        """Tokens of each group in a packed sequence."""
        found = []
        for numbers in self.members:
            answers = [examples[number] for number in numbers]
            found.append(group_length(answers) if share_prompts else sum(len(answer.ids) for answer in answers))
        return found


def collate_groups(
    sequences: Sequence[Sequence[tuple[Sequence[Example], Sequence[Pair]]]],
    *,
    share_prompts: bool = True,
    pad_id: int = PAD_ID,
) -> Batch:
    """Lay out the answers of several records per sequence.

    Args:
        sequences: of each sequence its records: their answers, and the pairs of these.
        share_prompts: a record's prompt once. False: each answer behind a copy of it, as others train.
        pad_id: token id of the padding.

    Raises:
        ValueError: an answer without a prompt or without tokens.
    """
    if any(not 0 < answer.shared < len(answer.ids) for each in sequences for answers, _ in each for answer in answers):
        raise ValueError("an answer needs a prompt and at least one token")
    if share_prompts:
        return _collate_shared(sequences, pad_id)
    flat = [[answer for answers, _ in sequence for answer in answers] for sequence in sequences]
    spans = []
    for sequence in sequences:
        start, found = 0, []
        for record, (answers, pairs) in enumerate(sequence):
            for number, answer in enumerate(answers):
                first = start + answer.shared
                found.append(Answer(record, first - 1, first, start + len(answer.ids), _better_than(number, pairs)))
                start += len(answer.ids)
        spans.append(tuple(found))
    return collate(flat, pad_id).with_answers(tuple(spans))


def _better_than(number: int, pairs: Sequence[Pair]) -> tuple[int, ...]:
    return tuple(worse for better, worse in pairs if better == number)


def _collate_shared(sequences: Sequence[Sequence[tuple[Sequence[Example], Sequence[Pair]]]], pad_id: int) -> Batch:
    longest = max(sum(group_length(answers) for answers, _ in sequence) for sequence in sequences)
    shape = (len(sequences), math.ceil(longest / LENGTH_MULTIPLE) * LENGTH_MULTIPLE)
    input_ids, weights = np.full(shape, pad_id, dtype=np.int64), np.zeros(shape, dtype=np.float32)
    positions = np.zeros(shape, dtype=np.int64)
    segments, prefixes = (np.full(shape, PADDING_SEGMENT, dtype=np.int64) for _ in range(2))
    spans = []
    for row, sequence in enumerate(sequences):
        start = segment = 0
        found: list[Answer] = []
        for record, (answers, pairs) in enumerate(sequence):
            shared, prompt = answers[0].shared, segment
            parts = [(answers[0].ids[:shared], np.zeros(shared, dtype=np.float32), 0)]
            parts += [(answer.ids[shared:], answer.weights[shared:], shared) for answer in answers]
            before = start + shared - 1
            for number, (tokens, of_part, first) in enumerate(parts):
                place, stop = (row, slice(start, start + len(tokens))), start + len(tokens)
                input_ids[place], weights[place] = tokens, of_part
                positions[place] = np.arange(first, first + len(tokens))
                segments[place], prefixes[place] = segment, prompt
                if number:
                    found.append(Answer(record, before, start, stop, _better_than(number - 1, pairs)))
                segment, start = segment + 1, stop
        positions[row, start:] = np.arange(shape[1] - start)
        spans.append(tuple(found))
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(weights),
        torch.from_numpy(positions),
        torch.from_numpy(segments),
        tuple(tuple(answer.id for answers, _ in sequence for answer in answers) for sequence in sequences),
        prefixes=torch.from_numpy(prefixes),
        answers=tuple(spans),
    )


@dataclass(frozen=True, eq=False)
class AnswerTokens:
    """The trained tokens of a batch's answers, as indices into its flattened sequences.

    Shape legend: N trained tokens, A answers, P pairs.

    Attributes:
        before: int64 [N], the position whose hidden state predicts the token: of an answer's first, the prompt's last.
        targets: int64 [N], the tokens.
        answer: int64 [N], number of the answer.
        is_last: bool [N], whether the token is the last of its answer, an end token.
        better, worse: int64 [P], numbers of the answers of each pair.
        num_answers: A.
    """

    before: torch.Tensor
    targets: torch.Tensor
    answer: torch.Tensor
    is_last: torch.Tensor
    better: torch.Tensor
    worse: torch.Tensor
    num_answers: int


def answer_tokens(batch: Batch) -> AnswerTokens:
    """Find the trained tokens of a batch's answers, and its pairs."""
    length = batch.input_ids.shape[1]
    before, places, numbers, is_last = [], [], [], []
    better, worse = [], []
    count = 0
    for row, answers in enumerate(batch.answers or ()):
        first_of_record: dict[int, int] = {}
        for answer in answers:
            first = first_of_record.setdefault(answer.record, count)
            trained = batch.weights[row, answer.start : answer.stop].nonzero()[:, 0]
            place = trained + answer.start
            before.append(torch.where(trained == 0, answer.before, place - 1) + row * length)
            places.append(place + row * length)
            numbers.append(torch.full_like(place, count))
            is_last.append(place == answer.stop - 1)
            better += [count] * len(answer.better_than)
            worse += [first + other for other in answer.better_than]
            count += 1
    empty = [torch.zeros(0, dtype=torch.int64)]
    where = torch.cat(places or empty)
    return AnswerTokens(
        torch.cat(before or empty),
        batch.input_ids.flatten()[where],
        torch.cat(numbers or empty),
        torch.cat(is_last).bool() if is_last else torch.zeros(0, dtype=torch.bool),
        torch.tensor(better, dtype=torch.int64),
        torch.tensor(worse, dtype=torch.int64),
        count,
    )
