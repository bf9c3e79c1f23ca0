"""Pair accuracy from the examples' losses, its controls, and where it is stored and shown."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from finetune.config.schema import DataConfig, SourceConfig
from finetune.data.dataset import load_split
from finetune.evaluate.evalset import EvalSet, _whole_groups
from finetune.evaluate.measure import ExampleScore
from finetune.evaluate.pairs import pair_figures, preferred_examples, shuffled_prompts, with_shuffled
from finetune.evaluate.summary import summarise_set
from finetune.files import JsonObject
from finetune.report.content import evaluation_parts
from finetune.results import Evaluation, parse_evaluation, to_json

PAIRS = [{"prompt": f"Question {n}?", "chosen": f"yes {n}", "rejected": f"no no no {n}"} for n in range(4)]
RANKED = {"prompt": "Rank?", "completions": ["a", "b", "c"], "scores": [1, 3, 2]}


def evalset_of(directory: Path, records: list[JsonObject]) -> EvalSet:
    path = directory / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    data = DataConfig(train={}, test={"mine": SourceConfig(path=str(path))}, cache=False, pairs="all")
    split = load_split(data, "test")
    return EvalSet("test", data, tuple(split.records), tuple(split.examples), None)


def test_the_better_answer_wins_where_its_log_probability_is_higher(tmp_path: Path) -> None:
    evalset = evalset_of(tmp_path, PAIRS)
    base = np.array([2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 1.0, 2.0])
    adapter = np.array([1.0, 2.0, 1.0, 2.0, 1.9, 1.0, 1.0, 2.0])
    found = pair_figures(evalset, {"base": base, "adapter": adapter}, 0.95)
    assert found is not None and found.pairs == 4
    assert found.accuracy.base and found.accuracy.base.value == 0.25 and found.accuracy.adapter
    assert found.accuracy.adapter.value == 0.75 and found.accuracy.mcnemar and found.accuracy.mcnemar.gained == 2
    assert found.reward_accuracy and found.reward_accuracy.value == 0.75  # the last pair gained nothing
    assert found.margin.base and found.margin.base.value == -0.5
    assert found.shorter_wins and found.shorter_wins.value == 1.0


def test_equal_log_probabilities_are_no_preference(tmp_path: Path) -> None:
    found = pair_figures(evalset_of(tmp_path, PAIRS), {"base": np.ones(8)}, 0.95)
    assert found and found.accuracy.base and found.accuracy.base.value == 0.0 and found.accuracy.adapter is None


def test_of_several_answers_every_pair_counts_and_records_are_resampled(tmp_path: Path) -> None:
    evalset = evalset_of(tmp_path, [RANKED, *PAIRS])
    assert evalset.pairs[:3] == ((0, 1), (0, 2), (1, 2)) and len(evalset.pairs) == 7
    found = pair_figures(evalset, {"base": np.array([1.0, 2, 3, *[1, 2] * 4])}, 0.95)
    assert found and found.accuracy.base and found.accuracy.base.value == 1.0 and found.accuracy.base.interval == (1, 1)


def test_shuffled_prompts_leave_every_answer_and_no_own_prompt(tmp_path: Path) -> None:
    evalset = evalset_of(tmp_path, PAIRS)
    shuffled = shuffled_prompts(evalset)
    prompts = {tuple(example.ids[: example.shared].tolist()) for example in evalset.examples}
    for example, own in zip(shuffled, evalset.examples, strict=True):
        assert example.ids[example.shared :].tolist() == own.ids[own.shared :].tolist()
        prompt = tuple(example.ids[: example.shared].tolist())
        assert prompt in prompts and prompt != tuple(own.ids[: own.shared].tolist())
        assert example.num_trained_tokens == own.num_trained_tokens
    starts = [tuple(example.ids[: example.shared].tolist()) for example in shuffled]
    assert starts[::2] == starts[1::2]


def test_the_loss_is_that_of_the_best_answers_alone(tmp_path: Path) -> None:
    evalset = evalset_of(tmp_path, [RANKED, *PAIRS])
    assert preferred_examples(evalset).tolist() == [True, False, False, *[True, False] * 4]
    scores = [ExampleScore(float(n), 1.0, None, None) for n in range(11)]
    figures = summarise_set(evalset, {"base": scores}, 0.95)
    assert figures.rows == 5 and figures.loss.base and figures.loss.base.value == pytest.approx((0 + 3 + 5 + 7 + 9) / 5)
    labelled = [{"prompt": "a", "completion": str(n), "label": n < 1} for n in range(2)]
    kto = evalset_of(tmp_path, labelled)
    assert (
        preferred_examples(kto).tolist() == [True, False]
        and summarise_set(kto, {"base": scores[:2]}, 0.95).pairs is None
    )


def test_a_part_of_the_test_data_has_whole_groups(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in [RANKED, *PAIRS]), encoding="utf-8")
    data = DataConfig(train={}, test={"mine": SourceConfig(path=str(path))}, cache=False, pairs="all")
    split = load_split(data, "test")
    chosen = _whole_groups(split, 3)
    of_record: dict[str, int] = {}
    for number in chosen:
        of_record[split.examples[number].where] = of_record.get(split.examples[number].where, 0) + 1
    assert len(of_record) == 3 and all(
        count == (3 if where.endswith(":1") else 2) for where, count in of_record.items()
    )
    assert _whole_groups(split, None) == list(range(11))


def test_pair_figures_are_stored_updated_and_shown(tmp_path: Path) -> None:
    evalset = evalset_of(tmp_path, PAIRS)
    before = summarise_set(evalset, {"base": [ExampleScore(float(n % 2), 1.0, None, None) for n in range(8)]}, 0.95)
    after = summarise_set(evalset, {"adapter": [ExampleScore(float(-n % 2), 1.0, None, None) for n in range(8)]}, 0.95)
    assert after.pairs is not None
    pairs = with_shuffled(after.pairs, evalset, "adapter", np.array([0.0, 1, 1, 0] * 2), 0.95)
    both = before.updated("adapter", dataclasses.replace(after, pairs=pairs))
    evaluation = Evaluation("adapter", None, 0.95, [], {}, [both], None, None)
    read = parse_evaluation(json.loads(json.dumps(to_json(evaluation))))
    assert read == evaluation and [title for title, _ in read.headlines()] == ["test loss", "pair accuracy"]
    part = next(part for part in evaluation_parts(read) if part.title == "Pairs: test")
    text = str(part.content)
    assert (
        "prompts shuffled among records" in text
        and "0.500" in text
        and "shorter answer wins is right for 1.000" in text
    )
