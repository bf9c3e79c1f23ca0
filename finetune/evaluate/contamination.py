"""Test rows that were seen in training: word sequences of a test row that stand in training rows too.

A run of `WORDS` words hardly occurs twice by chance (GPT-3's report used 13). Runs that stand in more than
`COMMON_SHARE` of the training rows are the task's own wording (instructions, a list of categories): their words say
nothing about a row, nor do runs that begin or end in them. A row that is a training row's copy is found whatever its
length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from finetune.data.duplicates import normalise, text_digest, word_ngrams

WORDS = 13
COMMON_SHARE = 0.02
_FEWEST_ROWS_FOR_COMMON = 5
EDGE_SHARE = 0.5
SEEN_SHARE = 0.5
"""A row with at least this share of its runs seen counts as seen."""


@dataclass(frozen=True)
class Contamination:
    """What of the test rows stands in the training rows.

    Attributes:
        shares: for each test row the share of its own runs of WORDS words that stand in a training row; 1 for a
            training row's copy, 0 for a row without runs (too short).
        too_short: rows without a single run of their own that are no copies.
        copies: rows whose whole text stands in training as a row.
    """

    shares: tuple[float, ...]
    too_short: int
    copies: int = 0

    @property
    def seen(self) -> tuple[bool, ...]:
        """For each test row, whether it counts as seen."""
        return tuple(share >= SEEN_SHARE for share in self.shares)

    def describe(self) -> str:
        """One line."""
        touched = sum(share > 0 for share in self.shares)
        text = (
            f"{sum(self.seen)} of {len(self.shares)} test rows have half or more of their {WORDS}-word runs in the "
            f"training rows ({self.copies} are copies of one), {touched} have any"
        )
        return text + (f"; {self.too_short} are too short to tell" if self.too_short else "")


def find_contamination(train: Iterable[str], test: Sequence[str]) -> Contamination:
    """Look for test rows' word runs in training rows.

    Args:
        train, test: the rows' texts, questions and answers joined. A text that stands several times in `train` counts
            once: being repeated makes no wording the task's own.
    """
    texts = [normalise(text) for text in test]
    runs = [word_ngrams(text, WORDS).tolist() for text in texts]
    of_interest = {run for row in runs for run in row}
    rows_with: Counter[int] = Counter()
    trained: set[bytes] = set()
    for text in map(normalise, train):
        if (digest := text_digest(text)) not in trained:
            trained.add(digest)
            rows_with.update(of_interest.intersection(word_ngrams(text, WORDS).tolist()))
    limit = max(_FEWEST_ROWS_FOR_COMMON, COMMON_SHARE * len(trained))
    own = [_own_runs(row, rows_with, limit) for row in runs]
    is_copy = [text_digest(text) in trained for text in texts]
    shares = tuple(
        1.0 if copied else sum(rows_with[run] > 0 for run in row) / max(1, len(row))
        for row, copied in zip(own, is_copy, strict=True)
    )
    too_short = sum(not row and not copied for row, copied in zip(own, is_copy, strict=True))
    return Contamination(shares, too_short, sum(is_copy))


def _own_runs(runs: Sequence[int], rows_with: Counter[int], limit: float) -> set[int]:
    """The runs that are not common and share no word with the task's wording; `runs[i]` begins at word i."""
    counts = [rows_with[run] for run in runs]
    is_wording = [False] * (len(runs) + WORDS - 1)  # by word
    for start, count in enumerate(counts):
        # Instruction's last words and a row's first ones are common, too, but far less than the instruction itself.
        overlapping = counts[max(0, start - WORDS + 1) : start + WORDS]
        if count > limit and count >= EDGE_SHARE * max(overlapping):
            is_wording[start : start + WORDS] = [True] * WORDS
    return {
        run for start, run in enumerate(runs) if counts[start] <= limit and not any(is_wording[start : start + WORDS])
    }
