"""What the summary says of generated answers: form, refusals, exact matches, copying and voice, from made-up ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.config.schema import DataConfig, SourceConfig
from finetune.data.conversation import Conversation, Message
from finetune.data.harmony.render import render_example
from finetune.data.sources import Record, read_records
from finetune.evaluate.evalset import EvalSet, Suite
from finetune.evaluate.measure import WHO, MeasurementLog
from finetune.evaluate.prose import is_refusal, prose_figures, trained_texts
from finetune.evaluate.summary import summarise_answers

DATA = DataConfig(train={})


def record(number: int, said: str, *, author: str | None = None, answer: str | None = None) -> Record:
    messages = (Message("user", f"Go on, {number}."), Message("assistant", said))
    return Record(
        str(number), f"rows:{number}", Conversation(messages), answer, {"author": author} if author is not None else {}
    )


def figures(directory: Path, records: list[Record], written: list[dict[str, Any]], train: list[Record]) -> Any:
    """The summary's `answers`, where base and adapter wrote the same."""
    log = MeasurementLog(directory / "rows.jsonl", {})
    for who in WHO:
        log.append(
            {
                "measured": "text", "who": who, "suite": "test", "row": row, "tokens": 7, "stopped": True,
                "error": None, "final": "", **line,
            }
            for row, line in enumerate(written)
        )  # fmt: skip
    rows = EvalSet(tuple(records), tuple(render_example(one, DATA) for one in records), None)
    return summarise_answers(Suite("test", rows, DATA), log, len(records), train, 0.95)


def test_form_refusals_and_exact_matches_are_counted(tmp_path: Path) -> None:
    written = [
        {"final": "yes."},
        {"final": "Yes", "error": "goes on after its final message"},
        {"final": "Y", "stopped": False},
        {"final": "I cannot classify this clause."},
        {"final": "No"},
    ]
    found = figures(tmp_path, [record(n, "Yes", answer="Yes") for n in range(5)], written, [])["adapter"]
    assert (found["stopped"], found["cut"], found["format_errors"], found["refusals"]) == (4, 1, 1, 1)
    assert found["mean_tokens"] == 7


def test_an_answer_in_a_broken_form_is_no_match(tmp_path: Path) -> None:
    records = [record(n, "Yes", answer="Yes") for n in range(4)]
    right: list[dict[str, Any]] = [{"final": "Yes"}] * 4
    broken = [*right[:3], {"final": "Yes", "error": "<|end|> inside a message"}]
    found = [figures(tmp_path / name, records, rows, []) for name, rows in (("right", right), ("broken", broken))]
    assert [one["exact"]["adapter"]["value"] for one in found] == [1.0, 0.75]


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
def test_other_answers_are_no_refusals(text: str) -> None:
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
def test_copies_of_all_that_was_trained_are_found(tmp_path: Path, conversation: Conversation) -> None:
    train = [Record("t", "train:1", conversation)]
    found = figures(tmp_path, [record(0, "other words")], [{"final": f"So {COPIED}!"}], train)["prose"]
    assert found["adapter"]["longest_copy_words"] == 7 and found["reference"]["longest_copy_words"] == 0


def test_what_the_user_said_is_no_copy() -> None:
    assert trained_texts(record(0, "said")) == ["said"]


def test_without_training_records_copying_is_not_told() -> None:
    found = prose_figures({"adapter": ["a"]}, [record(0, "b")], None)
    assert "longest_copy_words" not in found["adapter"] and found["adapter"]["distinct_1"] == 1


def test_the_median_copy_of_two_is_between_them() -> None:
    train = [record(0, COPIED)]
    found = prose_figures({"adapter": [COPIED, "nothing of it"]}, [record(1, "x"), record(2, "y")], train)["adapter"]
    assert (found["longest_copy_words"], found["median_copy_words"]) == (7, 3.5)


def voices(written: list[str], authors: list[str]) -> Any:
    train = [record(n, "sea ship sail", author="Many") for n in range(9)]
    train += [record(n, text, author=name) for n, (text, name) in enumerate([("heath moor", "Few"), ("tea", "One")], 9)]
    return prose_figures({"adapter": written}, [record(n, "x", author=a) for n, a in enumerate(authors)], train)


def test_naming_the_most_frequent_author_earns_nothing() -> None:
    """Seven of eight rows are one author's; texts that all sound like him are right 7 times of 8, and by chance."""
    found = voices(["the sea"] * 8, ["Many"] * 7 + ["Few"])
    assert found["adapter"]["own_author"] == 7 / 8 and found["adapter"]["own_author_balanced"] == 0.5
    assert found["authors"] == {"known": 3, "largest_share": 7 / 8, "unknown_rows": 0}


def test_empty_texts_have_nobodys_voice_and_unknown_authors_do_not_count() -> None:
    found = voices(["", " ", "a ship", "the moor", "tea?"], ["Many", "Many", "Many", "Few", "Stranger"])
    assert found["adapter"]["empty"] == 2
    assert found["adapter"]["own_author"] == 2 / 4
    assert found["adapter"]["own_author_balanced"] == pytest.approx((1 / 3 + 1) / 2)
    assert found["authors"] == {"known": 3, "largest_share": 3 / 4, "unknown_rows": 1}


def test_one_author_has_no_voice_to_tell() -> None:
    train = [record(0, "sea", author="Many")]
    found = prose_figures({"adapter": ["sea"]}, [record(1, "x", author="Many")], train)
    assert "own_author" not in found["adapter"] and "authors" not in found
