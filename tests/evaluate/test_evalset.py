"""Choice of evaluation sets and labels, notes about odd records, and the log of measurements."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.config.schema import (
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    RunConfig,
    SourceConfig,
    ValidationSplitConfig,
)
from finetune.data.conversation import Conversation, Message
from finetune.data.dataset import Split, load_split
from finetune.data.sources import Record
from finetune.errors import ConfigError
from finetune.evaluate.evalset import (
    SHIPPED,
    EvalSet,
    choose_candidates,
    choose_test_set,
    evenly_spread,
    plain_text_set,
    retention_sets,
    stratified_subset,
)
from finetune.evaluate.measure import ExampleScore, MeasurementLog


def records_with(*answers: str | None) -> list[Record]:
    return [
        Record(
            str(number),
            f"rows:{number}",
            Conversation((Message("user", "q"), Message("assistant", answer or "x"))),
            answer,
        )
        for number, answer in enumerate(answers)
    ]


# ---- candidates -----------------------------------------------------------------------------------------------------


def test_labels_of_training_are_candidates_too() -> None:
    found = choose_candidates(records_with("Yes", "No"), {"mine": {"Yes": 5, "No": 5, "Maybe": 2}})
    assert found.labels == ("Maybe", "No", "Yes") and found.notes == () and found.why_not is None
    # A source of another task shares no answer: its labels are none of these rows'.
    assert choose_candidates(
        records_with("Yes", "No"), {"mine": {"Yes": 1, "No": 1}, "legal": {"Parties": 9}}
    ).labels == (
        "No",
        "Yes",
    )
    assert choose_candidates(records_with("Yes", "No"), {}).labels == ("No", "Yes")


def test_answers_missing_in_training_are_named() -> None:
    (note,) = choose_candidates(records_with(*["Yes"] * 10, *["No"] * 10, "yes"), {"mine": {"Yes": 5, "No": 5}}).notes
    assert note == "1 of 21 test answers occur in no training record: 'yes' (1 records; did you mean Yes?)"
    (note,) = choose_candidates(records_with(*"abcdefgh", "z"), {"mine": {"z": 1}}).notes
    assert note.startswith("8 of 9 test answers") and note.endswith("'e' (1 records) and 3 more")
    (note,) = choose_candidates(records_with("Yes", "No"), {"mine": {"other": 1}}).notes
    assert "no training record has an answer of the test records" in note


@pytest.mark.parametrize(
    ("records", "why"),
    [
        (records_with(*["Yes", "No"] * 10, None), "1 of 21 test records have no `answer`"),
        (records_with(*map(str, range(65))), "65 different answers, more than 64"),
        (records_with("Yes", "Yes"), "the same answer"),
        (
            [*records_with("a"), Record("t", "t:1", Conversation((), text="t", form="text"), "b")],
            "1 of 2 test records are plain text",
        ),
    ],
)
def test_the_reason_for_not_scoring_labels_is_noted(records: list[Record], why: str) -> None:
    found = choose_candidates(records, {})
    assert found.labels is None and found.why_not is not None and why in found.why_not
    assert f"labels are not scored: {found.why_not}" in found.notes


def test_records_without_any_answer_give_no_note() -> None:
    assert choose_candidates(records_with(None, None), {"mine": {"Yes": 1}}).notes == ()


def test_answers_that_differ_from_the_last_message_are_counted() -> None:
    right, wrong = records_with("Yes", "No")
    wrong = dataclasses.replace(wrong, answer="Yes")
    (note,) = choose_candidates([right, wrong, *records_with("No")[:0]], {"mine": {"Yes": 1, "No": 1}}).notes
    assert note.startswith(
        "1 of 2 test records have an `answer` that differs from their last message (the first: rows:1)"
    )


# ---- the same examples for every seed -------------------------------------------------------------------------------


def recipe(data: DataConfig, **settings: Any) -> RunConfig:
    return RunConfig(model=ModelConfig(path="x"), data=data, **settings)


def test_every_seed_scores_the_same_examples() -> None:
    legal = SourceConfig(path="shipped://legal/cuad_clause_type.jsonl.gz", where={"split": "test"})
    data = DataConfig(train={}, test={"legal": legal}, max_length=1024)
    split = load_split(data, "test")
    chosen = [
        choose_test_set(split, recipe(data, seed=seed, evaluate=EvaluateConfig(test_examples=50)), {})
        for seed in (0, 1)
    ]
    ids = [[record.id for record in test.records] for test in chosen]
    assert ids[0] == ids[1] and len(ids[0]) == 50
    assert ids[0] == [split.records[number].id for number in stratified_subset(split.records, 50, 0)]
    assert ids[0] != [split.records[number].id for number in stratified_subset(split.records, 50, 1)]


def test_labels_always_is_refused_with_the_reason() -> None:
    split = Split("test", records_with("a", None), ())
    with pytest.raises(ConfigError, match="1 of 2 test records have no `answer`"):
        choose_test_set(split, recipe(DataConfig(train={}), evaluate=EvaluateConfig(labels="always")), {})


# ---- records of several examples ------------------------------------------------------------------------------------


@pytest.fixture
def turns(tmp_path: Path) -> EvalSet:
    """Record 1 has three turns, so three examples; records 0 and 2 have one."""
    path = tmp_path / "turns.jsonl"
    turn = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    lines = [{"messages": turn * count, "answer": answer} for count, answer in ((1, "a"), (3, "b"), (1, "a"))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = DataConfig(train={}, test={"mine": SourceConfig(path=str(path))}, earlier_thinking="split", cache=False)
    return choose_test_set(load_split(data, "test"), recipe(data), {})


def test_a_record_of_several_turns_counts_once(turns: EvalSet) -> None:
    assert turns.record_numbers.tolist() == [0, 1, 1, 1, 2]
    assert turns.labelled_examples == {0, 1, 4} and turns.answered_examples(10) == [0, 1, 4]
    values = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    assert turns.by_record(values).tolist() == [1.0, 14.0, 16.0]
    assert turns.by_record(values[1:4], [1, 2, 4]).tolist() == [6.0, 8.0]


def test_only_conversations_are_answered() -> None:
    text = [Record(str(n), f"t:{n}", Conversation((), text="t", form="text")) for n in range(3)]
    evalset = EvalSet("test", DataConfig(train={}), (*text, *records_with("a", "b")), (), None)
    assert evalset.answered_examples(2) == [3, 4]


@pytest.mark.parametrize(("count", "expected"), [(None, "abcde"), (9, "abcde"), (5, "abcde"), (2, "ac"), (0, "")])
def test_items_are_evenly_spread(count: int | None, expected: str) -> None:
    assert evenly_spread("abcde", count) == tuple(expected)


# ---- retention ------------------------------------------------------------------------------------------------------


def test_retention_of_a_recipe_that_splits_by_a_field_missing_in_the_shipped_records() -> None:
    data = DataConfig(train={}, validation_split=ValidationSplitConfig(key="customer"))
    trained = {"prose": SourceConfig(path=f"shipped://{SHIPPED['creative']}")}
    found = {evalset.name: evalset for evalset in retention_sets(data, trained, 2)}
    assert "legal" in found and "creative" not in found and len(found["legal"].labels or ()) == 24
    without = retention_sets(data, trained, 2, scores_labels=False)
    assert all(evalset.labels is None for evalset in without)


def test_a_long_text_is_scored_completely() -> None:
    long = Record("l", "l:1", Conversation((Message("user", "word " * 9000), Message("assistant", "a"))))
    data = DataConfig(train={})
    plain = plain_text_set([EvalSet("s", data, (long,), (), None)], 1, data)
    assert len(plain.examples) == 3 and plain.record_numbers.tolist() == [0, 0, 0]
    assert 9000 <= sum(example.num_trained_tokens for example in plain.examples) <= 9010


# ---- the log of measurements ----------------------------------------------------------------------------------------


def test_resuming_replaces_the_log_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, score = tmp_path / "rows.jsonl", ExampleScore(1.5, 2.0, [-1.0, -2.0], -0.5)
    MeasurementLog(path, {"a": 1}).append("score", "base", "test", [(0, score)])
    before = path.read_text()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            MeasurementLog(path, {"a": 1})
    assert path.read_text() == before
    path.write_text(before + '{"measured": "sc')
    resumed = MeasurementLog(path, {"a": 1})
    assert resumed.scores("base", "test", [0]) == [score] and path.read_text() == before
    assert resumed.missing("score", "base", "test", range(2)) == [1]
