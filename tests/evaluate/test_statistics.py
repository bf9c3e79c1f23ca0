"""Intervals, classification figures and tests, against scikit-learn, scipy, known values and simulated models."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from finetune.data.harmony.render import render_answer
from finetune.evaluate import statistics
from finetune.evaluate.labels import own_tokens
from finetune.evaluate.statistics import (
    Classification,
    bootstrap_intervals,
    bootstrap_ratio_interval,
    mcnemar,
    wilson_interval,
)
from finetune.evaluate.summary import compare_shares, with_label_figures
from finetune.figures import Comparison, Figure, McNemar, Model
from finetune.results import OneLabel, SuiteFigures

LABELS = ("a", "b", "c", "d")

# Intervals


@pytest.mark.parametrize(
    ("right", "rows", "confidence", "low", "high"),
    [
        # By hand, n = 1: the interval of 0 of n is [0, z^2 / (n + z^2)] and z = 1.959964, z^2 = 3.841459.
        (0, 1, 0.95, 0.0, 3.841459 / 4.841459),
        (0, 10, 0.95, 0.0, 3.841459 / 13.841459),
        (10, 10, 0.95, 10 / 13.841459, 1.0),
        # Half of n: 1/2 -+ z / (2 sqrt(n + z^2)); z = 1.644854 at 90 %.
        (50, 100, 0.95, 0.5 - 1.959964 / (2 * 103.841459**0.5), 0.5 + 1.959964 / (2 * 103.841459**0.5)),
        (5, 10, 0.90, 0.5 - 1.644854 / (2 * 12.705543**0.5), 0.5 + 1.644854 / (2 * 12.705543**0.5)),
        # Newcombe 1998, Statistics in Medicine 17, table I: 81 of 263 and 15 of 148 by the score method.
        (81, 263, 0.95, 0.2553, 0.3662),
        (15, 148, 0.95, 0.0624, 0.1605),
    ],
)
def test_wilson_interval_has_known_values(right: int, rows: int, confidence: float, low: float, high: float) -> None:
    assert wilson_interval(right, rows, confidence) == pytest.approx((low, high), abs=6e-5)


def test_wilson_bounds_solve_the_score_equation() -> None:
    """Its bounds are the proportions p at which the observed share lies exactly z standard errors away."""
    for right, rows in ((1, 7), (30, 300), (299, 300)):
        for p in wilson_interval(right, rows, 0.95):
            assert abs(right / rows - p) == pytest.approx(1.959964 * (p * (1 - p) / rows) ** 0.5, rel=1e-5)


def test_no_records_give_the_whole_range() -> None:
    assert wilson_interval(0, 0, 0.95) == (0.0, 1.0)


def test_bootstrap_interval_is_the_same_each_time_and_as_wide_as_theory_says() -> None:
    rng = np.random.default_rng(7)
    values, ones = rng.normal(5.0, 2.0, 400), np.ones(400)
    low, high = bootstrap_ratio_interval(values, ones, 0.95)
    assert (low, high) == bootstrap_ratio_interval(values, ones, 0.95)
    assert (low, high) != bootstrap_ratio_interval(values, ones, 0.95, seed=1)
    standard_error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * standard_error, abs=0.02)
    assert high == pytest.approx(values.mean() + 1.96 * standard_error, abs=0.02)


def test_bootstrap_keeps_numerator_and_denominator_of_a_sample_together() -> None:
    weights = np.random.default_rng(0).integers(1, 50, 200).astype(float)
    assert bootstrap_ratio_interval(3.0 * weights, weights, 0.95) == pytest.approx((3.0, 3.0))
    low, high = bootstrap_ratio_interval(3.0 * weights[::-1], weights, 0.95)
    assert high - low > 0.3


# Classification


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
    assert found.is_right.mean() == pytest.approx(accuracy_score(right, chosen))
    counted = [[((right == own) & (chosen == got)).sum() for got in range(4)] for own in range(4)]
    assert found.confusion.tolist() == counted
    everything = np.arange(len(right))
    expected = f1_score(right, chosen, average=None, labels=range(4), zero_division=np.nan)
    assert found.f1(everything) == pytest.approx(expected, nan_ok=True)
    assert np.nanmean(found.f1(everything)) == pytest.approx(f1_score(right, chosen, average="macro"))


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
    assert found.is_right.all() and found.confidence[0] == pytest.approx(1 / (1 + np.exp(0.5 - 8 / 7)))


def test_what_labels_themselves_begin_with_is_shared_too() -> None:
    assert (own_tokens(("No-Solicit", "No-Solicit Of Employees")) == [1, 3]).all()


def test_calibration_error_by_hand() -> None:
    """Four records surely chosen (0.95), three of them right; two at 0.55, one right."""
    confidence = np.array([0.95] * 4 + [0.55] * 2)
    chosen, right = np.zeros(6, dtype=int), np.array([0, 0, 0, 1, 0, 1])
    found = Classification(LABELS[:2], right, chosen, confidence)
    assert found.calibration_error(np.arange(6)) == pytest.approx(4 / 6 * 0.20 + 2 / 6 * 0.05)
    assert found.reliability() == [(2, 0.5, pytest.approx(0.55)), (4, 0.75, pytest.approx(0.95))]


def test_most_confused_pairs_are_named() -> None:
    right, chosen = np.array([0, 0, 0, 1, 2]), np.array([1, 1, 0, 0, 2])
    found = Classification(LABELS, right, chosen, np.ones(5))
    assert found.most_confused(5) == [("a", "b", 2), ("b", "a", 1)]


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (3, 3), (1, 9), (40, 12)])
def test_mcnemar_equals_the_binomial_tail(lost: int, gained: int) -> None:
    before = np.array([True] * lost + [False] * gained + [True, False])
    after = np.array([False] * lost + [True] * gained + [True, False])
    tail = sum(comb(lost + gained, k) for k in range(min(lost, gained) + 1))
    expected = min(1.0, 2 * tail / 2 ** (lost + gained))
    found = mcnemar(before, after)
    assert (found.lost, found.gained, found.p_value) == (lost, gained, pytest.approx(expected))


def test_pairing_makes_a_steady_difference_certain() -> None:
    """Rows differ far more from each other than the two models do; unpaired, nothing could be said."""
    rng = np.random.default_rng(0)
    before = rng.normal(10, 5, size=200)
    low, high = bootstrap_ratio_interval(-0.1 + rng.normal(0, 0.1, 200), np.ones(200), 0.95)
    assert -0.13 < low < -0.1 < high < -0.07
    shuffled = rng.permutation(before)
    low, high = bootstrap_ratio_interval(shuffled - 0.1 - before, np.ones(200), 0.95)
    assert low < -0.5 and high > 0.3


# Figures of both models


def figures_of(found: dict[Model, Classification], confidence: float) -> SuiteFigures:
    """Figures of labels alone."""
    empty = SuiteFigures("test", len(found["base"].right), len(found["base"].right), Comparison(), Comparison())
    return with_label_figures(empty, found, confidence)


def models(num_rows: int, seed: int = 0) -> dict[Model, Classification]:
    """A weak and a strong model on the same examples; label d is never right."""
    rng = np.random.default_rng(seed)
    right = rng.integers(3, size=num_rows)
    found: dict[Model, Classification] = {}
    strengths: dict[Model, float] = {"base": 0.5, "adapter": 2.0}
    for who, strength in strengths.items():
        scores = rng.normal(size=(num_rows, 4)) - 10
        scores[np.arange(num_rows), right] += strength
        found[who] = Classification.of(LABELS, scores, right)
    return found


def drawn_rows(num_rows: int, count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(num_rows, size=num_rows) for _ in range(count)]


def test_macro_f1_and_its_intervals_equal_scikit_learn_on_every_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "NUM_RESAMPLES", 60)
    found = models(80)
    got = figures_of(found, 0.9).macro_f1
    assert got is not None
    draws = drawn_rows(80, 60)
    macro: dict[str, list[float]] = {
        who: [f1_score(each.right[rows], each.chosen[rows], average="macro") for rows in draws]
        for who, each in found.items()
    }
    macro["difference"] = [after - before for before, after in zip(macro["base"], macro["adapter"], strict=True)]
    for who, values in macro.items():
        assert getattr(got, who).interval == pytest.approx(np.quantile(values, [0.05, 0.95]).tolist())
    for who, each in found.items():
        assert getattr(got, who).value == pytest.approx(f1_score(each.right, each.chosen, average="macro"))
    assert got.difference and got.difference.interval
    assert got.difference.interval[0] > 0  # the strong model is better, and it shows


def test_each_labels_figures_equal_scikit_learn() -> None:
    found = models(150, seed=1)
    got = figures_of(found, 0.95).per_label
    assert got is not None
    for model, each in found.items():
        for name, score in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
            expected = score(each.right, each.chosen, average=None, labels=range(4), zero_division=np.nan)
            for label, value in zip(got, expected, strict=True):
                figure = getattr(label.of(model), name)
                assert figure is None if np.isnan(value) else figure.value == pytest.approx(value)
        hits = int(((each.right == 0) & (each.chosen == 0)).sum())
        recall = got[0].of(model).recall
        expected_ends = binomtest(hits, got[0].rows).proportion_ci(0.95, method="wilson")
        assert recall and recall.interval == pytest.approx(tuple(expected_ends), abs=1e-9)
    assert [label.rows for label in got] == np.bincount(found["base"].right, minlength=4).tolist()
    never = got[3]
    assert never.rows == 0 and never.base.recall is None and never.base.f1 and never.base.f1.value == 0


def test_a_label_neither_right_nor_chosen_has_no_figures() -> None:
    right = np.array([0, 1, 0, 1])
    same = Classification(("a", "b", "c"), right, np.array([0, 1, 1, 1]), np.full(4, 0.9))
    labels = figures_of({"base": same, "adapter": same}, 0.95).per_label
    assert labels and labels[2].base == OneLabel(chosen=0, precision=None, recall=None, f1=None)


def test_calibration_error_by_hand_and_its_bins_with_wilson() -> None:
    """Four records surely chosen (0.95), three of them right; two at 0.55, one right."""
    right, confidence = np.array([0, 0, 0, 1, 0, 1]), np.array([0.95] * 4 + [0.55] * 2)
    sure = Classification(("a", "b"), right, np.zeros(6, dtype=int), confidence)
    unsure = Classification(("a", "b"), right, np.zeros(6, dtype=int), np.full(6, 4 / 6))
    got = figures_of({"base": sure, "adapter": unsure}, 0.95)
    error = got.calibration_error
    assert error and error.base and error.adapter and error.difference and got.reliability
    assert error.base.value == pytest.approx(4 / 6 * 0.20 + 2 / 6 * 0.05)
    assert error.adapter.value == pytest.approx(0, abs=1e-12)
    assert error.difference.value == pytest.approx(-error.base.value)
    assert got.reliability["base"][1] == (4, 0.75, pytest.approx(0.95), *wilson_interval(3, 4, 0.95))


def test_reflected_intervals_find_a_calibrated_models_zero() -> None:
    """Every draw adds chance to a calibration error: plain percentiles lie above the truth of a model that has none."""
    rng = np.random.default_rng(0)
    covered = {"percentile": 0, "reflected": 0}
    for _ in range(25):
        confidence = rng.uniform(0.4, 1, size=60)
        right = rng.random(60) < confidence
        gaps, bins = right - confidence, (confidence * 10).astype(int).clip(max=9)

        def error(rows: np.ndarray, gaps: np.ndarray = gaps, bins: np.ndarray = bins) -> np.ndarray:
            return np.array([np.abs(np.bincount(bins[rows], weights=gaps[rows])).sum() / len(rows)])

        for kind in covered:
            low, high = bootstrap_intervals(error, 60, 0.95, kind=kind)[0]  # type: ignore[arg-type]
            covered[kind] += max(low, 0.0) <= 0 <= high
    assert covered["percentile"] == 0 and covered["reflected"] >= 10


def test_resamples_without_a_value_are_left_out() -> None:
    values = np.array([np.nan, 1.0, 2.0, np.nan])

    def figures(rows: np.ndarray) -> np.ndarray:
        known = values[rows][~np.isnan(values[rows])]
        return np.array([known.mean() if len(known) else np.nan, np.nan])

    ends = bootstrap_intervals(figures, 4, 0.95)
    assert ends[0].tolist() == [1.0, 2.0] and np.isnan(ends[1]).all()


def test_shares_are_paired_and_tested() -> None:
    before, after = np.array([True] * 5 + [False] * 15), np.array([False] + [True] * 16 + [False] * 3)
    got = compare_shares({"base": before, "adapter": after}, 0.95)
    assert got.base == Figure(0.25, wilson_interval(5, 20, 0.95))
    assert got.difference and got.difference.interval
    assert got.difference.value == pytest.approx(0.55) and got.difference.interval[0] > 0.2
    assert got.mcnemar == McNemar(1, 12, pytest.approx(binomtest(1, 13).pvalue))
    assert compare_shares({"base": before}, 0.95) == Comparison(got.base)


def test_one_record_has_no_interval_except_for_shares() -> None:
    found = models(1)
    got = figures_of(found, 0.95)
    for figures in (got.macro_f1, got.calibration_error):
        assert figures and figures.base and figures.adapter and figures.difference
        assert figures.base.interval is figures.adapter.interval is figures.difference.interval is None
    shares = compare_shares({model: each.is_right for model, each in found.items()}, 0.95)
    assert shares.difference and shares.base
    assert shares.difference.interval is None and shares.base.interval is not None
    macro_f1 = figures_of(models(2), 0.95).macro_f1
    assert macro_f1 and macro_f1.base and macro_f1.base.interval is not None
