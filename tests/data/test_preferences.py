"""Preference records: every form, what is shared between answers, truncation, and each fault by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.config.schema import DataConfig, LossConfig, SourceConfig
from finetune.data.dataset import Split, load_split
from finetune.data.harmony.render import Example, render_example, render_examples
from finetune.data.preferences import check_forms
from finetune.data.sources import Record, parse_record, raw_record
from finetune.errors import ConfigError, InputError
from finetune.files import JsonObject

USER = {"role": "user", "content": "What is 2 + 2?"}
GOOD, BAD = {"role": "assistant", "content": "Four."}, {"role": "assistant", "content": "Five, of course."}
CALL = {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 2, "b": 2}}]}
RESULT = {"role": "tool", "name": "add", "content": "4"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
PAIR = {"prompt": "What is 2 + 2?", "chosen": "Four.", "rejected": "Five, of course."}


def record_of(raw: JsonObject, form: str = "auto") -> Record:
    return parse_record(raw_record("file.jsonl:1", raw), form)  # type: ignore[arg-type]


def rendered(raw: JsonObject, **settings: Any) -> list[Example]:
    return render_examples(record_of(raw), DataConfig(train={}, **settings))


def split_of(directory: Path, records: list[JsonObject], **settings: Any) -> Split:
    path = directory / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return load_split(DataConfig(train={"mine": SourceConfig(path=str(path))}, cache=False, **settings), "train")


@pytest.mark.parametrize(
    "raw",
    [
        PAIR,
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "What is 2 + 2?", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]},
        {
            "chosen": "\n\nHuman: What is 2 + 2?\n\nAssistant: Four.",
            "rejected": "\n\nHuman: What is 2 + 2?\n\nAssistant: Five, of course.",
        },
        {
            "prompt": "\n\nHuman: What is 2 + 2?\n\nAssistant:",
            "chosen": "Four.",
            "rejected": "Five, of course.",
        },
        {
            "conversations": [{"from": "human", "value": "What is 2 + 2?"}],
            "chosen": {"from": "gpt", "value": "Four."},
            "rejected": {"from": "gpt", "value": "Five, of course."},
        },
        {
            "instruction": "What is 2 + 2?",
            "completions": [
                {"response": "Five, of course.", "overall_score": 2.5},
                {"response": "Four.", "overall_score": 9},
            ],
        },
        {"prompt": "What is 2 + 2?", "completions": ["Five, of course.", "Four."], "scores": [1, 2]},
    ],
)
def test_every_form_of_a_pair_gives_the_same_two_examples_best_first(raw: JsonObject) -> None:
    expected, given = rendered(PAIR), rendered(raw)
    assert [example.ids.tolist() for example in given] == [example.ids.tolist() for example in expected]
    assert [example.weights.tolist() for example in given] == [example.weights.tolist() for example in expected]
    assert given[0].score > given[1].score and given[0].shared == given[1].shared == expected[0].shared


def test_an_answer_is_the_example_that_supervised_fine_tuning_would_train() -> None:
    for example, answer in zip(rendered(PAIR), (GOOD, BAD), strict=True):
        alone = render_example(record_of({"messages": [USER, answer]}), DataConfig(train={}))
        assert example.ids.tolist() == alone.ids.tolist() and example.weights.tolist() == alone.weights.tolist()
        assert example.shared == np.flatnonzero(alone.weights)[0] and math.isnan(alone.score) and alone.shared == 0


def test_what_is_shared_is_the_prompt_alone_where_answers_begin_alike() -> None:
    chosen, rejected = rendered(PAIR | {"chosen": "It is four.", "rejected": "It is five."})
    assert np.flatnonzero(chosen.weights)[0] == chosen.shared == np.flatnonzero(rejected.weights)[0]


def test_thinking_in_one_answer_only_leaves_the_prompt_shared() -> None:
    thoughtful = [{"role": "assistant", "thinking": "Two and two.", "content": "Four."}]
    chosen, rejected = rendered(PAIR | {"chosen": thoughtful, "rejected": [BAD]}, loss=LossConfig(analysis=0.0))
    assert (
        chosen.shared == rejected.shared
        and chosen.ids[: chosen.shared].tolist() == rejected.ids[: chosen.shared].tolist()
    )
    assert rejected.weights[rejected.shared] == 1 and chosen.weights[chosen.shared] == 0


def test_a_common_tool_call_is_prompt_in_whole_conversations_and_answer_after_a_prompt() -> None:
    implicit = rendered({"tools": TOOLS, "chosen": [USER, CALL, RESULT, GOOD], "rejected": [USER, CALL, RESULT, BAD]})
    explicit = rendered(
        {"tools": TOOLS, "prompt": [USER], "chosen": [CALL, RESULT, GOOD], "rejected": [CALL, RESULT, BAD]}
    )
    assert implicit[0].ids.tolist() == explicit[0].ids.tolist()
    assert implicit[0].shared > explicit[0].shared
    assert implicit[0].num_trained_tokens < explicit[0].num_trained_tokens


def test_every_turn_of_an_answer_is_trained_unless_the_recipe_says_the_last() -> None:
    raw = {"prompt": [USER], "chosen": [GOOD, USER, GOOD], "rejected": [BAD]}
    every, last = rendered(raw)[0], rendered(raw, loss=LossConfig(turns="last"))[0]
    assert every.shared == rendered(raw)[1].shared
    assert np.flatnonzero(every.weights)[0] == every.shared < np.flatnonzero(last.weights)[0]


def test_ranked_answers_are_reduced_to_best_and_worst_unless_all_are_compared() -> None:
    raw = {"prompt": "Say a number.", "completions": ["one", "two", "three"], "scores": [2.0, 3.0, 1.0]}
    assert [example.score for example in rendered(raw)] == [3.0, 1.0]
    for pairs in ("all", "listwise"):
        assert [example.score for example in rendered(raw, pairs=pairs)] == [3.0, 2.0, 1.0]


def test_labels_become_scores(tmp_path: Path) -> None:
    records = [
        {"prompt": "Say a number.", "completion": text, "label": label} for text, label in (("1", True), ("x", False))
    ]
    split = split_of(tmp_path, records)
    assert [example.score for example in split.examples] == [1.0, 0.0] and split.stats.forms == {"labelled": 2}
    assert all(example.shared == np.flatnonzero(example.weights)[0] for example in split.examples)


RANKED = {"prompt": "Say a number.", "completions": ["one", "two"]}
FAULTS: list[tuple[JsonObject, str]] = [
    (PAIR | {"rejected": "Four."}, "identical answers"),
    ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "identical answers"),
    (PAIR | {"rejected": "Four. \n"}, "answers differ only in white space"),
    (PAIR | {"rejected": "  "}, "empty answer"),
    (PAIR | {"chosen": []}, "empty answer"),
    (PAIR | {"chosen": [{"role": "assistant", "content": ""}]}, "empty answer"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant:"}, "no answer"),
    (PAIR | {"prompt": [USER, GOOD]}, "prompt ends with an answer"),
    (PAIR | {"prompt": " "}, "empty prompt"),
    ({"chosen": "Four.", "rejected": "Five."}, "no prompt"),
    ({"chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "Other"}, BAD]}, "prompts differ"),
    ({"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, BAD]}, "prompts differ"),
    (PAIR | {"score_chosen": 3, "score_rejected": 3.0}, "scores tie"),
    (PAIR | {"score_chosen": 3, "score_rejected": 4}, "scores contradict the pair"),
    (PAIR | {"score_chosen": math.nan, "score_rejected": 4}, "score is not finite"),
    (RANKED | {"scores": [1, 1]}, "scores tie"),
    (RANKED | {"scores": [math.nan, 1]}, "score is not finite"),
    (RANKED | {"scores": ["N/A", 1]}, "score is not a number"),
    (RANKED | {"scores": [1]}, "scores do not fit"),
    (RANKED, "answer without score"),
    ({"prompt": "a", "completion": "b", "label": 1}, "label is not boolean"),
    ({"prompt": "a", "completion": "b", "label": 0.0}, "label is not boolean"),
    ({"prompt": "a", "completion": "b", "label": -1}, "label is not boolean"),
    ({"prompt": "a", "completion": "b", "label": "false"}, "label is not boolean"),
    (PAIR | {"chosen": [{"role": "asistant", "content": "x"}]}, "unknown role"),
]


@pytest.mark.parametrize(("raw", "kind"), FAULTS)
def test_each_fault_is_named_and_counted(raw: JsonObject, kind: str, tmp_path: Path) -> None:
    records = [PAIR | {"prompt": f"{number}?"} for number in range(3)]
    split = split_of(tmp_path, [*records, raw], on_bad_record="skip", max_skipped_ratio=0.5)
    assert [(bad.kind, bad.where.rpartition(":")[2]) for bad in split.stats.bad_records] == [(kind, "4")]
    assert len(split.examples) == 6
    with pytest.raises(InputError, match=r"pairs\.jsonl:4"):
        split_of(tmp_path, [*records, raw])


def test_a_tie_between_some_answers_is_a_fault_of_a_list_alone(tmp_path: Path) -> None:
    raw = {"prompt": "Say a number.", "completions": ["one", "two", "three"], "scores": [2.0, 2.0, 1.0]}
    assert len(split_of(tmp_path, [raw], pairs="all").examples) == 3
    with pytest.raises(InputError) as caught:
        split_of(tmp_path, [raw], pairs="listwise")
    assert "scores tie" in str(caught.value.why)


def test_other_labels_beside_a_prompt_and_its_completion_are_no_judgement() -> None:
    assert (
        record_of({"prompt": "a", "completion": "b", "label": "Audit Rights"}).conversation.form == "prompt_completion"
    )
    raw = {"prompt": "a", "completion": "b", "label": 1}
    assert record_of(raw, "prompt_completion").conversation.form == "prompt_completion"


def test_truncation_cuts_the_prompt_of_all_answers_alike_and_no_answer(tmp_path: Path) -> None:
    raw = PAIR | {"prompt": " ".join(f"word{number}" for number in range(200)) + " What is 2 + 2?"}
    whole = rendered(raw)
    length = whole[0].shared + sum(len(example.ids) - example.shared for example in whole)
    split = split_of(tmp_path, [raw], max_length=length - 30, too_long="truncate")
    chosen, rejected = split.examples
    assert split.stats.num_truncated == 2 and chosen.shared == rejected.shared < whole[0].shared
    assert chosen.ids[: chosen.shared].tolist() == rejected.ids[: rejected.shared].tolist()
    for short, example in zip((chosen, rejected), whole, strict=True):
        assert short.ids[short.shared :].tolist() == example.ids[example.shared :].tolist()
        assert short.weights[short.shared :].tolist() == example.weights[example.shared :].tolist()
    assert chosen.shared + sum(len(each.ids) - each.shared for each in split.examples) <= length - 30


def test_answers_that_do_not_fit_side_by_side_are_left_out_by_name(tmp_path: Path) -> None:
    long = PAIR | {"chosen": "four " * 200}
    split = split_of(tmp_path, [PAIR, long], max_length=200, too_long="truncate")
    assert len(split.examples) == 2 and "answers alone do not fit" in split.stats.dropped[0].reason
    with pytest.raises(InputError) as caught:
        split_of(tmp_path, [PAIR, long], max_length=200)
    assert "too long" in str(caught.value.why)


def test_the_fingerprint_of_what_is_trained_knows_which_answer_is_preferred(tmp_path: Path) -> None:
    swapped = PAIR | {"chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}
    tied = {"prompt": PAIR["prompt"], "completions": [PAIR["chosen"], PAIR["rejected"]], "scores": [1, 0]}
    prints = [split_of(tmp_path, [raw]).stats.fingerprint for raw in (PAIR, swapped, tied)]
    assert prints[0] == prints[2] != prints[1]


@pytest.mark.parametrize(
    ("forms", "kind", "advice"),
    [
        ({"preference": 3}, "sft", "preference_20b"),
        ({"ranked": 3}, "sft", "preference_20b"),
        ({"labelled": 3}, "sft", "no objective learns from labels alone yet"),
        ({"messages": 1, "preference": 2}, "sft", "preference_20b"),
        ({"messages": 3}, "dpo", "legal_20b"),
        ({"prompt_completion": 3}, "kto", "legal_20b"),
        ({"labelled": 3}, "dpo", "no objective learns from labels alone yet"),
        ({"ranked": 3}, "kto", "objective: dpo"),
        ({"text": 3}, "orpo", "legal_20b"),
    ],
)
def test_data_of_another_objective_are_refused_with_the_right_recipe(
    forms: dict[str, int], kind: str, advice: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_forms("train", forms, kind)
    assert advice in str(caught.value.fix)


def test_data_of_the_objective_pass() -> None:
    for forms, kind in (({"messages": 1, "text": 1}, "sft"), ({"preference": 1, "ranked": 1}, "simpo")):
        check_forms("train", forms, kind)
    check_forms("train", {"labelled": 1, "preference": 1}, "kto")
    check_forms("test", {"preference": 3}, "sft")  # pairs tell what supervised fine-tuning does to preferences


def test_labels_of_one_kind_alone_are_refused() -> None:
    check_forms("train", {"labelled": 4}, "kto", {"desirable": 1, "undesirable": 3})
    check_forms("train", {"labelled": 4, "preference": 1}, "kto", {"desirable": 4})
    with pytest.raises(InputError, match="every answer is desirable"):
        check_forms("train", {"labelled": 4}, "kto", {"desirable": 4})
