"""Figures of generated answers, from made-up ones: form, refusals, exact matches, variety, copying and voice."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.config.schema import DataConfig, SourceConfig
from finetune.data.conversation import Conversation, Message
from finetune.data.harmony.render import render_example
from finetune.data.sources import Record, read_records
from finetune.evaluate.evalset import EvalSet
from finetune.evaluate.measure import GeneratedAnswer, MeasurementLog
from finetune.evaluate.prose import (
    AuthorClassifier,
    TrainingText,
    distinctness,
    is_refusal,
    prose_figures,
    trained_texts,
)
from finetune.evaluate.summary import summarise_answers
from finetune.figures import MODELS
from finetune.results import AnswerFigures, AuthorFigures, TextFigures

DATA = DataConfig(train={})


def record(number: int, said: str, *, author: str | None = None, answer: str | None = None) -> Record:
    messages = (Message("user", f"Go on, {number}."), Message("assistant", said))
    return Record(
        str(number), f"rows:{number}", Conversation(messages), answer, {"author": author} if author is not None else {}
    )


def figures(
    directory: Path, records: list[Record], written: list[dict[str, Any]], train: list[Record]
) -> AnswerFigures:
    """The figures of answers where base and adapter wrote the same."""
    measured = MeasurementLog(directory / "rows.jsonl", {})
    plain = GeneratedAnswer(7, "", None, "", "", True, None)
    for model in MODELS:
        measured.append("text", model, "test", ((row, replace(plain, **line)) for row, line in enumerate(written)))
    examples = tuple(render_example(one, DATA) for one in records)
    return summarise_answers(EvalSet("test", DATA, tuple(records), examples, None), measured, len(records), train, 0.95)


def test_form_refusals_and_exact_matches_are_counted(tmp_path: Path) -> None:
    written = [
        {"final": "yes."},
        {"final": "Yes", "error": "a message after the final one"},
        {"final": "Y", "stopped": False},
        {"final": "I cannot classify this clause."},
        {"final": "No"},
    ]
    found = figures(tmp_path, [record(n, "Yes", answer="Yes") for n in range(5)], written, []).adapter
    assert (found.stopped, found.cut, found.format_errors, found.refusals) == (4, 1, 1, 1)
    assert found.mean_tokens == 7


def test_an_answer_with_a_format_error_is_no_match(tmp_path: Path) -> None:
    records = [record(n, "Yes", answer="Yes") for n in range(4)]
    right: list[dict[str, Any]] = [{"final": "Yes"}] * 4
    broken = [*right[:3], {"final": "Yes", "error": "<|end|> inside a message"}]
    found = [figures(tmp_path / name, records, rows, []) for name, rows in (("right", right), ("broken", broken))]
    assert [one.exact and one.exact.adapter and one.exact.adapter.value for one in found] == [1.0, 0.75]


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can’t help with that.",
        "I am sorry, but this is not something I do.",
        "Sorry, I cannot provide medical advice.",
        "I cannot classify this clause.",
        "I must decline.",
        "I am sorry.",
        "I'm unable to answer",
        "I am not able to help with that.",
        "**I can't assist with this request.**",
        "Unfortunately, I am unable to determine the category.",
        "As an AI language model, I have no opinion.",
        "I will not write that.",
        "I respectfully decline.",
    ],
)
def test_refusals_are_found(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Governing Law",
        "“I am sorry, but I cannot help you,” said she.",
        '"I can\'t tell," he answered.',
        "I cannot see the shore any longer.",
        "I'm sorry for the loss of the ship.",
        "I am sorry. The category is Insurance.",
        "He wrote: I must decline.",
        "Yes: the party may decline, and I cannot answer for more.",
        "I declined in health that winter.",
        "I will note two things.",
    ],
)
def test_other_answers_are_not_refusals(text: str) -> None:
    assert not is_refusal(text)


def test_no_real_continuation_is_a_refusal() -> None:
    path = "shipped://creative/fiction_continuation.jsonl.gz"
    texts = [one.messages[-1].content for one in read_records("x", SourceConfig(path=path)) if isinstance(one, Record)]
    assert len(texts) > 2000 and not any(map(is_refusal, texts))


COPIED = "one two three four five six seven"


@pytest.mark.parametrize(
    "conversation",
    [
        Conversation((), text=COPIED, form="text"),
        Conversation(
            (Message("user", "?"), Message("assistant", COPIED), Message("user", "!"), Message("assistant", "z"))
        ),
        Conversation((Message("user", "?"), Message("assistant", "z", thinking=COPIED))),
    ],
    ids=["plain text", "an earlier turn", "thinking"],
)
def test_copies_of_any_trained_text_are_found(tmp_path: Path, conversation: Conversation) -> None:
    train = [Record("t", "train:1", conversation)]
    found = figures(tmp_path, [record(0, "other words")], [{"final": f"So {COPIED}!"}], train).prose
    assert found and found.adapter and found.reference
    assert found.adapter.longest_copy_words == 7 and found.reference.longest_copy_words == 0


def test_user_messages_are_not_training_texts() -> None:
    assert trained_texts(record(0, "said")) == ["said"]


def test_without_training_records_copies_are_not_measured() -> None:
    found = prose_figures({"adapter": ["a"]}, [record(0, "b")], None).adapter
    assert found and found.longest_copy_words is None and found.distinct_1 == 1


def test_the_median_copy_of_two_is_between_them() -> None:
    train = [record(0, COPIED)]
    found = prose_figures({"adapter": [COPIED, "nothing of it"]}, [record(1, "x"), record(2, "y")], train).adapter
    assert found and (found.longest_copy_words, found.median_copy_words) == (7, 3.5)


def voices(written: list[str], authors: list[str]) -> tuple[TextFigures, AuthorFigures]:
    train = [record(n, "sea ship sail", author="Many") for n in range(9)]
    train += [record(n, text, author=name) for n, (text, name) in enumerate([("heath moor", "Few"), ("tea", "One")], 9)]
    found = prose_figures({"adapter": written}, [record(n, "x", author=a) for n, a in enumerate(authors)], train)
    assert found.adapter and found.authors
    return found.adapter, found.authors


def test_the_most_frequent_author_gains_nothing() -> None:
    """Seven of eight records are one author's; texts that all sound like him are right 7 times of 8, and by chance."""
    found, authors = voices(["the sea"] * 8, ["Many"] * 7 + ["Few"])
    assert found.own_author == 7 / 8 and found.own_author_balanced == 0.5
    assert authors == AuthorFigures(known=3, largest_share=7 / 8, unknown_rows=0)


