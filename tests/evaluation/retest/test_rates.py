"""Retest errors, identification, prediction of the scanner and shares of variance, against loops and known truths."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation.retest.design import Block
from evaluation.retest.rates import identify, predict_scanners, proportion, retest_errors
from evaluation.retest.variance import variance_shares


def grid(people, scanners, repeats):
    """Codes (N,) of person and scanner of every scan."""
    person, scanner, _ = np.meshgrid(np.arange(people), np.arange(scanners), np.arange(repeats), indexing="ij")
    return person.ravel(), scanner.ravel()


def test_retest_errors_of_two_scans_are_those_by_hand():
    values = np.array([30.0, 32.0, 50.0, 46.0, 41.0, 41.0])
    block = Block(np.arange(3), np.arange(6).reshape(3, 2))
    found = retest_errors(values, [block])
    assert found["difference"].value == pytest.approx((2 + 4 + 0) / 3)
    assert found["sd"].value == pytest.approx(np.sqrt((2 + 8 + 0) / 3))
    assert found["sd"].low < found["sd"].value < found["sd"].high
    same = retest_errors(np.repeat([30.0, 50.0, 41.0], 2), [block])
    assert tuple(same["sd"]) == (0.0, 0.0, 0.0)
    one = retest_errors(np.array([30.0, 30.0, 50.0, 50.0, 41.0, 45.0]), [block])  # without the third, nothing changes
    for name, value in {"sd": np.sqrt(8 / 3), "difference": 4 / 3}.items():
        np.testing.assert_allclose(one[name], (value, np.nan, np.nan))


def test_the_interval_of_the_typical_error_covers_its_truth():
    generator, block, covered = np.random.default_rng(2), Block(np.arange(20), np.arange(80).reshape(20, 4)), []
    for _ in range(400):
        values = generator.normal(0, 10, 20).repeat(4) + generator.normal(0, 2.5, 80)
        found = retest_errors(values, [block])["sd"]
        covered.append(found.low <= 2.5 <= found.high)
    assert 0.92 <= np.mean(covered) <= 0.98


def naive_identify(features, people, scanners):
    hits, chance = [], []
    for i in range(len(people)):
        others = [j for j in range(len(people)) if scanners[j] != scanners[i]]
        own = [j for j in others if people[j] == people[i]]
        distances = {j: float(((features[i] - features[j]) ** 2).sum()) for j in others}
        nearest = [j for j in others if distances[j] == min(distances.values())]
        hits.append(sum(people[j] == people[i] for j in nearest) / len(nearest) if own else np.nan)
        chance.append(len(own) / len(others) if own else np.nan)
    return hits, chance


def test_identification_is_that_of_the_loops_and_of_known_cases():
    people, scanners = grid(6, 3, 2)
    generator = np.random.default_rng(4)
    features = generator.normal(size=(6, 5))[people] + generator.normal(size=(len(people), 5))
    hits, chance = identify(features, people, scanners)
    expected = naive_identify(features, people, scanners)
    np.testing.assert_array_equal(hits, expected[0])
    np.testing.assert_allclose(chance, expected[1])
    np.testing.assert_allclose(chance, 1 / 6)
    whole = np.eye(6)[people]
    assert identify(whole, people, scanners)[0].min() == 1.0
    nothing, chance = identify(np.zeros((len(people), 2)), people, scanners)  # every distance is a tie
    np.testing.assert_allclose(nothing, chance)


def test_with_one_scanner_people_are_identified_among_all_other_scans_and_a_single_scan_has_no_value():
    people = np.array([0, 0, 1, 1, 2])
    features = np.array([[0.0], [0.1], [5.0], [5.1], [9.0]])
    hits, chance = identify(features, people, np.zeros(5, dtype=np.int64))
    np.testing.assert_array_equal(hits, [1, 1, 1, 1, np.nan])
    np.testing.assert_array_equal(chance, [0.25, 0.25, 0.25, 0.25, np.nan])


@pytest.mark.parametrize("truth", [0.1, 0.5, 0.9])
def test_the_interval_of_a_rate_covers_its_truth_though_the_scans_of_a_person_are_alike(truth):
    generator, covered = np.random.default_rng(8), []
    people, _ = grid(30, 4, 1)
    for _ in range(500):
        own = generator.beta(4 * truth, 4 * (1 - truth), 30)
        found = proportion((generator.random(len(people)) < own[people]).astype(float), people)
        covered.append(found.low <= truth <= found.high)
    assert 0.92 <= np.mean(covered) <= 0.985


def test_a_rate_of_all_or_nothing_has_an_interval_of_the_people_inside_its_range():
    people, _ = grid(20, 8, 2)
    value, low, high = proportion(np.ones(len(people)), people)
    assert (value, high) == (1.0, 1.0)
    assert 0.75 < low < 0.9  # Wilson's for 20 of 20 is [0.84, 1]
    assert proportion(np.zeros(len(people)), people).low == 0.0


def test_scanners_are_predicted_from_their_offsets_and_not_without_them():
    people, scanners = grid(15, 4, 2)
    generator = np.random.default_rng(5)
    features = generator.normal(size=(15, 20))[people] + 0.5 * generator.normal(size=(len(people), 20))
    blind = np.mean(predict_scanners(features, people, scanners) == scanners)
    offsets = generator.normal(size=(4, 20))[scanners]
    seeing = np.mean(predict_scanners(features + offsets, people, scanners) == scanners)
    assert blind < 0.45
    assert seeing > 0.9


def test_shares_of_variance_are_those_that_the_data_were_made_with():
    people, scanners = grid(60, 10, 2)
    sessions = np.repeat(np.arange(600), 2)
    generator = np.random.default_rng(6)
    values = (
        2.0 * generator.normal(size=60)[people] + 1.0 * generator.permutation(np.linspace(-1.6, 1.6, 10))[scanners]
        + 1.0 * generator.normal(size=600)[sessions] + 1.0 * generator.normal(size=len(people))
    )  # fmt: skip
    pick = people < 30  # the fit takes seconds for all
    found = variance_shares(values[pick], people=people[pick], scanners=scanners[pick], sessions=sessions[pick])
    assert sum(found.values()) == pytest.approx(1.0)
    for name, truth in {"person": 4 / 7, "scanner": 1 / 7, "session": 1 / 7, "rest": 1 / 7}.items():
        assert found[name] == pytest.approx(truth, abs=0.13), name


def test_shares_are_those_of_the_analysis_of_variance_in_a_balanced_design():
    """Restricted maximum likelihood equals the ANOVA estimates if all of them are positive (Searle et al. 1992)."""
    people, scanners = grid(8, 5, 1)
    generator = np.random.default_rng(7)
    table = generator.normal(size=(8, 1)) * 2 + generator.normal(size=5) * 1.5 + generator.normal(size=(8, 5))
    msr = 5 * table.mean(1).var(ddof=1)
    msc = 8 * table.mean(0).var(ddof=1)
    rest = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    mse = (rest**2).sum() / 28
    parts = np.array([(msr - mse) / 5, (msc - mse) / 8, mse])
    found = variance_shares(table.ravel(), people=people, scanners=scanners, sessions=np.arange(40))
    np.testing.assert_allclose([found["person"], found["scanner"], found["rest"]], parts / parts.sum(), atol=2e-3)
    assert np.isnan(found["session"])  # no session has two scans


@pytest.mark.parametrize("second", [0, 1, 4])
def test_one_session_for_each_person_is_not_told_from_the_person(second):
    """Also if a few people, ``second`` of them, have another session: their split would be arbitrary."""
    people, scanners = grid(8, 1, 4)
    sessions = people.copy()
    for person in range(second):
        sessions[np.flatnonzero(people == person)[2:]] = 8 + person
    generator = np.random.default_rng(9)
    values = 2.0 * generator.normal(size=8)[people] + generator.normal(size=32)
    found = variance_shares(values, people=people, scanners=scanners, sessions=sessions)
    means = values.reshape(8, 4).mean(1)
    within, between = values.reshape(8, 4).var(1, ddof=1).mean(), means.var(ddof=1)
    person = between - within / 4  # of the analysis of variance with people alone
    assert found["person"] == pytest.approx(person / (person + within), abs=2e-3)
    assert found["person"] + found["rest"] == pytest.approx(1.0)
    assert np.isnan(found["session"])


def test_sessions_have_a_share_if_five_people_have_several():
    people, scanners = grid(8, 1, 4)
    sessions = people.copy()
    for person in range(5):
        sessions[np.flatnonzero(people == person)[2:]] = 8 + person
    values = np.random.default_rng(9).normal(size=(8, 1, 4)).ravel() + 3.0 * sessions % 7
    found = variance_shares(values, people=people, scanners=scanners, sessions=sessions)
    assert found["session"] > 0.2


def test_a_constant_has_no_shares_and_one_scanner_none_of_its_own():
    people, scanners = grid(6, 1, 3)
    assert np.isnan(
        list(variance_shares(np.ones(18), people=people, scanners=scanners, sessions=people).values())
    ).all()
    values = np.random.default_rng(1).normal(size=6)[people] + np.random.default_rng(2).normal(size=18)
    found = variance_shares(values, people=people, scanners=scanners, sessions=np.arange(18))
    assert np.isnan(found["scanner"])
    assert found["person"] + found["rest"] == pytest.approx(1.0)
