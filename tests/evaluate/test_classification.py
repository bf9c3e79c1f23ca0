"""Label metrics against scikit-learn and scipy; prose and contamination against hand-made cases."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from sklearn.naive_bayes import MultinomialNB

from finetune.data.harmony.render import render_answer
from finetune.evaluate.contamination import WORDS, find_contamination
from finetune.evaluate.labels import own_tokens
from finetune.evaluate.prose import AuthorClassifier, TrainingText, distinctness
from finetune.evaluate.statistics import Classification, mcnemar, paired_ratio_interval

LABELS = ("a", "b", "c", "d")


@pytest.fixture(scope="module", params=range(3))
def scored(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray]:
    """Noisy scores of 200 records; label d is never the right one."""
    rng = np.random.default_rng(request.param)
    right = rng.integers(3, size=200)
    scores = rng.normal(size=(200, 4)) * 2 - 10
    scores[np.arange(200), right] += 1.5
    return scores, right


def test_figures_equal_scikit_learn(scored: tuple[np.ndarray, np.ndarray]) -> None:
    scores, right = scored
    found = Classification.of(LABELS, scores, right)
    chosen = scores.argmax(1)
    assert found.accuracy == pytest.approx(accuracy_score(right, chosen))
    assert found.macro_f1 == pytest.approx(f1_score(right, chosen, average="macro"))
    assert (found.confusion == confusion_matrix(right, chosen, labels=range(4))).all()
    assert found.f1 == pytest.approx(f1_score(right, chosen, average=None, labels=range(4), zero_division=0))


def test_length_normalised_scores_choose_by_token(scored: tuple[np.ndarray, np.ndarray]) -> None:
    scores, right = scored
    lengths, header = np.array([1, 2, 3, 6]), np.linspace(-40, 0, len(right))
    found = Classification.of(LABELS, scores + header[:, None], right, (header, lengths))
    assert (found.chosen == (scores / lengths).argmax(1)).all()
    assert (found.chosen != scores.argmax(1)).any()


@pytest.mark.parametrize("header", [0.0, -1.0, -12.0, -40.0])
def test_an_unlikely_header_does_not_choose_the_longer_label(header: float) -> None:
    """Own nats -1 and -8: per token -0.5 and -1.1, whatever the header before both costs."""
    labels = ("Insurance", "No-Solicit Of Employees")
    header_length = 3  # <|channel|>final<|message|>
    whole = np.array([len(render_answer(label)) for label in labels])
    assert (own_tokens(labels) == whole - header_length).all() and (own_tokens(labels) == [2, 7]).all()
    nats, shared = np.array([[-1.0, -8.0]]) + header, np.array([header])
    found = Classification.of(labels, nats, np.array([0]), (shared, own_tokens(labels)))
    assert found.accuracy == 1 and found.confidence[0] == pytest.approx(1 / (1 + np.exp(0.5 - 8 / 7)))


def test_what_labels_themselves_begin_with_is_shared_too() -> None:
    assert (own_tokens(("No-Solicit", "No-Solicit Of Employees")) == [1, 3]).all()


def test_calibration_error_by_hand() -> None:
    """Four records surely chosen (0.95), three of them right; two at 0.55, one right."""
    confidence = np.array([0.95] * 4 + [0.55] * 2)
    chosen, right = np.zeros(6, dtype=int), np.array([0, 0, 0, 1, 0, 1])
    found = Classification(LABELS[:2], right, chosen, confidence)
    assert found.calibration_error == pytest.approx(4 / 6 * 0.20 + 2 / 6 * 0.05)
    assert found.reliability() == [(2, 0.5, pytest.approx(0.55)), (4, 0.75, pytest.approx(0.95))]


def test_most_confused_pairs_are_named() -> None:
    right, chosen = np.array([0, 0, 0, 1, 2]), np.array([1, 1, 0, 0, 2])
    found = Classification(LABELS, right, chosen, np.ones(5))
    assert found.most_confused(5) == [("a", "b", 2), ("b", "a", 1)]


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (3, 3), (1, 9), (40, 12)])
def test_mcnemar_equals_the_binomial_test(lost: int, gained: int) -> None:
    before = np.array([True] * lost + [False] * gained + [True, False])
    after = np.array([False] * lost + [True] * gained + [True, False])
    expected = binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert mcnemar(before, after) == (lost, gained, pytest.approx(expected))


def test_pairing_makes_a_steady_difference_certain() -> None:
    """Rows differ far more from each other than the two models do; unpaired, nothing could be said."""
    rng = np.random.default_rng(0)
    before = rng.normal(10, 5, size=200)
    low, high = paired_ratio_interval(before, before - 0.1 + rng.normal(0, 0.1, 200), np.ones(200), 0.95)
    assert -0.13 < low < -0.1 < high < -0.07
    shuffled = rng.permutation(before)
    low, high = paired_ratio_interval(before, shuffled - 0.1, np.ones(200), 0.95)
    assert low < -0.5 and high > 0.3


def sentence(number: int, length: int = 30) -> str:
    return " ".join(f"w{number}x{place}" for place in range(length))


def test_contamination_counts_seen_rows_and_passes_over_common_wording() -> None:
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
def test_a_test_row_that_stands_often_in_training_is_seen(times: int) -> None:
    train = [sentence(number) for number in range(100)]
    near = f"{sentence(999)} another end"  # no copy, but all its runs are there
    found = find_contamination([*train, *[sentence(999).upper()] * times], [sentence(999), near, sentence(998)])
    assert found.seen == (True, True, False) and found.copies == 1 and found.too_short == 0


def test_short_copies_are_seen_and_other_short_rows_are_too_short() -> None:
    train = ["Is it so?\nYes", *(sentence(number) for number in range(100))]
    found = find_contamination(train, ["is it  SO?\nyes", "Is it so?\nNo"])
    assert found.shares == (1.0, 0.0) and (found.copies, found.too_short) == (1, 1)


def test_runs_from_instruction_into_a_row_are_not_the_rows_own() -> None:
    """Rows begin alike after the instruction: straddling runs stand in training, and tell of no row."""
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
    """Words that a tenth of the rows begin with are common, but no part of the instruction before them."""
    instruction, opening = sentence(10**6, 20), sentence(10**7, 6)
    train = [f"{instruction} {opening if number % 10 == 0 else ''} {sentence(number, 16)}" for number in range(200)]
    found = find_contamination(train, [f"{instruction} {opening} {sentence(20, 16)} and more"])
    # 24 own words, 12 own runs: 10 of them stand in row 20.
    assert found.shares == (pytest.approx(10 / 12),) and found.copies == 0


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


def test_author_classifier_equals_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    texts = [" ".join(f"v{rng.integers(40 * (n % 3 + 1))}" for _ in range(30)) for n in range(60)]
    authors = [f"author {n % 3}" for n in range(54)] + ["author 2"] * 6  # not evenly many
    ours = AuthorClassifier(texts[:45], authors[:45])
    vocabulary = sorted({word for text in texts[:45] for word in text.split()})

    def counts(text: str) -> list[int]:
        return [text.split().count(word) for word in vocabulary]

    theirs = MultinomialNB(fit_prior=False).fit([counts(text) for text in texts[:45]], authors[:45])
    expected = theirs.predict([counts(text) for text in texts[45:]])
    assert [ours.classify(text) for text in texts[45:]] == expected.tolist()
    assert len(set(expected)) > 1


def test_a_text_without_known_words_has_no_author() -> None:
    """With the texts' shares as prior it would be the voice of whoever wrote most."""
    classifier = AuthorClassifier(["red green"] * 9 + ["blue grey"], ["many"] * 9 + ["few"])
    assert [classifier.classify(text) for text in ("", "!?", "yellow")] == [None] * 3
    assert [classifier.classify(text) for text in ("green", "blue")] == ["many", "few"]
