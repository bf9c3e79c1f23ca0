"""Duplicates are found: compared with an exhaustive search, and on the shipped data."""

from __future__ import annotations

import re
from itertools import combinations

import numpy as np
import pytest

from finetune.config.schema import SourceConfig
from finetune.data.duplicates import (
    NEAR,
    Text,
    find_duplicates,
    jaccard,
    minhash,
    normalise,
    shingle_hashes,
    text_of,
)
from finetune.data.forms import parse_conversation
from finetune.data.sources import Record, read_records

WORDS = [f"word{number}" for number in range(2000)]


def text(where: str, question: str, answer: str = "a") -> Text:
    return Text(where, normalise(question), normalise(answer))


def random_text(rng: np.random.Generator, length: int) -> list[str]:
    return [WORDS[number] for number in rng.integers(0, len(WORDS), length)]


def sets_of_five(text: Text) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", f"{text.question} {text.answer}")
    return {tuple(words[place : place + 5]) for place in range(max(1, len(words) - 4))}


def test_normalising_folds_invisible_differences() -> None:
    assert normalise("  The ﬁrst\tCLAUSE \n") == normalise("the first clause")
    assert normalise("clause 1") != normalise("clause 2")


def test_shingles_equal_sets_of_word_tuples() -> None:
    """Similarity of hashes against similarity of Python's own sets of tuples."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        one = random_text(rng, int(rng.integers(3, 60)))
        other = [word if rng.random() < 0.95 else "changed" for word in one]
        texts = text("x", " ".join(one), ""), text("y", " ".join(other), "")
        sets = [sets_of_five(entry) for entry in texts]
        expected = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        assert jaccard(*(shingle_hashes(entry.question) for entry in texts)) == pytest.approx(expected)


def test_minhash_estimates_similarity() -> None:
    rng = np.random.default_rng(1)
    errors = []
    for _ in range(60):
        one = rng.integers(0, 2**63, 300).astype(np.uint64)
        other = np.unique(np.concatenate([one[: rng.integers(0, 300)], rng.integers(0, 2**63, 150).astype(np.uint64)]))
        one = np.unique(one)
        errors.append(np.mean(minhash(one) == minhash(other)) - jaccard(one, other))
    assert abs(np.mean(errors)) < 0.02 and np.std(errors) < 0.06, "unbiased, and as wide as 125 hash functions are"


def test_near_duplicates_equal_an_exhaustive_search() -> None:
    """300 texts with planted variants: every pair compared with Python sets is the oracle."""
    rng = np.random.default_rng(2)
    texts: list[Text] = []
    for number in range(100):
        words = random_text(rng, 80)
        for variant in range(3):
            changed = list(words)
            for place in rng.integers(0, 80, variant * int(rng.integers(0, 4))):
                changed[place] = WORDS[int(rng.integers(0, 2000))]
            texts.append(text(f"{number}-{variant}", " ".join(changed), str(number)))
    order = rng.permutation(len(texts))
    texts = [texts[place] for place in order]
    sets = [sets_of_five(entry) for entry in texts]
    exact, near = set(), set()
    for earlier, later in combinations(range(len(texts)), 2):
        if texts[earlier].question == texts[later].question:
            exact.add(later)
        elif len(sets[earlier] & sets[later]) / len(sets[earlier] | sets[later]) >= NEAR:
            near.add(later)
    found = find_duplicates({"train": texts})["train"]
    assert found.exact == len(exact) > 20
    assert found.near == len(near - exact) > 20


def test_kinds_across_splits() -> None:
    train = [text("t:1", "What is one and one?", "two"), text("t:2", "Unrelated and different question here", "x")]
    test = [
        text("e:1", "what is  ONE and one?", "Two"),
        text("e:2", "What is one and one?", "three"),
        text("e:3", "Something else altogether now", "two"),
    ]
    found = find_duplicates({"train": train, "test": test})
    assert list(found) == ["train", "test in train", "test"]
    overlap = found["test in train"]
    assert (overlap.num_records, overlap.exact, overlap.other_answer, overlap.near) == (3, 1, 1, 0)
    assert overlap.examples == [("exact", "e:1", "t:1"), ("other_answer", "e:2", "t:1")]
    assert (found["train"].exact, found["test"].other_answer) == (0, 1)


def test_a_shared_instruction_makes_nothing_similar() -> None:
    rng = np.random.default_rng(3)
    boilerplate = " ".join(random_text(rng, 200))
    texts = [text(str(number), f"{boilerplate} {' '.join(random_text(rng, 20))}") for number in range(60)]
    assert find_duplicates({"train": texts})["train"].near == 0
    few = find_duplicates({"train": texts[:10]})["train"]
    assert few.near == 9, "of a few rows nothing can be called common, so they are similar"


def test_texts_of_conversations() -> None:
    messages = [
        {"role": "system", "content": "Instructions"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A", "thinking": "T"},
    ]
    assert text_of("x:1", parse_conversation({"messages": messages})) == Text("x:1", "q", "a")
    assert text_of("x:1", parse_conversation({"text": "Plain  text"})) == Text("x:1", "plain text", "")


def shipped(split: str) -> list[Text]:
    source = SourceConfig(path="shipped://legal/cuad_clause_type.jsonl.gz", where={"split": split})
    rows = [row for row in read_records("legal", source) if isinstance(row, Record)]
    return [text_of(row.where, row.conversation) for row in rows]


def test_the_shipped_legal_splits() -> None:
    """Split by contract: no test record is in train word for word, and five clauses nearly are."""
    found = find_duplicates({"train": shipped("train"), "validation": shipped("val"), "test": shipped("test")})
    counts = {name: (overlap.exact, overlap.other_answer, overlap.near) for name, overlap in found.items()}
    assert counts == {
        "train": (0, 0, 24),
        "validation in train": (0, 0, 0),
        "validation": (0, 0, 1),
        "test in train": (0, 0, 5),
        "test in validation": (0, 0, 0),
        "test": (0, 0, 4),
    }
    assert (
        "near",
        "shipped://legal/cuad_clause_type.jsonl.gz:71",
        "shipped://legal/cuad_clause_type.jsonl.gz:1394",
    ) in (found["test in train"].examples)
