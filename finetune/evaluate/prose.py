"""Measures of generated prose: how varied it is, how much of it is copied, and whose voice it has."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

_WORD = re.compile(r"\w+(?:'\w+)?")
_SEED_WORDS = 4


def words(text: str) -> list[str]:
    """Words of a text, in lower case, without punctuation.

    >>> words("It's late, she said.")
    ["it's", 'late', 'she', 'said']
    """
    return _WORD.findall(text.lower().replace("’", "'"))


def distinctness(texts: Sequence[str], size: int) -> float:
    """distinct-n: different runs of `size` words among all such runs of all texts; low means repetition.

    Source: Li et al. 2016, arXiv:1510.03055. 0 where there is no run at all.
    """
    runs = [tuple(found[i : i + size]) for found in map(words, texts) for i in range(len(found) - size + 1)]
    return len(set(runs)) / len(runs) if runs else 0.0


class TrainingText:
    """Training texts, indexed so that the longest copied run of words can be found.

    Args:
        texts: what was trained on.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = [words(text) for text in texts]
        self._places: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
        for number, text in enumerate(self._texts):
            for start in range(len(text) - _SEED_WORDS + 1):
                self._places[tuple(text[start : start + _SEED_WORDS])].append((number, start))

    def longest_copy(self, text: str) -> int:
        """Length in words of the longest run that stands in a training text; runs under four words count as 0."""
        found = words(text)
        longest = start = 0
        while start + max(longest, _SEED_WORDS - 1) < len(found):  # only a longer run is of interest
            seed = tuple(found[start : start + _SEED_WORDS])
            for number, place in self._places.get(seed, ()):
                longest = max(longest, _common_length(found, start, self._texts[number], place))
            start += 1
        return longest


def _common_length(one: Sequence[str], at: int, other: Sequence[str], there: int) -> int:
    length = 0
    while at + length < len(one) and there + length < len(other) and one[at + length] == other[there + length]:
        length += 1
    return length


class AuthorClassifier:
    """Multinomial naive Bayes over words, with add-one smoothing: whose voice does a text have?

    Args:
        texts, authors: what it learns from, text by text.
    """

    def __init__(self, texts: Sequence[str], authors: Sequence[str]) -> None:
        self.authors = tuple(sorted(set(authors)))
        counts: dict[str, Counter[str]] = {author: Counter() for author in self.authors}
        for text, author in zip(texts, authors, strict=True):
            counts[author].update(words(text))
        self._vocabulary = set().union(*counts.values())
        self._log_prior = {a: math.log(authors.count(a) / len(authors)) for a in self.authors}
        self._log_probability = {
            author: {
                word: math.log((found[word] + 1) / (found.total() + len(self._vocabulary))) for word in self._vocabulary
            }
            for author, found in counts.items()
        }

    def classify(self, text: str) -> str:
        """The likeliest author; words never seen are passed over."""
        known = [word for word in words(text) if word in self._vocabulary]
        scores = {
            author: self._log_prior[author] + sum(self._log_probability[author][word] for word in known)
            for author in self.authors
        }
        return max(self.authors, key=lambda author: scores[author])
