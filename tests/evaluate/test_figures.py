"""Figures with intervals, against scikit-learn row by row and against simulated models whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import f1_score, precision_score, recall_score

from finetune.evaluate import statistics as intervals
from finetune.evaluate.statistics import Classification, bootstrap_intervals, wilson_interval
from finetune.evaluate.summary import compared_shares, label_figures, share_intervals

LABELS = ("a", "b", "c", "d")


def models(num_rows: int, seed: int = 0) -> dict[str, Classification]:
    """A weak and a strong model on the same rows; label d never stands."""
    rng = np.random.default_rng(seed)
    right = rng.integers(3, size=num_rows)
    found = {}
    for who, strength in (("base", 0.5), ("adapter", 2.0)):
        scores = rng.normal(size=(num_rows, 4)) - 10
        scores[np.arange(num_rows), right] += strength
        found[who] = Classification.of(LABELS, scores, right)
    return found


def drawn_rows(num_rows: int, count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(num_rows, size=num_rows) for _ in range(count)]


def test_macro_f1_and_its_intervals_equal_scikit_learn_on_every_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "NUM_RESAMPLES", 60)
    found = models(80)
    got = label_figures(found, 0.9)["macro_f1"]
    draws = drawn_rows(80, 60)
    macro = {
        who: [f1_score(each.right[rows], each.chosen[rows], average="macro") for rows in draws]
        for who, each in found.items()
    }
    macro["difference"] = [after - before for before, after in zip(macro["base"], macro["adapter"], strict=True)]
    for who, values in macro.items():
        assert got[who]["interval"] == pytest.approx(np.quantile(values, [0.05, 0.95]).tolist())
    for who, each in found.items():
        assert got[who]["value"] == pytest.approx(f1_score(each.right, each.chosen, average="macro"))
    assert got["difference"]["interval"][0] > 0  # the strong model is better, and it shows


def test_each_labels_figures_equal_scikit_learn() -> None:
    found = models(150, seed=1)
    got = label_figures(found, 0.95)
    for who, each in found.items():
        for name, score in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
            expected = score(each.right, each.chosen, average=None, labels=range(4), zero_division=np.nan)
            for label, value in zip(got["per_label"], expected, strict=True):
                figure = label[who][name]
                assert figure is None if np.isnan(value) else figure["value"] == pytest.approx(value)
        hits = int(((each.right == 0) & (each.chosen == 0)).sum())
        rows = got["per_label"][0]["rows"]
        expected_ends = binomtest(hits, rows).proportion_ci(0.95, method="wilson")
        assert got["per_label"][0][who]["recall"]["interval"] == pytest.approx(list(expected_ends), abs=1e-9)
    assert [label["rows"] for label in got["per_label"]] == np.bincount(found["base"].right, minlength=4).tolist()
    never = got["per_label"][3]
    assert never["rows"] == 0 and never["base"]["recall"] is None and never["base"]["f1"]["value"] == 0


def test_a_label_without_rows_that_nobody_chose_has_no_figures() -> None:
    right = np.array([0, 1, 0, 1])
    same = Classification(("a", "b", "c"), right, np.array([0, 1, 1, 1]), np.full(4, 0.9))
    third = label_figures({"base": same, "adapter": same}, 0.95)["per_label"][2]
    assert third["base"] == {"chosen": 0, "precision": None, "recall": None, "f1": None}


def test_calibration_error_by_hand_and_its_bins_with_wilson() -> None:
    """Four records surely chosen (0.95), three of them right; two at 0.55, one right."""
    right, confidence = np.array([0, 0, 0, 1, 0, 1]), np.array([0.95] * 4 + [0.55] * 2)
    sure = Classification(("a", "b"), right, np.zeros(6, dtype=int), confidence)
    unsure = Classification(("a", "b"), right, np.zeros(6, dtype=int), np.full(6, 4 / 6))
    got = label_figures({"base": sure, "adapter": unsure}, 0.95)
    error = got["calibration_error"]
    assert error["base"]["value"] == pytest.approx(4 / 6 * 0.20 + 2 / 6 * 0.05)
    assert error["adapter"]["value"] == pytest.approx(0, abs=1e-12)
    assert error["difference"]["value"] == pytest.approx(-error["base"]["value"])
    assert got["reliability"]["base"][1] == [4, 0.75, pytest.approx(0.95), *wilson_interval(3, 4, 0.95)]


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


def test_draws_that_say_nothing_are_passed_over() -> None:
    values = np.array([np.nan, 1.0, 2.0, np.nan])

    def figures(rows: np.ndarray) -> np.ndarray:
        known = values[rows][~np.isnan(values[rows])]
        return np.array([known.mean() if len(known) else np.nan, np.nan])

    ends = bootstrap_intervals(figures, 4, 0.95)
    assert ends[0].tolist() == [1.0, 2.0] and np.isnan(ends[1]).all()


def test_shares_are_paired_and_tested() -> None:
    before, after = np.array([True] * 5 + [False] * 15), np.array([False] + [True] * 16 + [False] * 3)
    got = compared_shares({"base": before, "adapter": after}, 0.95)
    assert got["base"] == {"value": 0.25, "interval": list(wilson_interval(5, 20, 0.95))}
    assert got["difference"]["value"] == pytest.approx(0.55) and got["difference"]["interval"][0] > 0.2
    assert got["mcnemar"] == {"lost": 1, "gained": 12, "p_value": pytest.approx(binomtest(1, 13).pvalue)}
    assert share_intervals({"cut": [True, False, False]}, 0.9) == {"cut": list(wilson_interval(1, 3, 0.9))}


def test_one_row_has_no_interval_but_that_of_a_share() -> None:
    found = models(1)
    got = label_figures(found, 0.95)
    for name in ("macro_f1", "calibration_error"):
        assert [got[name][who]["interval"] for who in ("base", "adapter", "difference")] == [None] * 3
    shares = compared_shares({who: each.is_right for who, each in found.items()}, 0.95)
    assert shares["difference"]["interval"] is None and shares["base"]["interval"] is not None
    assert label_figures(models(2), 0.95)["macro_f1"]["base"]["interval"] is not None
