"""Intraclass correlations against published values, a two-way analysis of variance by loops, and simulated truths."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation.retest.design import Block
from evaluation.retest.icc import icc, icc_with_intervals

# Shrout and Fleiss (1979), Table 2: six targets rated by four judges. The values are those of their Table 4.
SHROUT_FLEISS = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]


def naive_icc(table):
    """ICC(2,1) and ICC(3,1) of a table (n, k) from sums of squares in loops."""
    n, k = len(table), len(table[0])
    grand = sum(map(sum, table)) / (n * k)
    rows = [sum(row) / k for row in table]
    columns = [sum(row[j] for row in table) / n for j in range(k)]
    msr = k * sum((mean - grand) ** 2 for mean in rows) / (n - 1)
    msc = n * sum((mean - grand) ** 2 for mean in columns) / (k - 1)
    mse = sum((table[i][j] - rows[i] - columns[j] + grand) ** 2 for i in range(n) for j in range(k)) / (
        (n - 1) * (k - 1)
    )
    return (msr - mse) / (msr + (k - 1) * mse + k * (msc - mse) / n), (msr - mse) / (msr + (k - 1) * mse)


def test_the_values_are_those_that_shrout_and_fleiss_printed():
    agreement, consistency = icc(np.array(SHROUT_FLEISS, dtype=float)[:, :, None])
    assert f"{agreement[0]:.2f}" == "0.29"
    assert f"{consistency[0]:.2f}" == "0.71"
    # As psych::ICC of R and pingouin.intraclass_corr print them.
    assert agreement[0] == pytest.approx(0.2898, abs=5e-5)
    assert consistency[0] == pytest.approx(0.7148, abs=5e-5)


@pytest.mark.parametrize(("people", "raters"), [(2, 2), (5, 3), (12, 8)])
def test_every_feature_and_every_resample_is_that_of_the_loops(people, raters):
    generator = np.random.default_rng(people)
    values = generator.normal(size=(people, 1, 4)) + generator.normal(size=(people, raters, 4)) + 1e4
    agreement, consistency = icc(values)
    for feature in range(4):
        expected = naive_icc(values[:, :, feature].tolist())
        np.testing.assert_allclose((agreement[feature], consistency[feature]), expected, rtol=1e-6)
    times = generator.integers(0, 4, size=(3, people)).astype(float) + np.eye(3, people)
    of_samples = icc(values, times)
    for sample in range(3):
        drawn = np.repeat(values[:, :, 0], times[sample].astype(int), axis=0)
        if len(drawn) > 1:
            np.testing.assert_allclose([each[sample, 0] for each in of_samples], naive_icc(drawn.tolist()), rtol=1e-6)


def test_perfect_repeats_have_one_and_a_constant_feature_has_none():
    values = np.zeros((6, 3, 3))
    values[:, :, 0] = np.arange(6.0)[:, None]  # the same on every scanner
    values[:, :, 1] = np.arange(6.0)[:, None] + np.array([0.0, 5.0, -5.0])  # scanners differ by a constant
    scans = np.arange(18).reshape(6, 3)
    found = icc_with_intervals(values.reshape(18, 3), [Block(np.arange(6), scans)])
    np.testing.assert_allclose(found["icc21"].value[0], 1.0)
    np.testing.assert_allclose(found["icc31"].value[:2], 1.0)
    assert found["icc21"].value[1] < 0.5
    assert found["icc31"].low[0] == pytest.approx(1.0)
    assert np.isnan([found[kind].value[2] for kind in found]).all()


def test_blocks_are_averaged_and_people_of_several_blocks_are_left_out_together():
    generator = np.random.default_rng(3)
    first, second = generator.normal(size=(7, 2, 2)), generator.normal(size=(5, 2, 2))
    values = np.concatenate([first.reshape(14, 2), second.reshape(10, 2)])
    blocks = [Block(np.arange(7), np.arange(14).reshape(7, 2)), Block(np.arange(3, 8), np.arange(14, 24).reshape(5, 2))]
    found = icc_with_intervals(values, blocks)
    expected = [np.mean([naive_icc(part[:, :, f].tolist()) for part in (first, second)], axis=0) for f in range(2)]
    np.testing.assert_allclose(np.stack([found["icc21"].value, found["icc31"].value], 1), expected)
    assert (found["icc31"].low < found["icc31"].value).all()
    assert (found["icc31"].high > found["icc31"].value).all()


@pytest.mark.parametrize(("people", "raters", "truth"), [(20, 4, 0.8), (20, 8, 0.95), (40, 2, 0.5), (40, 4, 0.3)])
def test_the_intervals_cover_a_known_correlation(people, raters, truth):
    studies = 500
    generator = np.random.default_rng(11)
    persons = np.sqrt(truth) * generator.standard_normal((people, 1, studies))
    offsets = np.sqrt(1 - truth) * np.linspace(-0.5, 0.5, raters)  # of the scanners, the same in every study
    noise = np.sqrt(1 - truth) * generator.standard_normal((people, raters, studies))
    values = (persons + offsets[:, None] + noise).reshape(people * raters, studies)
    scans = np.arange(people * raters).reshape(people, raters)
    found = icc_with_intervals(values, [Block(np.arange(people), scans)])
    known = {"icc31": truth, "icc21": truth / (1 + offsets.var(ddof=1))}
    for kind, each in found.items():
        covered = np.mean((each.low <= known[kind]) & (known[kind] <= each.high))
        assert 0.92 <= covered <= 0.98, (kind, covered)
