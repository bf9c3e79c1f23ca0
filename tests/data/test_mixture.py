"""The examples that each epoch takes of each source, and the same steps on any number of ranks."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.config.schema import DataConfig, SourceConfig, TrainerConfig
from finetune.data.harmony.render import Example
from finetune.data.packing import Mixture, epoch_sizes
from finetune.data.plan import BatchPlan


def sources(**weights: float) -> dict[str, SourceConfig]:
    return {name: SourceConfig(path="unused", weight=weight) for name, weight in weights.items()}


def examples_of(sizes: dict[str, int], seed: int = 0) -> list[Example]:
    """Examples of random lengths; the token ids name the source and the example."""
    rng = np.random.default_rng(seed)
    made = []
    for number, (name, size) in enumerate(sizes.items()):
        for index in range(size):
            ids = np.full(rng.integers(2, 40), 1000 * number + index, dtype=np.int32)
            weights = np.ones(len(ids), dtype=np.float32)
            weights[0] = 0
            made.append(Example(ids, weights, f"{name}-{index}", "x:1"))
    return made


def test_sizes_by_hand() -> None:
    assert epoch_sizes([900, 100], [1, 1], 1.0) == [900, 100]
    assert epoch_sizes([900, 100], [1, 3], 1.0) == [900, 300]
    assert epoch_sizes([900, 100], [0.5, 1], 1.0) == [450, 100]
    assert epoch_sizes([900, 100], [1, 1], 2.0) == pytest.approx([750, 250])  # 30 : 10
    assert epoch_sizes([900, 100], [1, 9], 5.0) == pytest.approx([900, 900])
    assert epoch_sizes([900, 100, 0], [1, 1, 1], 1e9) == pytest.approx([500, 500, 0])


@given(
    st.lists(st.tuples(st.integers(0, 200), st.floats(0.05, 6)), min_size=1, max_size=5),
    st.floats(0.5, 20),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None)
def test_every_example_of_a_source_equally_often(
    given_sources: list[tuple[int, float]], temperature: float, seed: int
) -> None:
    sizes = {str(number): size for number, (size, _) in enumerate(given_sources)}
    weights = {str(number): weight for number, (_, weight) in enumerate(given_sources)}
    if not any(sizes.values()):
        return
    mixture = Mixture(sizes, sources(**weights), temperature, seed)
    taken: Counter[int] = Counter()
    epochs = 4
    for epoch in range(epochs):
        taken.update(mixture.examples(epoch).tolist())
    wanted = epoch_sizes(list(sizes.values()), list(weights.values()), temperature)
    start = 0
    for size, share in zip(sizes.values(), wanted, strict=True):
        counts = [taken.pop(number, 0) for number in range(start, start + size)]
        start += size
        if size:
            assert max(counts) - min(counts) <= 1
            assert abs(sum(counts) - epochs * share) <= 1
    assert not taken, "no number outside the sources"


def test_without_weights_an_epoch_is_every_example_once() -> None:
    mixture = Mixture({"a": 5, "b": 3}, sources(a=1, b=1), 1.0, 0)
    assert mixture.examples(0).tolist() == mixture.examples(7).tolist() == list(range(8))


def plan_of(
    world_size: int = 1, rank: int = 0, gradient_accumulation_steps: int = 8, seed: int = 3, **settings: object
) -> BatchPlan:
    sizes = {"a": 120, "b": 37}
    data = dataclasses.replace(DataConfig(train=sources(a=1, b=2.5), max_length=64, mix_temperature=1.5), **settings)
    trainer = TrainerConfig(
        epochs=3, micro_batch_size=2, gradient_accumulation_steps=gradient_accumulation_steps // world_size
    )
    return BatchPlan(examples_of(sizes), data, trainer, seed, source_sizes=sizes, rank=rank, world_size=world_size)


def test_a_mixed_plan_is_random_access_and_follows_its_seed() -> None:
    plan = plan_of()
    in_order = [plan.steps(epoch) for epoch in range(3)]
    fresh = plan_of()
    assert [fresh.steps(epoch) for epoch in (2, 0, 1)] == [in_order[2], in_order[0], in_order[1]]
    assert plan_of(seed=4).steps(0) != in_order[0]
    for position in range(plan.total_steps):
        epoch, index = fresh.position(position)
        assert fresh.steps(epoch)[index] == in_order[epoch][index]
    numbers = Counter(number for step in in_order[0] for micro in step for row in micro for number in row)
    assert {number >= 120 for number, count in numbers.items() if count > 1} == {True}, "only b is repeated"
    assert set(numbers.values()) >= {1, 2}


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_any_number_of_ranks_makes_the_same_steps(world_size: int, pack: bool) -> None:
    alone = plan_of(pack=pack)
    ranks = [plan_of(world_size, rank, pack=pack) for rank in range(world_size)]
    assert {plan.total_steps for plan in ranks} == {alone.total_steps}
    for epoch in range(3):
        expected = alone.steps(epoch)
        shares = [plan.steps(epoch) for plan in ranks]
        for number, step in enumerate(expected):
            dealt = [share[number] for share in shares]
            assert len({len(steps) for steps in dealt}) == 1, "all take part in every exchange"
            in_turn = [micro for turn in zip(*dealt, strict=True) for micro in turn if micro]
            assert in_turn == step
            assert sum(not micro for steps in dealt for micro in steps) < world_size


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 60), st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_ranks_share_every_sequence_once(
    world_size: int, gradient_accumulation_steps: int, micro_batch_size: int, count: int, seed: int
) -> None:
    trainer = TrainerConfig(micro_batch_size=micro_batch_size, gradient_accumulation_steps=gradient_accumulation_steps)
    data = DataConfig(train={}, max_length=64)
    examples = examples_of({"a": count}, seed)
    plans = [BatchPlan(examples, data, trainer, seed, rank=rank, world_size=world_size) for rank in range(world_size)]
    dealt = [row for plan in plans for step in plan.steps(0) for micro in step for row in micro]
    assert sorted(dealt) == sorted(plans[0].sequences(0))
    same = {tuple(len(step) for step in plan.steps(0)) for plan in plans}
    assert len(same) == 1
    one = BatchPlan(
        examples,
        data,
        dataclasses.replace(trainer, gradient_accumulation_steps=gradient_accumulation_steps * world_size),
        seed,
    )
    assert one.steps(0) == plans[0].global_steps(0)


def test_a_rank_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 2 is not one of 2"):
        plan_of(2, 2)


def test_an_empty_micro_batch_trains_nothing() -> None:
    batch = plan_of().batch([])
    assert (batch.num_tokens, batch.weight_sum) == (0, 0.0)
    real = plan_of().batch([[0]])
    for name in ("input_ids", "weights", "positions", "segments"):
        empty, full = getattr(batch, name), getattr(real, name)
        assert (empty.dtype, empty.dim(), len(empty)) == (full.dtype, full.dim(), 1)


def test_packed_sequences_of_several_sources_leak_nothing() -> None:
    """Each segment holds one example, positions restart, and no token is predicted from another example."""
    from finetune.model.forward import shift_labels

    plan = plan_of()
    mixed_rows = 0
    for step in plan.steps(0):
        for micro_step in step:
            batch = plan.batch(micro_step)
            for row in range(len(batch.input_ids)):
                origins = set()
                for segment in range(int(batch.segments[row].max()) + 1):
                    place = batch.segments[row] == segment
                    assert len(set(batch.input_ids[row, place].tolist())) == 1, "ids name the sample"
                    assert batch.positions[row, place].tolist() == list(range(int(place.sum())))
                    origins.add(int(batch.input_ids[row, place][0]) // 1000)
                mixed_rows += len(origins) > 1
                where, targets, _ = shift_labels(
                    batch.input_ids[row : row + 1], batch.weights[row : row + 1], batch.segments[row : row + 1]
                )
                assert batch.input_ids[row, where].tolist() == targets.tolist(), "each from its own sample"
    assert mixed_rows > 10, "sources do share rows"


def test_every_pass_has_an_order_of_its_own() -> None:
    mixture = Mixture({"a": 50}, sources(a=2), 1.0, 0)
    taken = mixture.examples(0).tolist()
    assert sorted(taken[:50]) == sorted(taken[50:]) == list(range(50))
    assert taken[:50] != taken[50:]
    assert Mixture({"a": 50, "b": 50}, sources(a=2, b=2), 1.0, 0).examples(0).tolist()[100:150] != [
        n + 50 for n in taken[:50]
    ]
