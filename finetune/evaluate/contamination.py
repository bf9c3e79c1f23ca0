"""Test rows that were seen in training: word sequences of a test row that stand in training rows too.

A run of `WORDS` words hardly occurs twice by chance (GPT-3's report used 13). Runs that stand in more than
`COMMON_SHARE` of the training rows are the task's own wording (instructions, a list of categories) and say nothing
about a row.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WORDS = 13
COMMON_SHARE = 0.02
_FEWEST_ROWS_FOR_COMMON = 5
SEEN_SHARE = 0.5
"""A row with at least this share of its runs seen counts as seen."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Contamination:
    """What of the test rows stands in the training rows.

    Attributes:
        shares: for each test row the share of its runs of WORDS words that stand in a training row; 0 for a row that
            has none (too short).
        too_short: rows without a single run.
    """

    shares: tuple[float, ...]
    too_short: int

    @property
    def seen(self) -> tuple[bool, ...]:
        """For each test row, whether it counts as seen."""
        return tuple(share >= SEEN_SHARE for share in self.shares)

    def describe(self) -> str:
        """One line."""
        touched = sum(share > 0 for share in self.shares)
        text = (
            f"{sum(self.seen)} of {len(self.shares)} test rows have half or more of their {WORDS}-word runs in the "
            f"training rows, {touched} have any"
        )
        return text + (f"; {self.too_short} are too short to tell" if self.too_short else "")


def find_contamination(train: Iterable[str], test: Sequence[str]) -> Contamination:
    """Look for test rows' word runs in training rows.

    Args:
        train, test: the rows' texts, questions and answers joined.
    """
    wanted: list[set[int]] = [set(_runs(text)) for text in test]
    of_interest = set().union(*wanted) if wanted else set()
    rows_with: Counter[int] = Counter()
    num_train = 0
    for text in train:
        num_train += 1
        rows_with.update(of_interest.intersection(_runs(text)))
    limit = max(_FEWEST_ROWS_FOR_COMMON, COMMON_SHARE * num_train)
    common = {run for run, rows in rows_with.items() if rows > limit}
    own = [runs - common for runs in wanted]
    shares = tuple(sum(run in rows_with for run in runs) / len(runs) if runs else 0.0 for runs in own)
    return Contamination(shares, sum(not runs for runs in own))


def _runs(text: str) -> Iterable[int]:
    words = _WORD.findall(text.lower())
    return (hash(tuple(words[start : start + WORDS])) for start in range(len(words) - WORDS + 1))
