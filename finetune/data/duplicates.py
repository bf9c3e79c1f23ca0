"""Rows that say the same thing twice, within a split and, worse, on both sides of one: a test row that was trained on.

Exact: the same normalised text, by hash. Near: a Jaccard similarity of at least `NEAR` between sets of `WORDS` words in
a row, found by MinHash (Broder, 1997) with banding and then computed exactly. Word sequences that stand in more than
`COMMON_SHARE` of all rows, such as a fixed instruction, say nothing about a row and are left out.
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

from finetune.data.forms import Conversation

WORDS = 5
NEAR = 0.8
COMMON_SHARE = 0.05
_FEWEST_ROWS_FOR_COMMON = 40
_BANDS, _ROWS_A_BAND = 25, 5  # a pair at 0.8 is missed with a probability of 5e-5, one at 0.4 is looked at with 0.23
_MOST_COMPARED = 64
"""Of many rows that agree in a band (a form letter, say), each is compared with this many before it."""
_BUCKETS = 2**22
_PAIRS_SHOWN = 5
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Text:
    """What a record says.

    Attributes:
        where: its `file:line`.
        question: everything but instructions and the assistant's words, normalised.
        answer: the assistant's words, normalised.
    """

    where: str
    question: str
    answer: str


@dataclass
class Overlap:
    """Rows of one split that stand in another one too, or earlier in the same one.

    Attributes:
        rows: rows of the first split that were looked at.
        exact: question and answer are the same.
        other_answer: the question is the same, the answer is not.
        near: similar, and none of the above.
        examples: places of a few pairs, with what they are.
    """

    rows: int = 0
    exact: int = 0
    other_answer: int = 0
    near: int = 0
    examples: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, kind: str, where: str, other: str) -> None:
        """Count a row and keep the first few pairs of each kind."""
        setattr(self, kind, getattr(self, kind) + 1)
        if sum(example[0] == kind for example in self.examples) < _PAIRS_SHOWN:
            self.examples.append((kind, where, other))


def text_of(where: str, conversation: Conversation) -> Text:
    """Normalise what a conversation says, without its instructions; plain text is all question."""
    question, answer = [conversation.text or ""], [""]
    for message in conversation.messages:
        if message.role not in ("system", "developer"):
            said = [message.content, *(call.arguments for call in message.tool_calls)]
            (answer if message.role == "assistant" else question).extend(said)
    return Text(where, normalise(" ".join(question)), normalise(" ".join(answer)))


def normalise(text: str) -> str:
    """Fold what makes no difference to a reader: Unicode forms, case and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def find_duplicates(splits: Mapping[str, Sequence[Text]]) -> dict[str, Overlap]:
    """Compare every split with itself and every later split with the earlier ones.

    Args:
        splits: the records of each, in the order train, validation, test.

    Returns:
        By name: `train` for repeats within train (each but the first counts), `test in train` for rows of test that are
        in train too, and so on.
    """
    texts = [text for rows in splits.values() for text in rows]
    shingles = [shingle_hashes(f"{text.question} {text.answer}") for text in texts]
    common = _common(shingles)
    shingles = [np.setdiff1d(found, common, assume_unique=True) for found in shingles]
    ends = np.cumsum([0, *map(len, splits.values())]).tolist()
    ranges = {name: range(start, end) for name, start, end in zip(splits, ends, ends[1:], strict=False)}
    alike = _candidates(shingles)
    overlaps: dict[str, Overlap] = {}
    for name, rows in ranges.items():
        for earlier, others in ranges.items():
            if earlier == name:
                overlaps[name] = _compare(texts, shingles, rows, rows, alike)
                break
            overlaps[f"{name} in {earlier}"] = _compare(texts, shingles, rows, others, alike)
    return overlaps


