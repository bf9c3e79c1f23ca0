"""Whether an answer is a refusal, by how it begins."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from finetune.data.sources import Record

_UNABLE = (
    r"(?:can ?not|can't|couldn't|could not|won't|will not|"
    r"(?:am|'m) (?:unable|not able|afraid i (?:cannot|can't)|not in a position)(?: to)?)"
)
_DECLINE = r"(?:(?:must|have to|need to|will|'ll|would|should)? ?(?:respectfully |politely )?(?:decline|refuse)\b)"
_VERBS = (
    "advise|analyse|analyze|answer|assist|categorise|categorize|classify|comment|complete|comply|continue|create|"
    "decide|determine|diagnose|discuss|do|engage|evaluate|fulfil|fulfill|generate|give|help|identify|offer|perform|"
    "produce|provide|recommend|respond|satisfy|say|share|support|tell|translate|write"
)
_APOLOGY = r"(?:(?:(?:i am|i'm) )?(?:very |so |really )?sorry|i apologi[sz]e|my apologies|unfortunately|regrettably)"
_REFUSAL = re.compile(
    rf"(?:{_APOLOGY}\W+(?:but |that )?)?"
    rf"(?:as an? (?:ai|(?:large )?language model)\b"
    rf"|i ?{_UNABLE} (?:\w+ly |in good conscience )?(?:{_VERBS})\b"
    rf"|i ?{_DECLINE})"
    rf"|{_APOLOGY}(?:\W+but\b|\W*$)"  # an apology and nothing else answers nothing
)


def is_refusal(text: str) -> bool:
    """Whether an answer begins as refusals do: "I'm sorry, but", "I cannot classify", "I must decline", "As an AI".

    Only the beginning counts, and quoted speech does not: a story's people are sorry, too. A text may refuse in other
    words; the count compares two models, it is no measure of either.

    Args:
        text: of the final channel.

    >>> is_refusal("I'm sorry, but I can't help with that."), is_refusal('"I am sorry, but no," she said.')
    (True, False)
    """
    beginning = " ".join(text.replace("’", "'").casefold().split()).lstrip("*_# ")
    return _REFUSAL.match(beginning) is not None


# Measures of generated prose: how varied it is, how much of it is copied, and whose voice it has.

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

    All authors are as likely before a word is read: with the training texts' shares as prior, a text that says little
    would go to whoever wrote most of them.

    Args:
        texts, authors: what it learns from, text by text.
    """

    def __init__(self, texts: Sequence[str], authors: Sequence[str]) -> None:
        self.authors = tuple(sorted(set(authors)))
        counts: dict[str, Counter[str]] = {author: Counter() for author in self.authors}
        for text, author in zip(texts, authors, strict=True):
            counts[author].update(words(text))
        self._vocabulary = set().union(*counts.values())
        self._log_probability = {
            author: {
                word: math.log((found[word] + 1) / (found.total() + len(self._vocabulary))) for word in self._vocabulary
            }
            for author, found in counts.items()
        }

    def classify(self, text: str) -> str | None:
        """The likeliest author; words never seen are passed over, and a text without any other word has none."""
        known = [word for word in words(text) if word in self._vocabulary]
        scores = {author: sum(self._log_probability[author][word] for word in known) for author in self.authors}
        return max(self.authors, key=lambda author: scores[author]) if known else None


def prose_figures(
    texts: Mapping[str, Sequence[str]], records: Sequence[Record], train: Sequence[Record] | None
) -> dict[str, Any]:
    """Variety, copying and voice of texts.

    Args:
        texts: by who wrote them; each has one a record.
        records: the test records that they answer; a field `author` says whose voice is right.
        train: training records; None if they are not known.

    Returns:
        By who wrote them `distinct_1`, `distinct_2`, `empty` texts, `refusals`; with training records
        `longest_copy_words` and `median_copy_words`; where these have several authors `own_author`, the share of texts
        taken for their own author's, and `own_author_balanced`, the mean of that share over authors, which always
        naming the same one makes 1 / authors. Then `authors`: how many are `known`, the `largest_share` of rows that
        one of them wrote, and `unknown_rows`, which the training records have no author for and which do not count.
    """
    spoken = {record.where: record for record in train or ()}  # a record of several samples comes several times
    seen = TrainingText(text for record in spoken.values() for text in trained_texts(record))
    figures: dict[str, Any] = {}
    for who, written in texts.items():
        figures[who] = {
            "distinct_1": distinctness(written, 1),
            "distinct_2": distinctness(written, 2),
            "empty": sum(not text.strip() for text in written),
            "refusals": sum(map(is_refusal, written)),
        }
        if spoken:
            copies = [seen.longest_copy(text) for text in written]
            figures[who] |= {"longest_copy_words": max(copies), "median_copy_words": median(copies)}
    signed = [record for record in spoken.values() if "author" in record.fields]
    classifier = AuthorClassifier(
        ["\n".join(trained_texts(record, thinking=False)) for record in signed],
        [record.fields["author"] for record in signed],
    )
    own = {n: record.fields.get("author", "") for n, record in enumerate(records)}
    own = {n: author for n, author in own.items() if author in classifier.authors}
    if len(classifier.authors) < 2 or not own:
        return figures
    for who, written in texts.items():
        figures[who] |= _voice(classifier, {n: written[n] for n in own}, own)
    largest = max(Counter(own.values()).values()) / len(own)
    figures["authors"] = {
        "known": len(classifier.authors),
        "largest_share": largest,
        "unknown_rows": len(records) - len(own),
    }
    return figures


def trained_texts(record: Record, *, thinking: bool = True) -> list[str]:
    """What a training record teaches to write: plain text, or all that its assistant says.

    Every turn counts, also where `data.loss` trains the last one alone: the others stand in its context.

    Args:
        record: of the training data.
        thinking: reasoning and the arguments of calls, too.
    """
    found = [record.conversation.text or ""]
    for message in record.messages:
        if message.role == "assistant":
            found.append(message.content)
            if thinking:
                found += [message.thinking or "", *(call.arguments for call in message.tool_calls)]
    return [text for text in found if text]


def _voice(classifier: AuthorClassifier, texts: Mapping[int, str], own: Mapping[int, str]) -> dict[str, float]:
    """How many texts are taken for their own author's: of all, and as a mean over authors."""
    right: dict[str, list[bool]] = defaultdict(list)
    for row, author in own.items():
        right[author].append(classifier.classify(texts[row]) == author)
    return {
        "own_author": sum(map(sum, right.values())) / len(own),
        "own_author_balanced": sum(sum(found) / len(found) for found in right.values()) / len(right),
    }
