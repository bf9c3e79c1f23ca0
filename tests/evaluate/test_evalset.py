"""Which rows and labels an evaluation takes, and what it says of rows that are odd."""

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
from finetune.evaluate.evalset import SHIPPED, Suite, _plain_text, choose_candidates, choose_test_set, retention_sets
from finetune.evaluate.evalset import EvalSet as Rows
from finetune.evaluate.labels import stratified_subset
from finetune.evaluate.measure import MeasurementLog, answered_examples


def rows(*answers: str | None) -> list[Record]:
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
    found = choose_candidates(rows("Yes", "No"), {"mine": {"Yes": 5, "No": 5, "Maybe": 2}})
    assert found.labels == ("Maybe", "No", "Yes") and found.notes == () and found.why_not is None
    # A source of another task shares no answer: its labels are none of these rows'.
    assert choose_candidates(rows("Yes", "No"), {"mine": {"Yes": 1, "No": 1}, "legal": {"Parties": 9}}).labels == (
        "No",
        "Yes",
    )
    assert choose_candidates(rows("Yes", "No"), {}).labels == ("No", "Yes")


def test_answers_that_training_has_not_are_named() -> None:
    (note,) = choose_candidates(rows(*["Yes"] * 10, *["No"] * 10, "yes"), {"mine": {"Yes": 5, "No": 5}}).notes
    assert note == "1 of 21 test answers stand in no training row: 'yes' (1 rows; did you mean Yes?)"
    (note,) = choose_candidates(rows(*"abcdefgh", "z"), {"mine": {"z": 1}}).notes
    assert note.startswith("8 of 9 test answers") and note.endswith("'e' (1 rows) and 3 more")
    (note,) = choose_candidates(rows("Yes", "No"), {"mine": {"other": 1}}).notes
    assert "no training row has an answer of the test rows" in note


@pytest.mark.parametrize(
    ("records", "why"),
    [
        (rows(*["Yes", "No"] * 10, None), "1 of 21 test rows have no `answer`"),
        (rows(*map(str, range(65))), "65 different answers, more than 64"),
        (rows("Yes", "Yes"), "the same answer"),
        (
            [*rows("a"), Record("t", "t:1", Conversation((), text="t", form="text"), "b")],
            "1 of 2 test rows are plain text",
        ),
    ],
)
def test_why_labels_are_not_scored_is_said(records: list[Record], why: str) -> None:
    found = choose_candidates(records, {})
    assert found.labels is None and found.why_not is not None and why in found.why_not
    assert f"labels are not scored: {found.why_not}" in found.notes


def test_rows_without_any_answer_are_nothing_to_speak_of() -> None:
    assert choose_candidates(rows(None, None), {"mine": {"Yes": 1}}).notes == ()


def test_an_answer_that_is_not_what_was_said_is_counted() -> None:
    right, wrong = rows("Yes", "No")
    wrong = dataclasses.replace(wrong, answer="Yes")
    (note,) = choose_candidates([right, wrong, *rows("No")[:0]], {"mine": {"Yes": 1, "No": 1}}).notes
    assert note.startswith(
        "1 of 2 test rows have an `answer` that is not what their last message says (the first: rows:1)"
    )


# ---- the same rows for every seed -----------------------------------------------------------------------------------


def recipe(data: DataConfig, **settings: Any) -> RunConfig:
    return RunConfig(model=ModelConfig(path="x"), data=data, **settings)


def test_every_seed_scores_the_same_rows() -> None:
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


def test_always_says_why_not() -> None:
    split = Split("test", rows("a", None), ())
    with pytest.raises(ConfigError, match="1 of 2 test rows have no `answer`"):
        choose_test_set(split, recipe(DataConfig(train={}), evaluate=EvaluateConfig(labels="always")), {})


# ---- records of several rows ----------------------------------------------------------------------------------------


@pytest.fixture
def turns(tmp_path: Path) -> Rows:
    """Record 1 has three turns, so three rows; records 0 and 2 have one."""
    path = tmp_path / "turns.jsonl"
    turn = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    lines = [{"messages": turn * count, "answer": answer} for count, answer in ((1, "a"), (3, "b"), (1, "a"))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = DataConfig(train={}, test={"mine": SourceConfig(path=str(path))}, earlier_thinking="split", cache=False)
    return choose_test_set(load_split(data, "test"), recipe(data), {})


def test_a_record_of_several_turns_counts_once(turns: Rows) -> None:
    assert turns.record_numbers.tolist() == [0, 1, 1, 1, 2]
    assert turns.labelled_examples == {0, 1, 4} and answered_examples(turns, 10) == [0, 1, 4]
    values = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    assert turns.by_record(values).tolist() == [1.0, 14.0, 16.0]
    assert turns.by_record(values[1:4], [1, 2, 4]).tolist() == [6.0, 8.0]


def test_rows_that_answer_are_conversations() -> None:
    text = [Record(str(n), f"t:{n}", Conversation((), text="t", form="text")) for n in range(3)]
    assert answered_examples(Rows((*text, *rows("a", "b")), (), None), 2) == [3, 4]


# ---- retention ------------------------------------------------------------------------------------------------------


def test_retention_of_a_recipe_that_splits_by_a_field_the_shipped_rows_have_not() -> None:
    data = DataConfig(train={}, validation_split=ValidationSplitConfig(key="customer"))
    trained = {"prose": SourceConfig(path=f"shipped://{SHIPPED['creative']}")}
    found = {suite.name: suite.rows for suite in retention_sets(data, trained, 2)}
    assert "legal" in found and "creative" not in found and len(found["legal"].labels or ()) == 24
    without = retention_sets(data, trained, 2, scores_labels=False)
    assert all(suite.rows.labels is None for suite in without)


def test_a_long_text_is_scored_to_its_end() -> None:
    long = Record("l", "l:1", Conversation((Message("user", "word " * 9000), Message("assistant", "a"))))
    suite = _plain_text([Suite("s", Rows((long,), (), None), DataConfig(train={}))], 1, DataConfig(train={}))
    assert len(suite.rows.samples) == 3 and suite.rows.record_numbers.tolist() == [0, 0, 0]
    assert 9000 <= sum(sample.num_trained_tokens for sample in suite.rows.samples) <= 9010


# ---- the log of rows ------------------------------------------------------------------------------------------------


def test_resuming_replaces_the_log_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    MeasurementLog(path, {"a": 1}).append([{"measured": "score", "who": "base", "suite": "test", "row": 0}])
    before = path.read_text()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            MeasurementLog(path, {"a": 1})
    assert path.read_text() == before
    path.write_text(before + '{"measured": "sc')
    assert len(MeasurementLog(path, {"a": 1}).rows) == 1 and path.read_text() == before
