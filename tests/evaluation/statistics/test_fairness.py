"""Gaps between groups against loops and known truths."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation.statistics.fairness import _measures, fairness_table
from evaluation.statistics.metrics import auc


def study(generator, people=240, shift=0.0, scans=1):
    """Labels, scores, probabilities, participants and sex; scores of men are ``shift`` too high."""
    labels = (generator.random(people) < 0.5).astype(int)
    sex = np.where(generator.random(people) < 0.5, "F", "M")
    scores = 1.5 * (2 * labels - 1) + generator.normal(0, 1.5, people) + shift * (sex == "M")
    codes = np.repeat(np.arange(people), scans)
    return labels[codes], scores[codes], 1 / (1 + np.exp(-scores[codes])), codes, sex[codes]


def test_gaps_are_those_by_hand_and_small_groups_are_left_out():
    labels, scores, probabilities, people, sex = study(np.random.default_rng(0), shift=1.0)
    site = np.where(np.arange(len(people)) < 12, "small", np.where(np.arange(len(people)) < 130, "a", "b"))
    table = fairness_table(labels, scores, probabilities, people, {"sex": sex, "site": site}).set_index(
        ["by", "measure"]
    )
    sensitivity = {s: np.mean(scores[(sex == s) & (labels == 1)] > 0) for s in "FM"}
    calibration = {s: np.mean(probabilities[sex == s] - labels[sex == s]) for s in "FM"}
    areas = {s: auc(labels[sex == s], scores[sex == s]) for s in "FM"}
    for measure, values in {"sensitivity": sensitivity, "calibration": calibration, "auc": areas}.items():
        row = table.loc[("sex", measure)]
        assert row["gap"] == pytest.approx(max(values.values()) - min(values.values()))
        assert values[row["highest"]] - values[row["lowest"]] == pytest.approx(row["gap"])
        assert row["low"] < row["gap"] < row["high"]
    assert table.loc[("sex", "calibration"), "low"] > 0  # men's scores are too high
    assert set(table.loc["site"]["groups"]) == {2}
    assert not len(fairness_table(labels[:30], scores[:30], probabilities[:30], people[:30], {"sex": sex[:30]}))


def test_the_interval_is_of_the_same_difference_as_the_gap():
    """The gap comes from fairlearn, the interval from the project's weighted metrics."""
    labels, scores, probabilities, people, sex = study(np.random.default_rng(1), shift=0.7, scans=2)
    scores = scores.round(1)  # with ties
    site = np.array(["a", "b", "c"])[people % 3]
    table = fairness_table(labels, scores, probabilities, people, {"sex": sex, "site": site})
    assert len(table) == 6
    of_group, names = _measures(labels, scores, probabilities), {"sex": sex, "site": site}
    whole = np.ones((1, len(labels)))
    for row in table.itertuples():
        values = {name: of_group[row.measure](names[row.by] == name)(whole)[0] for name in np.unique(names[row.by])}
        assert row.gap == pytest.approx(max(values.values()) - min(values.values()))
        assert (row.lowest, row.highest) == (min(values, key=values.get), max(values, key=values.get))


def test_the_interval_of_a_gap_between_two_groups_covers_its_truth():
    generator, covered, runs = np.random.default_rng(3), 0, 150
    big = study(np.random.default_rng(9), people=200_000, shift=1.0)
    truth = np.mean((big[2] - big[0])[big[4] == "M"]) - np.mean((big[2] - big[0])[big[4] == "F"])
    for _ in range(runs):
        *given, sex = study(generator, people=120, shift=1.0, scans=2)
        row = fairness_table(*given, {"sex": sex}).set_index("measure").loc["calibration"]
        sign = 1 if row["highest"] == "M" else -1
        low, high = sorted((sign * row["low"], sign * row["high"]))
        covered += low <= truth <= high
    assert 0.9 <= covered / runs <= 0.99
