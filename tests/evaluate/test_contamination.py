"""Test records seen in training, on made-up texts with and without common wording."""

from __future__ import annotations

import pytest

from finetune.evaluate.contamination import WORDS, find_contamination


def sentence(number: int, length: int = 30) -> str:
    return " ".join(f"w{number}x{place}" for place in range(length))


def test_contamination_counts_seen_records_and_ignores_common_wording() -> None:
    instruction = sentence(10**6, 20)
    train = [f"{instruction} {sentence(number)}" for number in range(200)]
    test = [
        f"{instruction} {sentence(3)}",  # a training row
        f"{instruction} {sentence(999)}",  # only the instruction is shared
        f"{sentence(5, 14)} {sentence(998)}",  # a short piece of one
        "too short",
    ]
    found = find_contamination(train, test)
    assert found.seen == (True, False, False, False)
    assert found.shares[0] == 1 and found.shares[1] == 0 and 0 < found.shares[2] < 0.2
    assert found.too_short == 1
    assert len(sentence(5, 14).split()) - WORDS + 1 == 2


@pytest.mark.parametrize("times", [1, 5, 6, 20])
def test_a_test_record_repeated_in_training_is_seen(times: int) -> None:
    train = [sentence(number) for number in range(100)]
    near = f"{sentence(999)} another end"  # no copy, but all its runs are there
    found = find_contamination([*train, *[sentence(999).upper()] * times], [sentence(999), near, sentence(998)])
    assert found.seen == (True, True, False) and found.copies == 1 and found.too_short == 0


def test_short_copies_are_seen_and_other_short_records_are_too_short() -> None:
    train = ["Is it so?\nYes", *(sentence(number) for number in range(100))]
    found = find_contamination(train, ["is it  SO?\nyes", "Is it so?\nNo"])
    assert found.shares == (1.0, 0.0) and (found.copies, found.too_short) == (1, 1)


def test_word_runs_that_begin_in_the_instruction_do_not_count() -> None:
    """Records begin alike after the instruction: straddling word runs occur in training, but identify no record."""
    instruction = sentence(10**6, 40)
    train = [f"{instruction} opening{number % 10} words{number % 10} {sentence(number)}" for number in range(200)]
    test = [
        f"{instruction} opening3 words3 {sentence(999)}",  # 12 runs straddle: "... opening3", "... opening3 words3"
        f"{instruction} opening3 words3 {sentence(998, 15)}",
        f"{instruction} other start {sentence(5, 20)}",  # 8 of its own 10 runs, though 12 straddling ones are new
    ]
    found = find_contamination(train, test)
    assert found.shares == (0.0, 0.0, pytest.approx(0.8)) and found.too_short == 0
    assert found.seen == (False, False, True)


def test_a_frequent_opening_masks_itself_and_nothing_behind_it() -> None:
    """Words that a tenth of the records begin with are common, but no part of the instruction before them."""
    instruction, opening = sentence(10**6, 20), sentence(10**7, 6)
    train = [f"{instruction} {opening if number % 10 == 0 else ''} {sentence(number, 16)}" for number in range(200)]
    found = find_contamination(train, [f"{instruction} {opening} {sentence(20, 16)} and more"])
    # 24 own words, 12 own runs: 10 of them stand in row 20.
    assert found.shares == (pytest.approx(10 / 12),) and found.copies == 0
