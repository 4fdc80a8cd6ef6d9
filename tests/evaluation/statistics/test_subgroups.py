"""Subgroups with their counts, calibration curves, and the corrected brain-age gap."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.calibration import calibration_curve as curve_of_sklearn

from evaluation.statistics.brain_age import BiasLine, corrected_gaps
from evaluation.statistics.metrics import auc, mae, with_interval
from evaluation.statistics.subgroups import age_bands, calibration_curve, subgroup_table, wilson


def test_age_bands():
    found = age_bands(np.array([0, 19.9, 20, 59.99, 80, np.nan, 130]))
    assert found.tolist() == ["0-19", "0-19", "20-39", "40-59", "80-119", "", ""]


def test_each_subgroup_has_its_metric_and_small_ones_the_reason_why_not():
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(100), 2)
    labels = (np.arange(100) % 2)[groups]
    answers = generator.normal(size=200) + labels
    sex = np.array(["F", "M"])[(np.arange(100) // 2 % 2)][groups]
    site = np.where(groups < 60, "a", np.where(groups < 75, "b", "c"))
    labels[site == "c"] = 1
    labels[groups == 99] = 0
    other = np.where(groups < 50, "x", "")
    table = subgroup_table(auc, labels, answers, groups, {"sex": sex, "site": site, "other": other}, classes=True)
    assert table["group"].tolist() == ["F", "M", "a", "b", "c", "x"]
    women = table.iloc[0]
    assert (women["participants"], women["scans"], women["note"]) == (50, 100, "")
    members = sex == "F"
    assert tuple(women[["value", "low", "high"]]) == with_interval(
        auc, labels[members], answers[members], groups[members]
    )
    assert table["note"].tolist()[3:5] == ["fewer than 20 participants", "a class with fewer than 5 participants"]
    assert table["value"].isna().tolist() == [False, False, False, True, True, False]
    ages = subgroup_table(mae, answers, answers + 1, groups, {"sex": sex}, classes=False, minimum=51)
    assert ages["note"].tolist() == ["fewer than 51 participants"] * 2


def test_calibration_curve_equals_scikit_learn_and_its_bins_contain_all_scans():
    generator = np.random.default_rng(1)
    probabilities = generator.random(500)
    labels = (generator.random(500) < probabilities).astype(int)
    found = calibration_curve(labels, probabilities, np.arange(500))
    observed, predicted = curve_of_sklearn(labels, probabilities, n_bins=10, strategy="quantile")
    assert found["observed"].to_numpy() == pytest.approx(observed)
    assert found["predicted"].to_numpy() == pytest.approx(predicted)
    assert found["scans"].sum() == 500
    inside = (found["low"] <= found["predicted"]) & (found["predicted"] <= found["high"])
    assert inside.sum() >= 8  # calibrated by construction
    twice = calibration_curve(np.tile(labels, 2), np.tile(probabilities, 2), np.tile(np.arange(500), 2))
    assert twice[["low", "high"]].to_numpy() == pytest.approx(found[["low", "high"]].to_numpy())
    assert len(calibration_curve(labels, np.full(500, 0.3), np.arange(500))) == 1


def test_wilson_on_the_examples_of_newcombe():
    """Statistics in Medicine 17 (1998), Table I, score method without continuity correction."""
    for positive, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert wilson(positive / count, count) == pytest.approx((low, high), abs=5e-5)


def brain_ages(seed, count=400):
    generator = np.random.default_rng(seed)
    ages = generator.uniform(20, 80, count)
    return ages, 0.6 * ages + 20 + generator.normal(size=count) * 4


def test_both_published_corrections_agree_and_make_the_gap_independent_of_age():
    ages, predicted = brain_ages(0)
    train, test = np.arange(400) < 200, np.arange(400) >= 200
    line = BiasLine.fit(ages[train], predicted[train])
    assert (line.slope, line.intercept) == pytest.approx((0.6, 20), abs=2.5)
    # Beheshti et al. fit a line to the gap over age and subtract it.
    slope, offset = np.polyfit(ages[train], predicted[train] - ages[train], 1)
    beheshti = predicted[test] - ages[test] - (slope * ages[test] + offset)
    gap = line.gap(ages[test], predicted[test])
    assert gap == pytest.approx(beheshti, abs=1e-9)
    assert abs(np.corrcoef(gap, ages[test])[0, 1]) < 0.15
    assert np.corrcoef(predicted[test] - ages[test], ages[test])[0, 1] < -0.7
    with pytest.raises(ValueError, match="2 ages without a range"):
        BiasLine.fit(np.array([30.0, 30.0]), np.array([1.0, 2.0]))


def test_the_correction_of_a_fold_is_fitted_outside_it():
    ages, predicted = brain_ages(1, 100)
    groups, folds = np.repeat(np.arange(50), 2), np.repeat(np.arange(50) % 5, 2)
    gaps = corrected_gaps(ages, predicted, folds, groups)
    changed = predicted.copy()
    changed[folds == 2] += 30
    again = corrected_gaps(ages, changed, folds, groups)
    assert again[folds == 2] - gaps[folds == 2] == pytest.approx(30)  # the line of fold 2 did not change
    assert np.abs(again[folds != 2] - gaps[folds != 2]).min() > 1
    healthy = folds != 3
    for fold in range(5):
        train = (folds != fold) & healthy
        line = BiasLine.fit(ages[train], predicted[train])
        members = folds == fold
        found = corrected_gaps(ages, predicted, folds, groups, healthy)[members]
        assert found == pytest.approx(line.gap(ages[members], predicted[members]))


def test_a_participant_in_several_folds_fits_the_correction_of_none_of_them():
    """With left-out sites a participant's scans may be in several folds."""
    ages, predicted = brain_ages(2, 100)
    groups, folds = np.arange(100), np.arange(100) % 4
    groups[[1, 2]] = 0  # in folds 0, 1 and 2
    gaps = corrected_gaps(ages, predicted, folds, groups)
    for fold in range(4):
        outside = folds != fold
        outside[[0, 1, 2]] &= fold == 3
        line = BiasLine.fit(ages[outside], predicted[outside])
        members = folds == fold
        assert gaps[members] == pytest.approx(line.gap(ages[members], predicted[members]))
    with pytest.raises(ValueError, match="1 ages without a range"):
        corrected_gaps(ages[:3], predicted[:3], np.arange(3), np.array([0, 0, 1]))
