"""Count a split's preference records: pairs, ties, lengths of the answers, and what sharing prompts saves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from finetune.data.cache import SplitStats
from finetune.data.harmony.render import Example
from finetune.data.harmony.truncate import group_length
from finetune.data.preview_pairs import groups_of
from finetune.files import JsonObject

_IDENTICAL = ("identical answers", "answers differ only in white space")


@dataclass(frozen=True)
class PairStats:
    """Counts of the answers of one split.

    Attributes:
        records: with at least one answer.
        answers: of all records.
        pairs: of answers to the same prompt with different scores.
        ties: of answers to the same prompt with the same score, which teach nothing.
        identical: records left out because two answers are the same, or but for white space.
        labels: answers without others to the same prompt, by label.
        length_margin: mean trained tokens of the better answer minus those of the other. 0 without pairs.
        shorter_wins: share of pairs whose better answer is the shorter one; equal ones count half. NaN without pairs.
        tokens_separate: tokens with every answer behind a prompt of its own.
        tokens_shared: tokens with each prompt once.
    """

    records: int
    answers: int
    pairs: int
    ties: int
    identical: int
    labels: dict[str, int]
    length_margin: float
    shorter_wins: float
    tokens_separate: int
    tokens_shared: int

    @property
    def saved(self) -> float:
        """The share of tokens that sharing prompts saves."""
        return 1 - self.tokens_shared / max(1, self.tokens_separate)

    def as_json(self) -> JsonObject:
        """As plain data."""
        document = dataclasses.asdict(self) | {"saved": round(self.saved, 4)}
        return document | {"shorter_wins": None if math.isnan(self.shorter_wins) else round(self.shorter_wins, 4)}


def pair_stats(examples: Sequence[Example], starts: Sequence[int], stats: SplitStats) -> tuple[PairStats, list[int]]:
    """Count a split's pairs.

    Args:
        examples: all examples of the split.
        starts: the first example of each record.
        stats: of the same split.

    Returns:
        The counts, and each record's tokens with its prompt once.
    """
    lengths: list[int] = []
    margins: list[int] = []
    ties = separate = answers = 0
    for start in starts:  # one record at a time: all examples of a large file may not fit into memory
        (group,) = groups_of(examples, [start])
        lengths.append(group_length(group))
        answers += len(group)
        separate += sum(len(example.ids) for example in group)
        tokens = [example.num_trained_tokens for example in group]
        for better in range(len(group)):
            for worse in range(better + 1, len(group)):
                if group[better].score == group[worse].score:
                    ties += 1
                else:
                    margins.append(tokens[better] - tokens[worse])
    found = PairStats(
        records=len(lengths),
        answers=answers,
        pairs=len(margins),
        ties=ties,
        identical=sum(bad.kind in _IDENTICAL for bad in stats.bad_records),
        labels=stats.labels,
        length_margin=round(float(np.mean(margins)), 2) if margins else 0.0,
        shorter_wins=float(np.mean((1 - np.sign(margins)) / 2)) if margins else math.nan,
        tokens_separate=separate,
        tokens_shared=sum(lengths),
    )
    return found, lengths


def pair_lines(found: PairStats) -> Iterator[str]:
    """The counts as lines of text."""
    if found.labels:
        yield f"  answers: {', '.join(f'{count:,} {label}' for label, count in found.labels.items())}"
    if found.pairs or found.ties:
        yield (
            f"  pairs: {found.pairs:,} of {found.answers:,} answers; {found.ties:,} ties; "
            f"{found.identical:,} records left out for identical answers"
        )
    if found.pairs:
        yield (
            f"  length: the better answer has {found.length_margin:+.1f} tokens on average; the shorter one is the "
            f"better in {found.shorter_wins:.1%} of the pairs"
        )
    yield (
        f"  shared prompts: {found.tokens_shared:,} tokens instead of {found.tokens_separate:,} "
        f"({found.saved:.1%} saved)"
    )
