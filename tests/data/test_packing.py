"""Packing loses no example, splits none, follows its seed, and leaves little room on real data."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.config.schema import DataConfig, SourceConfig
from finetune.data.dataset import load_split
from finetune.data.packing import _fullest_subset, pack, packing_efficiency

CAPACITIES_AND_LENGTHS = st.integers(1, 300).flatmap(
    lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(1, capacity), max_size=200))
)


@given(CAPACITIES_AND_LENGTHS, st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_each_example_once_and_no_sequence_too_long(case: tuple[int, list[int]], seed: int) -> None:
    capacity, lengths = case
    rows = pack(lengths, capacity, np.random.default_rng(seed))
    assert sorted(example for row in rows for example in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[example] for example in row) <= capacity for row in rows)
    assert rows == pack(lengths, capacity, np.random.default_rng(seed))


@given(st.lists(st.integers(1, 40), max_size=9), st.integers(0, 150))
@settings(max_examples=200, deadline=None)
def test_fullest_subset_equals_trying_all_subsets(lengths: list[int], room: int) -> None:
    chosen = _fullest_subset(lengths, room)
    assert len(set(chosen)) == len(chosen)
    sums = [sum(subset) for size in range(len(lengths) + 1) for subset in combinations(lengths, size)]
    assert sum(lengths[place] for place in chosen) == max(total for total in sums if total <= room)


@pytest.fixture(scope="module")
def legal_lengths() -> list[int]:
    source = SourceConfig(path="shipped://legal/cuad_clause_type.jsonl.gz", where={"split": "train"})
    return [len(example.ids) for example in load_split(DataConfig(train={"legal": source}), "train").examples]


@pytest.mark.parametrize("capacity", [2048, 4096])
def test_efficiency_on_the_legal_records(legal_lengths: list[int], capacity: int) -> None:
    assert len(legal_lengths) == 4369
    rows = pack(legal_lengths, capacity, np.random.default_rng(0))
    assert packing_efficiency(legal_lengths, rows, capacity) > 0.99
    unpacked = [[example] for example in range(len(legal_lengths))]
    assert packing_efficiency(legal_lengths, unpacked, capacity) < 0.2, "the measure tells good from bad"


def test_seeds_differ_and_sequences_mix_the_file(legal_lengths: list[int]) -> None:
    first, second = (pack(legal_lengths, 2048, np.random.default_rng(seed)) for seed in (0, 1))
    assert first != second
    means = [np.mean(row) for row in first]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.15, "row order does not follow file order"
    spread = np.std([np.mean([legal_lengths[example] for example in row]) for row in first])
    by_length = np.array_split(np.sort(legal_lengths), len(first))
    assert spread < 0.5 * np.std([np.mean(chunk) for chunk in by_length]), "rows mix lengths"


def test_an_example_that_fits_no_sequence_is_an_error_of_the_caller() -> None:
    with pytest.raises(ValueError, match="sequences take 1 to 8"):
        pack([3, 9], 8, np.random.default_rng(0))
    with pytest.raises(ValueError, match="from 0"):
        pack([3, 0], 8, np.random.default_rng(0))
    assert pack([], 8, np.random.default_rng(0)) == []
