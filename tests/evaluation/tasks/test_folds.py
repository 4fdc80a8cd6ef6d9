"""Nobody is on both sides of a fold; whole sites are left out; draws are the same for every checkpoint."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from evaluation.tasks.folds import curve_draws, inner_folds, make_folds, outer_folds
from evaluation.tasks.tasks import Task
from infra.errors import UserError


def make_task(kind="binary", people=60, sites=4, seed=0):
    generator = np.random.default_rng(seed)
    groups = np.repeat(np.arange(people), 2)
    labels = np.repeat(generator.permutation(people) % (3 if kind == "multiclass" else 2), 2)
    if kind == "regression":
        labels = np.repeat(generator.uniform(20, 80, people), 2)
    site = np.array([f"site{n}" for n in np.repeat(generator.integers(0, sites, people), 2)])
    return Task("t", "t", kind, np.arange(2 * people), labels, groups, ["a", "b", "c"], sites=site)


@pytest.mark.parametrize("kind", ["binary", "multiclass", "regression"])
def test_no_participant_is_on_both_sides(kind):
    task = make_task(kind)
    folds = make_folds(task.labels, task.groups, kind, 5, 0)
    assert sorted(np.concatenate([ask for _, ask in folds])) == list(range(120))
    for fit, ask in folds:
        assert not set(task.groups[fit]) & set(task.groups[ask])
        for inner, asked in inner_folds(task.labels[fit], task.groups[fit], kind, 0, repeats=2):
            assert not set(task.groups[fit][inner]) & set(task.groups[fit][asked])


def test_strata_are_spread_alike_and_small_ones_do_no_harm():
    task = make_task(people=120)
    site = np.unique(task.sites, return_inverse=True)[1]
    strata = np.unique(np.stack([task.labels, site], 1), axis=0, return_inverse=True)[1].reshape(-1)
    strata[0] = strata[1] = strata.max() + 1  # one participant alone in a stratum
    spread = []
    for _, ask in make_folds(task.labels, task.groups, "binary", 4, 0, strata):
        spread.append([((task.labels == c) & (site == s))[ask].mean() for c in (0, 1) for s in range(4)])
    assert np.ptp(spread, axis=0).max() < 0.1  # three of a fold's 30 participants; 0.2 where only the label is spread


def test_whole_sites_are_left_out():
    task = make_task()
    folds = outer_folds(task, 5, 0, by_site=True)
    assert len(folds) == 4
    for fit, ask in folds:
        assert len(set(task.sites[ask])) == 1
        assert not set(task.sites[fit]) & set(task.sites[ask])
    assert len(outer_folds(make_task(sites=9), 3, 0, by_site=True)) == 3


def test_a_participant_of_two_sites_is_not_fitted_to_where_one_of_them_is_left_out():
    task = make_task()
    task.sites[0] = "site0" if task.sites[1] != "site0" else "site1"
    for fit, ask in outer_folds(task, 5, 0, by_site=True):
        assert not set(task.groups[fit]) & set(task.groups[ask])


def test_sites_that_cannot_be_left_out_are_refused():
    with pytest.raises(UserError, match="needs scans of two sites or more"):
        outer_folds(make_task(sites=1), 5, 0, by_site=True)
    task = make_task("multiclass")
    task = replace(task, labels=np.unique(task.sites, return_inverse=True)[1], classes=["a", "b", "c", "d"])
    with pytest.raises(UserError, match="its classes are the sites"):
        outer_folds(task, 5, 0, by_site=True)


def test_a_fixed_test_set_is_the_one_fold():
    task = make_task()
    task.test = task.sites == "site2"
    ((fit, ask),) = outer_folds(task, 5, 0)
    assert set(task.sites[ask]) == {"site2"}
    assert "site2" not in task.sites[fit]
    for draw in curve_draws(task, [(fit, ask)], [10, 20], 3, 0):
        assert np.array_equal(draw.test, ask)


def test_draws_are_the_same_for_everyone_and_apart_from_the_test():
    task = make_task()
    folds = outer_folds(task, 5, 0)
    draws, again = curve_draws(task, folds, [10, 20, 500], 7, 0), curve_draws(task, folds, [20], 7, 0)
    assert [(draw.size, draw.number) for draw in draws] == [(s, n) for s in (10, 20) for n in range(7)]
    for mine, theirs in zip(draws[7:], again, strict=True):
        assert np.array_equal(mine.train, theirs.train)
        assert np.array_equal(mine.test, theirs.test)
    for draw in draws:
        assert np.array_equal(draw.test, folds[draw.number % 5][1])
        assert len(draw.train) == len(np.unique(task.groups[draw.train])) == draw.size
        assert not set(task.groups[draw.train]) & set(task.groups[draw.test])
        assert task.labels[draw.train].mean() == pytest.approx(0.5, abs=0.1)
