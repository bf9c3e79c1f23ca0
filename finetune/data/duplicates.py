"""Find records that repeat each other, within a split and across splits: a test record that is also trained.

Exact: the same normalised text, by hash. Near: a Jaccard similarity of at least `NEAR` between sets of `WORDS`-word
n-grams, found by MinHash (Broder, 1997) with banding and then computed exactly. N-grams that occur in more than
`COMMON_SHARE` of all records, such as a fixed instruction, identify no record and are ignored.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from finetune.data.conversation import Conversation

WORDS = 5
NEAR = 0.8
COMMON_SHARE = 0.05
_FEWEST_RECORDS_FOR_COMMON = 40
_BANDS, _HASHES_PER_BAND = 25, 5  # a pair at 0.8 is missed with probability 5e-5, one at 0.4 is compared with 0.23
_MOST_COMPARED = 64
"""Of many records that agree in a band (a form letter, say), each is compared with this many before it."""
_BUCKETS = 2**22
_PAIRS_SHOWN = 5
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Text:
    """The text of a record.

    Attributes:
        where: its `file:line`.
        question: all text except instructions and the assistant's, normalised.
        answer: the assistant's text, normalised.
    """

    where: str
    question: str
    answer: str


@dataclass
class Overlap:
    """Records of one split that occur in another split too, or earlier in the same one.

    Attributes:
        num_records: records of the first split that were compared.
        exact: question and answer are the same.
        other_answer: the question is the same, the answer is not.
        near: similar, and neither of the above.
        examples: (kind, place, other place) of a few pairs.
    """

    num_records: int = 0
    exact: int = 0
    other_answer: int = 0
    near: int = 0
    examples: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, kind: str, where: str, other: str) -> None:
        """Count a record and keep the first few pairs of each kind."""
        setattr(self, kind, getattr(self, kind) + 1)
        if sum(example[0] == kind for example in self.examples) < _PAIRS_SHOWN:
            self.examples.append((kind, where, other))


def text_of(where: str, conversation: Conversation) -> Text:
    """Normalise the text of a conversation, without its instructions; plain text is all question."""
    question, answer = [conversation.text or ""], [""]
    for message in conversation.messages:
        if message.role not in ("system", "developer"):
            texts = [message.content, *(call.arguments for call in message.tool_calls)]
            (answer if message.role == "assistant" else question).extend(texts)
    return Text(where, normalise(" ".join(question)), normalise(" ".join(answer)))


def normalise(text: str) -> str:
    """Fold differences that a reader does not see: Unicode forms, case and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_digest(text: str) -> bytes:
    """16 bytes that identify a text."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def word_ngrams(text: str, width: int) -> NDArray[np.uint64]:
    """Hash every `width` consecutive words of a normalised text.

    Args:
        text: as `normalise` gives it.
        width: words per n-gram.

    Returns:
        uint64 [n], in the order of the text; empty if it has fewer words.
    """
    words = np.array(
        [zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in _WORD.findall(text)], dtype=np.uint64
    )
    hashes = np.zeros(max(0, len(words) - width + 1), dtype=np.uint64)
    for place in range(width):
        hashes = _mixed(hashes ^ words[place : place + len(hashes)])
    return hashes


def shingle_hashes(text: str) -> NDArray[np.uint64]:
    """The set of a normalised text's n-grams of `WORDS` words, or of all its words if they are fewer.

    Returns:
        uint64 [n], sorted; empty for a text without words.
    """
    num_words = sum(1 for _ in zip(range(WORDS), _WORD.finditer(text), strict=False))
    return np.unique(word_ngrams(text, num_words)) if num_words else np.zeros(0, dtype=np.uint64)


def find_duplicates(splits: Mapping[str, Sequence[Text]]) -> dict[str, Overlap]:
    """Compare every split with itself, and every later split with the earlier ones.

    Args:
        splits: the records of each, in the order train, validation, test.

    Returns:
        By name: `train` for repeats within train (each but the first counts), `test in train` for records of test that
        are in train too, and so on.
    """
    texts = [text for split in splits.values() for text in split]
    shingles = [shingle_hashes(f"{text.question} {text.answer}") for text in texts]
    common = _common(shingles)
    shingles = [np.setdiff1d(found, common, assume_unique=True) for found in shingles]
    ends = np.cumsum([0, *map(len, splits.values())]).tolist()
    ranges = {name: range(start, end) for name, start, end in zip(splits, ends, ends[1:], strict=False)}
    alike = _candidates(shingles)
    overlaps: dict[str, Overlap] = {}
    for name, records in ranges.items():
        for earlier, others in ranges.items():
            if earlier == name:
                overlaps[name] = _compare(texts, shingles, records, records, alike)
                break
            overlaps[f"{name} in {earlier}"] = _compare(texts, shingles, records, others, alike)
    return overlaps


def minhash(shingles: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The smallest of the shingles under each of `_BANDS * _HASHES_PER_BAND` hash functions, uint64 [125]."""
    return _mixed(shingles[None, :] ^ _SALTS[:, None]).min(1)


