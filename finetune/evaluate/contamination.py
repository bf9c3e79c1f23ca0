"""Contamination: test records seen in training, found by word n-grams that training records contain too.

An n-gram of `WORDS` words hardly occurs twice by chance (the GPT-3 report used 13). N-grams in over `COMMON_SHARE` of
the training records are the task's own wording (instructions, a list of categories): their words carry no information
about a record, nor do n-grams that overlap them. A copy of a training record is found whatever its length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from finetune.data.duplicates import normalise, text_digest, word_ngrams

WORDS = 13
COMMON_SHARE = 0.02
_FEWEST_COMMON = 5
EDGE_SHARE = 0.5
SEEN_SHARE = 0.5
"""A record with at least this share of its n-grams seen counts as seen."""


@dataclass(frozen=True)
class Contamination:
    """Overlap of test records with training records.

    Attributes:
        shares: for each test record the share of its own n-grams of WORDS words that a training record contains; 1
            for a copy of a training record, 0 for a record without n-grams (too short).
        too_short: records without a single n-gram of their own that are no copies.
        copies: records whose whole text is a training record.
    """

    shares: tuple[float, ...]
    too_short: int
    copies: int = 0

    @property
    def seen(self) -> tuple[bool, ...]:
        """For each test record, whether it counts as seen."""
        return tuple(share >= SEEN_SHARE for share in self.shares)

    def describe(self) -> str:
        """One line."""
        touched = sum(share > 0 for share in self.shares)
        text = (
            f"{sum(self.seen)} of {len(self.shares)} test records have half or more of their {WORDS}-word runs in the "
            f"training records ({self.copies} are copies of one), {touched} have any"
        )
        return text + (f"; {self.too_short} are too short to tell" if self.too_short else "")


def find_contamination(train: Iterable[str], test: Sequence[str]) -> Contamination:
    """Look for the n-grams of test records in training records.

    Args:
        train, test: texts of the records, questions and answers joined. A text that is repeated in `train` counts once:
            repetition does not make its wording the task's own.
    """
    texts = [normalise(text) for text in test]
    ngrams = [word_ngrams(text, WORDS).tolist() for text in texts]
    of_interest = {each for of_text in ngrams for each in of_text}
    records_with: Counter[int] = Counter()
    trained: set[bytes] = set()
    for text in map(normalise, train):
        if (digest := text_digest(text)) not in trained:
            trained.add(digest)
            records_with.update(of_interest.intersection(word_ngrams(text, WORDS).tolist()))
    limit = max(_FEWEST_COMMON, COMMON_SHARE * len(trained))
    own = [_own_ngrams(of_text, records_with, limit) for of_text in ngrams]
    is_copy = [text_digest(text) in trained for text in texts]
    shares = tuple(
        1.0 if copied else sum(records_with[each] > 0 for each in of_text) / max(1, len(of_text))
        for of_text, copied in zip(own, is_copy, strict=True)
    )
    too_short = sum(not of_text and not copied for of_text, copied in zip(own, is_copy, strict=True))
    return Contamination(shares, too_short, sum(is_copy))


def _own_ngrams(ngrams: Sequence[int], records_with: Counter[int], limit: float) -> set[int]:
    """The n-grams that are not common and share no word with the task's wording; `ngrams[i]` starts at word i."""
    counts = [records_with[each] for each in ngrams]
    is_wording = [False] * (len(ngrams) + WORDS - 1)  # by word
    for start, count in enumerate(counts):
        # The instruction's last words and a record's first ones are common, too, but far less than the instruction.
        overlapping = counts[max(0, start - WORDS + 1) : start + WORDS]
        if count > limit and count >= EDGE_SHARE * max(overlapping):
            is_wording[start : start + WORDS] = [True] * WORDS
    return {
        each
        for start, each in enumerate(ngrams)
        if counts[start] <= limit and not any(is_wording[start : start + WORDS])
    }