def shingle_hashes(text: str) -> NDArray[np.uint64]:
    """Hashes of every `WORDS` words in a row of a normalised text, sorted and once each; of all words if fewer.

    Args:
        text: as `normalise` gives it.

    Returns:
        uint64 [n]; empty for a text without words.
    """
    words = np.array(
        [zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in _WORD.findall(text)], dtype=np.uint64
    )
    if not len(words):
        return words
    width = min(WORDS, len(words))
    hashes = np.zeros(len(words) - width + 1, dtype=np.uint64)
    for place in range(width):
        hashes = _mixed(hashes ^ words[place : len(words) - width + 1 + place])
    return np.unique(hashes)


def minhash(shingles: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The smallest of the shingles under each of `_BANDS * _ROWS_A_BAND` hash functions, uint64 [125]."""
    return _mixed(shingles[None, :] ^ _SALTS[:, None]).min(1)


def jaccard(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> float:
    """Size of the intersection over size of the union of two sorted sets."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / max(1, len(one) + len(other) - shared)


def _compare(
    texts: Sequence[Text],
    shingles: Sequence[NDArray[np.uint64]],
    rows: range,
    others: range,
    alike: Mapping[int, Sequence[int]],
) -> Overlap:
    """Look for each of `rows` among `others`; where both are the same range, among those before it."""
    overlap = Overlap(rows=len(rows))
    exact: dict[bytes, int] = {}
    question: dict[bytes, int] = {}

    def remember(row: int) -> None:
        exact.setdefault(_digest(f"{texts[row].question}\0{texts[row].answer}"), row)
        question.setdefault(_digest(texts[row].question), row)

    if rows != others:
        for row in others:
            remember(row)
    for row in rows:
        text = texts[row]
        same = exact.get(_digest(f"{text.question}\0{text.answer}"))
        asked = question.get(_digest(text.question)) if text.question else None
        if same is not None:
            overlap.add("exact", text.where, texts[same].where)
        elif asked is not None:
            overlap.add("other_answer", text.where, texts[asked].where)
        else:
            near = (other for other in alike.get(row, ()) if other in others and other < row)
            found = next((other for other in near if jaccard(shingles[row], shingles[other]) >= NEAR), None)
            if found is not None:
                overlap.add("near", text.where, texts[found].where)
        if rows == others:
            remember(row)
    return overlap


def _candidates(shingles: Sequence[NDArray[np.uint64]]) -> dict[int, list[int]]:
    """For each row the earlier ones that agree with it in a whole band of the MinHash."""
    rows = np.array([row for row, found in enumerate(shingles) if len(found)], dtype=np.int64)
    bands = np.zeros((len(rows), _BANDS), dtype=np.uint64)
    for place, row in enumerate(rows):
        bands[place] = _band_keys(shingles[row])
    candidates: dict[int, list[int]] = defaultdict(list)
    for band in bands.T:
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.diff(band[order], prepend=band[order][:1] + np.uint64(1)))
        for group in np.split(rows[order], starts):
            for place in range(1, len(group)):
                known = candidates[int(group[place])]
                known += [
                    other for other in group[max(0, place - _MOST_COMPARED) : place].tolist() if other not in known
                ]
    return candidates


def _band_keys(shingles: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One number for each band, uint64 [_BANDS]."""
    keys = np.zeros(_BANDS, dtype=np.uint64)
    for column in minhash(shingles).reshape(_BANDS, _ROWS_A_BAND).T:
        keys = _mixed(keys ^ column)
    return keys


def _common(rows: Sequence[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """Shingles that stand in more than `COMMON_SHARE` of the rows; counted in buckets first."""
    if len(rows) < _FEWEST_ROWS_FOR_COMMON:
        return np.zeros(0, dtype=np.uint64)
    counts = np.zeros(_BUCKETS, dtype=np.int32)
    for found in rows:
        counts[(found % np.uint64(_BUCKETS)).astype(np.int64)] += 1
    least = COMMON_SHARE * len(rows)
    suspects = [found[counts[(found % np.uint64(_BUCKETS)).astype(np.int64)] > least] for found in rows]
    values, times = np.unique(np.concatenate(suspects), return_counts=True)
    return values[times > least]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: every output bit depends on every input bit (arithmetic is modulo 2^64)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


_SALTS = _mixed(np.arange(_BANDS * _ROWS_A_BAND, dtype=np.uint64))