def test_empty_texts_have_no_voice_and_unknown_authors_do_not_count() -> None:
    found, authors = voices(["", " ", "a ship", "the moor", "tea?"], ["Many", "Many", "Many", "Few", "Stranger"])
    assert found.empty == 2
    assert found.own_author == 2 / 4
    assert found.own_author_balanced == pytest.approx((1 / 3 + 1) / 2)
    assert authors == AuthorFigures(known=3, largest_share=3 / 4, unknown_rows=1)


def test_one_author_alone_is_not_classified() -> None:
    train = [record(0, "sea", author="Many")]
    found = prose_figures({"adapter": ["sea"]}, [record(1, "x", author="Many")], train)
    assert found.adapter and found.adapter.own_author is None and found.authors is None


def test_longest_copy_is_found() -> None:
    seen = TrainingText(["the quick brown fox jumps over the lazy dog again and again", "brown fox jumps high"])
    assert seen.longest_copy("A quick brown fox jumps over a wall") == 5
    assert seen.longest_copy("Quick brown fox") == 0  # under four words
    assert seen.longest_copy("over the lazy dog AGAIN, and again!") == 7
    assert seen.longest_copy("") == 0


def test_distinctness_is_low_for_repetition() -> None:
    assert distinctness(["one two three"], 1) == 1
    assert distinctness(["one one one one"], 1) == 0.25
    assert distinctness(["one two one two"], 2) == pytest.approx(2 / 3)
    assert distinctness([""], 2) == 0


def test_author_classifier_equals_counts_by_hand() -> None:
    rng = np.random.default_rng(1)
    texts = [" ".join(f"v{rng.integers(40 * (n % 3 + 1))}" for _ in range(30)) for n in range(60)]
    authors = [f"author {n % 3}" for n in range(54)] + ["author 2"] * 6  # not evenly many
    ours = AuthorClassifier(texts[:45], authors[:45])
    vocabulary = sorted({word for text in texts[:45] for word in text.split()})

    counts = {
        author: Counter(" ".join(t for t, a in zip(texts[:45], authors[:45], strict=True) if a == author).split())
        for author in sorted(set(authors[:45]))
    }

    def log_probability(author: str, text: str) -> float:
        total = counts[author].total() + len(vocabulary)
        return sum(log((counts[author][word] + 1) / total) for word in text.split() if word in vocabulary)

    expected = [max(counts, key=lambda author: log_probability(author, text)) for text in texts[45:]]
    assert ours.classify(texts[45:]) == expected
    assert len(set(expected)) > 1


def test_a_text_without_known_words_has_no_author() -> None:
    """With the texts' shares as prior it would be attributed to whoever wrote most."""
    classifier = AuthorClassifier(["red green"] * 9 + ["blue grey"], ["many"] * 9 + ["few"])
    assert classifier.classify(["", "!?", "yellow"]) == [None] * 3
    assert classifier.classify(["green", "blue"]) == ["many", "few"]
