"""Measures of generated text: refusals, variety, copying from the training texts, and whose voice it has."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import median

import numpy as np

from finetune.data.sources import Record
from finetune.results import AuthorFigures, ProseFigures, TextFigures

_WORD = re.compile(r"\w+(?:'\w+)?")
_SEED_WORDS = 4

# Refusals

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

    Only the beginning counts, and quoted speech does not: characters of a story are sorry, too. A text may refuse in
    other words; the count compares two models, it is no measure of either.

    Args:
        text: of the final channel.

    >>> is_refusal("I'm sorry, but I can't help with that."), is_refusal('"I am sorry, but no," she said.')
    (True, False)
    """
    beginning = " ".join(text.replace("’", "'").casefold().split()).lstrip("*_# ")
    return _REFUSAL.match(beginning) is not None


# Variety, copies and voice


def words(text: str) -> list[str]:
    """Words of a text, in lower case, without punctuation.

    >>> words("It's late, she said.")
    ["it's", 'late', 'she', 'said']
    """
    return _WORD.findall(text.lower().replace("’", "'"))


def distinctness(texts: Sequence[str], size: int) -> float:
    """distinct-n: different sequences of `size` words among all such sequences of all texts; low means repetition.

    Source: Li et al. 2016, arXiv:1510.03055. 0 where there is no sequence at all.
    """
    sequences = [tuple(found[i : i + size]) for found in map(words, texts) for i in range(len(found) - size + 1)]
    return len(set(sequences)) / len(sequences) if sequences else 0.0


class TrainingText:
    """Training texts, indexed so that the longest copied sequence of words can be found.

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
        """Words in the longest sequence that a training text contains too; below four words it counts as 0."""
        found = words(text)
        longest = start = 0
        while start + max(longest, _SEED_WORDS - 1) < len(found):  # only a longer sequence is of interest
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

    All authors are equally likely before a word is read: with the training texts' shares as prior, a text that says
    little would be attributed to whoever wrote most of them.

    Args:
        texts, authors: of the training texts, at least one.
    """

    def __init__(self, texts: Sequence[str], authors: Sequence[str]) -> None:
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.naive_bayes import MultinomialNB

        self._counter = CountVectorizer(analyzer=words)
        self._model = MultinomialNB(alpha=1, fit_prior=False).fit(self._counter.fit_transform(texts), authors)

    def classify(self, texts: Sequence[str]) -> list[str | None]:
        """The likeliest author of each text; words never seen are passed over, a text without any other has none."""
        counts = self._counter.transform(texts)
        has_words = np.asarray(counts.sum(axis=1)).ravel() > 0
        found = self._model.predict(counts)
        return [str(author) if known else None for author, known in zip(found, has_words, strict=True)]


def prose_figures(
    texts: Mapping[str, Sequence[str]], records: Sequence[Record], train: Sequence[Record] | None
) -> ProseFigures:
    """Variety, copying and voice of texts.

    Args:
        texts: by who wrote them (`base`, `adapter`, `reference`); each has one per record.
        records: the test records that they answer; a field `author` names the right voice.
        train: training records, for copies and, where they have several authors, voices; None: not known.
    """
    unique = list({record.where: record for record in train or ()}.values())  # one of several examples is repeated
    seen = TrainingText(text for record in unique for text in trained_texts(record)) if unique else None
    figures = {writer: _text_figures(written, seen) for writer, written in texts.items()}
    signed = [record for record in unique if "author" in record.fields]
    known = {record.fields["author"] for record in signed}
    own = {n: record.fields["author"] for n, record in enumerate(records) if record.fields.get("author") in known}
    voices = ["\n".join(trained_texts(record, thinking=False)) for record in signed]
    if len(known) < 2 or not own or not any(map(words, voices)):
        return _prose(figures)
    classifier = AuthorClassifier(voices, [record.fields["author"] for record in signed])
    figures = {
        writer: _with_voice(figures[writer], classifier.classify([written[n] for n in own]), list(own.values()))
        for writer, written in texts.items()
    }
    largest = max(Counter(own.values()).values()) / len(own)
    return _prose(figures, AuthorFigures(len(known), largest, len(records) - len(own)))


def _prose(figures: Mapping[str, TextFigures], authors: AuthorFigures | None = None) -> ProseFigures:
    return ProseFigures(figures.get("base"), figures.get("adapter"), figures.get("reference"), authors)


def _text_figures(texts: Sequence[str], seen: TrainingText | None) -> TextFigures:
    figures = TextFigures(
        distinctness(texts, 1),
        distinctness(texts, 2),
        sum(not text.strip() for text in texts),
        sum(map(is_refusal, texts)),
    )
    if seen is None:
        return figures
    copies = [seen.longest_copy(text) for text in texts]
    return replace(figures, longest_copy_words=max(copies), median_copy_words=median(copies))


def _with_voice(figures: TextFigures, found: Sequence[str | None], own: Sequence[str]) -> TextFigures:
    """Add the share of texts attributed to their own author: of all, and as a mean over authors."""
    right: dict[str, list[bool]] = defaultdict(list)
    for author, attributed in zip(own, found, strict=True):
        right[author].append(attributed == author)
    shares = [sum(each) / len(each) for each in right.values()]
    return replace(
        figures,
        own_author=sum(map(sum, right.values())) / len(own),
        own_author_balanced=sum(shares) / len(shares),
    )


def trained_texts(record: Record, *, thinking: bool = True) -> list[str]:
    """Texts that a training record teaches: plain text, or everything its assistant says.

    Every turn counts, also where `data.loss` trains the last one alone: the others are its context.

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
