"""Batches lay examples side by side without mixing them, and the plan gives every sequence to one step of its epoch."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from finetune.config.schema import DataConfig, SourceConfig, TrainerConfig
from finetune.data.batches import collate
from finetune.data.dataset import load_split
from finetune.data.harmony.render import Example
from finetune.data.plan import BatchPlan

PAD = 199_999
SOURCE = SourceConfig(path="shipped://legal/cuad_clause_type.jsonl.gz", where={"split": "val"}, limit=300)
CONFIG = DataConfig(train={"legal": SOURCE}, max_length=2048)
TRAINER = TrainerConfig(epochs=3, micro_batch_size=2, gradient_accumulation_steps=4)


@pytest.fixture(scope="module")
def examples() -> tuple[Example, ...]:
    return load_split(CONFIG, "train").examples


def example(name: str, *ids: int) -> Example:
    weights = np.array([0.0] + [0.5] * (len(ids) - 1), dtype=np.float32)
    return Example(np.array(ids, dtype=np.int32), weights, name, f"file:{name}")


def test_collate_by_hand() -> None:
    batch = collate([[example("a", 1, 2, 3), example("b", 4, 5)], [example("c", 6, 7, 8, 9, 10, 11, 12, 13, 14)]])
    assert batch.input_ids.tolist() == [
        [1, 2, 3, 4, 5] + [PAD] * 11,
        [6, 7, 8, 9, 10, 11, 12, 13, 14] + [PAD] * 7,
    ]
    assert batch.weights.tolist() == [[0, 0.5, 0.5, 0, 0.5] + [0] * 11, [0] + [0.5] * 8 + [0] * 7]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, *range(11)], [*range(9), *range(7)]]
    assert batch.segments.tolist() == [[0, 0, 0, 1, 1] + [-1] * 11, [0] * 9 + [-1] * 7]
    assert batch.example_ids == (("a", "b"), ("c",))
    assert (batch.num_tokens, batch.weight_sum) == (14, 5.5)
    assert batch.weights.dtype == torch.float32
    assert {batch.input_ids.dtype, batch.positions.dtype, batch.segments.dtype} == {torch.int64}
    assert batch.to("cpu").input_ids.equal(batch.input_ids)


def test_a_full_sequence_gets_no_padding() -> None:
    batch = collate([[example("a", *range(1, 9))]], pad_id=0)
    assert batch.input_ids.shape == (1, 8)
    assert collate([[example("a", *range(1, 10))]], pad_id=0).input_ids[0, 9:].tolist() == [0] * 7


def test_collate_refuses_what_would_train_across_examples() -> None:
    leaking = dataclasses.replace(example("a", 1, 2), weights=np.ones(2, dtype=np.float32))
    with pytest.raises(ValueError, match="first token"):
        collate([[example("b", 3, 4), leaking]])
    with pytest.raises(ValueError, match="at least one sequence"):
        collate([])
    with pytest.raises(ValueError, match="at least one sequence"):
        collate([[example("a", 1, 2)], []])


def test_examples_are_recovered_from_real_batches(examples: tuple[Example, ...]) -> None:
    plan = BatchPlan(examples, CONFIG, TRAINER, seed=0)
    by_id = {example.id: example for example in examples}
    seen = []
    for step in plan.steps(0):
        for micro_step in step:
            batch = plan.batch(micro_step)
            assert batch.input_ids.shape[1] % 8 == 0 and batch.input_ids.shape[1] <= CONFIG.max_length
            for row, names in enumerate(batch.example_ids):
                for segment, name in enumerate(names):
                    place = batch.segments[row] == segment
                    assert batch.input_ids[row, place].tolist() == by_id[name].ids.tolist()
                    assert batch.weights[row, place].tolist() == by_id[name].weights.tolist()
                    assert batch.positions[row, place].tolist() == list(range(len(by_id[name].ids)))
                    seen.append(name)
                padding = batch.segments[row] == -1
                assert not batch.weights[row, padding].any()
                assert (batch.input_ids[row, padding] == PAD).all()
    assert sorted(seen) == sorted(by_id)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("micro_batch_size, gradient_accumulation_steps", [(1, 1), (1, 8), (3, 4), (1000, 8)])
def test_steps_take_every_sequence_once(
    examples: tuple[Example, ...], pack: bool, micro_batch_size: int, gradient_accumulation_steps: int
) -> None:
    trainer = dataclasses.replace(
        TRAINER, micro_batch_size=micro_batch_size, gradient_accumulation_steps=gradient_accumulation_steps
    )
    plan = BatchPlan(examples, dataclasses.replace(CONFIG, pack=pack), trainer, seed=0)
    steps = plan.steps(1)
    assert [row for step in steps for micro_step in step for row in micro_step] == plan.sequences(1)
    assert sorted(number for row in plan.sequences(1) for number in row) == list(range(len(examples)))
    assert (
        all(len(step) == gradient_accumulation_steps for step in steps[:-1])
        and 1 <= len(steps[-1]) <= gradient_accumulation_steps
    )
    micro = [micro_step for step in steps for micro_step in step]
    assert all(len(rows) == micro_batch_size for rows in micro[:-1]) and 1 <= len(micro[-1]) <= micro_batch_size
    if not pack:
        assert all(len(row) == 1 for row in plan.sequences(1))


def test_the_plan_is_random_access(examples: tuple[Example, ...]) -> None:
    """A resumed run asks first for the step that an uninterrupted run asks for last."""
    plan = BatchPlan(examples, CONFIG, TRAINER, seed=5)
    in_order = [plan.steps(epoch) for epoch in range(3)]
    fresh = BatchPlan(examples, CONFIG, TRAINER, seed=5)
    assert [fresh.steps(epoch) for epoch in (2, 0, 1)] == [in_order[2], in_order[0], in_order[1]]
    assert in_order[0] != in_order[1]
    assert BatchPlan(examples, CONFIG, TRAINER, seed=6).steps(0) != in_order[0]
    flat = [(epoch, index) for epoch, steps in enumerate(in_order) for index in range(len(steps))]
    assert plan.total_steps == len(flat)
    assert [plan.position(step) for step in range(plan.total_steps)] == flat
    assert plan.position(plan.total_steps) == (3, 0)
    for step in (-1, plan.total_steps + 1):
        with pytest.raises(ValueError, match="is not from 0 to"):
            plan.position(step)


@pytest.mark.parametrize(
    "epochs, max_steps, expected",
    [(1, None, (38,)), (2.5, None, (38, 38, 19)), (0.1, None, (4,)), (2, 40, (38, 2)), (5, 38, (38,)), (1, 99, (38,))],
)
def test_epochs_and_max_steps(
    examples: tuple[Example, ...], epochs: float, max_steps: int | None, expected: tuple[int, ...]
) -> None:
    trainer = dataclasses.replace(TRAINER, epochs=epochs, max_steps=max_steps)
    plan = BatchPlan(examples, dataclasses.replace(CONFIG, pack=False), trainer, seed=0)
    assert math.ceil(300 / 8) == 38
    assert plan.steps_per_epoch == expected
    assert plan.total_steps == sum(expected)


def test_epochs_that_max_steps_leaves_out_are_not_packed(
    examples: tuple[Example, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed: list[int] = []
    rows = BatchPlan.sequences
    monkeypatch.setattr(BatchPlan, "sequences", lambda self, epoch: packed.append(epoch) or rows(self, epoch))
    trainer = dataclasses.replace(TRAINER, epochs=50, max_steps=40)
    plan = BatchPlan(examples, dataclasses.replace(CONFIG, pack=False), trainer, seed=0)
    assert plan.total_steps == 40 and packed == [0, 1]
