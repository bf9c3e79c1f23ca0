"""Pretraining corpus of the tiny base: the shipped training texts without labels, and conversations made from them.

Only `split: train` is read, of legal records the clause alone, of medical records abstract, question and conclusion, of
creative records the passage and what follows it. A text that also occurs in a validation or test record is left out.

Beside plain documents there are conversations in harmony form whose answers come from the text itself, so that the
position that answers learns to look for what the user's text is about:

* keywords: which words are most characteristic of this text? (the highest tf-idf, drawn anew each epoch)
* missing: the same with these words taken out of the text, so that they have to be inferred
* options: which one of eight words, each a keyword of some text, belongs to this text?
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.config.paths import shipped_dir
from finetune.config.schema import DataConfig, LossConfig
from finetune.data.forms import parse_conversation
from finetune.data.harmony.render import Example, render_example
from finetune.data.sources import Record

FILES = {
    "legal": "legal/cuad_clause_type.jsonl.gz",
    "medical": "medical/pubmedqa_labeled.jsonl.gz",
    "creative": "creative/fiction_continuation.jsonl.gz",
}
PIECE_CHARACTERS = 700  # of a text that conversations are about: some 150 tokens
KEYWORDS_PER_PIECE = 8
MOST_ANSWERED = 4
NUM_OPTIONS = 8
ANSWER_WEIGHT = 3.0  # of an answer's tokens, a few of each row among a thousand of documents; those weigh 1
LEAST_PIECES = 5  # that a word must stand in to be asked for
_WORD = re.compile(r"\b[A-Za-z][a-z]{3,}\b")
_SENTENCE_END = re.compile(r"(?<=[.;!?])\s+")
_INSTRUCTIONS = {
    "keywords": "Name the words that say most about the text, and nothing else.",
    "missing": "Some words were taken out of the text. Name them, and nothing else.",
    "options": "Answer with the one option that belongs to the text, and nothing else.",
}
KINDS = ("keywords", "missing", "options")
_SHARES = (0.4, 0.4, 0.2)


@dataclass(frozen=True)
class Text:
    """A text without its label: `domain`, the record's `id`, and its text."""

    domain: str
    id: str
    text: str


def read_texts(splits: Sequence[str] = ("train",)) -> list[Text]:
    """Texts of the shipped records of these splits, in file order, without training texts that are also held out."""
    texts, held_out = [], set()
    for domain, name in FILES.items():
        with gzip.open(shipped_dir("data") / name, "rt", encoding="utf-8") as file:
            for row in map(json.loads, file):
                text = text_of(domain, row)
                if row["split"] in splits:
                    texts.append(Text(domain, row["id"], text))
                if row["split"] != "train":
                    held_out.add(fingerprint(text))
    return [text for text in texts if "train" not in splits or fingerprint(text.text) not in held_out]


def text_of(domain: str, row: dict[str, Any]) -> str:
    """The text of a record: never its answer where the answer is a label."""
    user = next(message["content"] for message in row["messages"] if message["role"] == "user")
    final = row["messages"][-1]
    if domain == "legal":
        return str(user.partition("Clause:\n")[2])
    if domain == "medical":
        return f"{user}\n\nCONCLUSION: {final['thinking']}"
    return f"{user.partition(chr(10) * 2)[2]}\n{final['content']}"


def fingerprint(text: str) -> str:
    """sha256 of a text whose case and spacing do not matter."""
    return hashlib.sha256(" ".join(text.lower().split()).encode()).hexdigest()


def pieces(texts: Sequence[Text]) -> list[Text]:
    """Texts cut at sentence ends into pieces of about `PIECE_CHARACTERS`, so that each has a subject."""
    found = []
    for text in texts:
        parts = [""]
        for sentence in _SENTENCE_END.split(text.text):
            if len(parts[-1]) + len(sentence) > PIECE_CHARACTERS and parts[-1]:
                parts.append("")
            parts[-1] += (" " if parts[-1] else "") + sentence
        found += [Text(text.domain, f"{text.id}/{number}", part) for number, part in enumerate(parts)]
    return found


class Conversations:
    """Makes conversations about pieces.

    Args:
        texts: whose pieces and word frequencies are used.
        frequencies_of: other texts to take word frequencies from (those of training, for held-out texts).
    """

    def __init__(self, texts: Sequence[Text], frequencies_of: Conversations | None = None) -> None:
        self.pieces = pieces(texts)
        words = [_words(piece.text) for piece in self.pieces]
        self.num_pieces = frequencies_of.num_pieces if frequencies_of else len(self.pieces)
        self.found_in = frequencies_of.found_in if frequencies_of else Counter(w for each in words for w in set(each))
        self.keywords = [self._keywords(each) for each in words]
        self.all_keywords = sorted({word for each in self.keywords for word in each})
        loss = LossConfig(final=ANSWER_WEIGHT)
        self.config = DataConfig(train={}, reasoning_effort="low", loss=loss)

    def _keywords(self, words: list[str]) -> list[str]:
        counts = Counter(word for word in words if self.found_in[word] >= LEAST_PIECES)
        value = {w: count * math.log(self.num_pieces / self.found_in[w]) for w, count in counts.items()}
        return sorted(value, key=lambda word: (-value[word], word))[:KEYWORDS_PER_PIECE]

    def samples(self, rng: np.random.Generator, kind: str | None = None) -> Iterator[Example]:
        """One conversation about each piece that has keywords, of a random kind unless one is given."""
        for piece, keywords in zip(self.pieces, self.keywords, strict=True):
            if len(keywords) < MOST_ANSWERED:
                continue
            here = kind or KINDS[rng.choice(len(KINDS), p=_SHARES)]
            weights = np.arange(len(keywords), 0, -1, dtype=float)
            chosen = rng.choice(keywords, MOST_ANSWERED, replace=False, p=weights / weights.sum()).tolist()
            yield self._sample(piece, here, [str(word) for word in chosen], keywords, rng)

    def _sample(
        self, piece: Text, kind: str, chosen: list[str], keywords: list[str], rng: np.random.Generator
    ) -> Example:
        text, asked = piece.text, ""
        if kind == "missing":
            pattern = re.compile(r"\b(" + "|".join(chosen) + r")\b", re.IGNORECASE)
            text = " ".join(pattern.sub("", text).split())
        if kind == "options":
            others = [str(word) for word in rng.choice(self.all_keywords, NUM_OPTIONS) if str(word) not in keywords]
            chosen = chosen[:1]
            options = [*others[: NUM_OPTIONS - 1], *chosen]
            asked = f"Options: {'; '.join(options[i].title() for i in rng.permutation(len(options)))}\n\n"
        messages = [
            {"role": "system", "content": _INSTRUCTIONS[kind]},
            {"role": "user", "content": f"{asked}Text:\n{text}"},
            {"role": "assistant", "content": "; ".join(word.title() for word in chosen)},
        ]
        conversation = parse_conversation({"messages": messages})
        return render_example(Record(piece.id, piece.id, conversation), self.config)


def documents(texts: Sequence[Text]) -> list[Example]:
    """Each text as a plain document: all tokens are trained."""
    config = DataConfig(train={}, reasoning_effort="low", max_length=2048)
    return [render_example(Record(t.id, t.id, parse_conversation({"text": t.text})), config) for t in texts]


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]