def jaccard(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> float:
    """Size of the intersection over size of the union of two sorted sets."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / max(1, len(one) + len(other) - shared)


def _compare(
    texts: Sequence[Text],
    shingles: Sequence[NDArray[np.uint64]],
    records: range,
    others: range,
    alike: Mapping[int, Sequence[int]],
) -> Overlap:
    """Look for each of `records` among `others`; where both are the same range, among those before it."""
    overlap = Overlap(num_records=len(records))
    exact: dict[bytes, int] = {}
    question: dict[bytes, int] = {}

    def remember(record: int) -> None:
        exact.setdefault(text_digest(f"{texts[record].question}\0{texts[record].answer}"), record)
        question.setdefault(text_digest(texts[record].question), record)

    if records != others:
        for record in others:
            remember(record)
    for record in records:
        text = texts[record]
        same = exact.get(text_digest(f"{text.question}\0{text.answer}"))
        same_question = question.get(text_digest(text.question)) if text.question else None
        if same is not None:
            overlap.add("exact", text.where, texts[same].where)
        elif same_question is not None:
            overlap.add("other_answer", text.where, texts[same_question].where)
        else:
            near = (other for other in alike.get(record, ()) if other in others and other < record)
            found = next((other for other in near if jaccard(shingles[record], shingles[other]) >= NEAR), None)
            if found is not None:
                overlap.add("near", text.where, texts[found].where)
        if records == others:
            remember(record)
    return overlap


def _candidates(shingles: Sequence[NDArray[np.uint64]]) -> dict[int, list[int]]:
    """For each record the earlier ones that agree with it in a whole band of the MinHash."""
    records = np.array([record for record, found in enumerate(shingles) if len(found)], dtype=np.int64)
    bands = np.zeros((len(records), _BANDS), dtype=np.uint64)
    for place, record in enumerate(records):
        bands[place] = _band_keys(shingles[record])
    candidates: dict[int, list[int]] = defaultdict(list)
    for band in bands.T:
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.diff(band[order], prepend=band[order][:1] + np.uint64(1)))
        for group in np.split(records[order], starts):
            for place in range(1, len(group)):
                known = candidates[int(group[place])]
                known += [
                    other for other in group[max(0, place - _MOST_COMPARED) : place].tolist() if other not in known
                ]
    return candidates


def _band_keys(shingles: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One number for each band, uint64 [_BANDS]."""
    keys = np.zeros(_BANDS, dtype=np.uint64)
    for column in minhash(shingles).reshape(_BANDS, _HASHES_PER_BAND).T:
        keys = _mixed(keys ^ column)
    return keys


def _common(shingles: Sequence[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """Shingles that occur in more than `COMMON_SHARE` of the records; counted in buckets first."""
    if len(shingles) < _FEWEST_RECORDS_FOR_COMMON:
        return np.zeros(0, dtype=np.uint64)
    counts = np.zeros(_BUCKETS, dtype=np.int32)
    for found in shingles:
        counts[(found % np.uint64(_BUCKETS)).astype(np.int64)] += 1
    least = COMMON_SHARE * len(shingles)
    suspects = [found[counts[(found % np.uint64(_BUCKETS)).astype(np.int64)] > least] for found in shingles]
    values, times = np.unique(np.concatenate(suspects), return_counts=True)
    return values[times > least]


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: every output bit depends on every input bit (arithmetic is modulo 2^64)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


_SALTS = _mixed(np.arange(_BANDS * _HASHES_PER_BAND, dtype=np.uint64))
