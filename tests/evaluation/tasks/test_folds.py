"""Folds keep groups and sites together; the draws of learning curves depend only on the task, the folds and the seed."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pandas as pd
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
    return Task(
        name="t", title="t", kind=kind, rows=np.arange(2 * people), labels=labels, groups=groups, classes=["a", "b", "c"],
        sites=site,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["binary", "multiclass", "regression"])
def test_no_participant_is_in_training_and_in_test(kind):
    task = make_task(kind)
    folds = make_folds(task.labels, task.groups, kind, 5, 0)
    assert sorted(np.concatenate([test for _, test in folds])) == list(range(120))
    for train, test in folds:
        assert not set(task.groups[train]) & set(task.groups[test])
        for inner_train, inner_test in inner_folds(task.labels[train], task.groups[train], kind, 0, repeats=2):
            assert not set(task.groups[train][inner_train]) & set(task.groups[train][inner_test])


def test_strata_are_balanced_over_folds_in_spite_of_a_small_one():
    task = make_task(people=120)
    site = np.unique(task.sites, return_inverse=True)[1]
    strata = np.unique(np.stack([task.labels, site], 1), axis=0, return_inverse=True)[1].reshape(-1)
    strata[0] = strata[1] = strata.max() + 1  # a stratum with only one participant
    shares = []
    for _, test in make_folds(task.labels, task.groups, "binary", 4, 0, strata):
        shares.append([((task.labels == c) & (site == s))[test].mean() for c in (0, 1) for s in range(4)])
    # Three of a fold's 30 participants; it is 0.2 if only the label is balanced.
    assert np.ptp(shares, axis=0).max() < 0.1


def test_whole_sites_are_left_out():
    task = make_task()
    folds = outer_folds(task, 5, 0, by_site=True)
    assert len(folds) == 4
    for train, test in folds:
        assert len(set(task.sites[test])) == 1
        assert not set(task.sites[train]) & set(task.sites[test])
    assert len(outer_folds(make_task(sites=9), 3, 0, by_site=True)) == 3


def test_a_participant_of_two_sites_is_removed_from_training_if_one_of_them_is_left_out():
    task = make_task()
    task.sites[0] = "site0" if task.sites[1] != "site0" else "site1"
    for train, test in outer_folds(task, 5, 0, by_site=True):
        assert not set(task.groups[train]) & set(task.groups[test])


def test_sites_that_cannot_be_left_out_are_refused():
    with pytest.raises(UserError, match="needs scans of two sites or more"):
        outer_folds(make_task(sites=1), 5, 0, by_site=True)
    task = make_task("multiclass")
    task = replace(task, labels=np.unique(task.sites, return_inverse=True)[1], classes=["a", "b", "c", "d"])
    with pytest.raises(UserError, match="its classes are the sites"):
        outer_folds(task, 5, 0, by_site=True)


@pytest.mark.parametrize("column", [["a", "", "b"], ["a", None, "b"], ["a", float("nan"), "b"]])
def test_scans_without_a_site_are_no_site_and_the_query_of_the_message_leaves_them_out(column):
    task = make_task()
    task.sites[:3] = ""
    task.participants = np.array([f"set/{group:03d}" for group in task.groups])
    who = re.escape(str(task.participants[0]))
    with pytest.raises(
        UserError, match=f"3 of {len(task.sites)} scans have no site .the first is of {who}.*"
    ) as caught:
        outer_folds(task, 5, 0, by_site=True)
    query = str(caught.value).rpartition("query: ")[2]
    assert pd.DataFrame({"site": column}).query(query)["site"].to_list() == ["a", "b"]


def test_a_fixed_test_set_is_the_one_fold():
    task = make_task()
    task.test = task.sites == "site2"
    ((train, test),) = outer_folds(task, 5, 0)
    assert set(task.sites[test]) == {"site2"}
    assert "site2" not in task.sites[train]
    for draw in curve_draws(task, [(train, test)], [10, 20], 3, 0):
        assert np.array_equal(draw.test, test)


def test_draws_do_not_depend_on_other_sizes_and_are_disjoint_from_their_test_set():
    task = make_task()
    folds = outer_folds(task, 5, 0)
    draws, again = curve_draws(task, folds, [10, 20, 500], 7, 0), curve_draws(task, folds, [20], 7, 0)
    assert [(draw.size, draw.number) for draw in draws] == [(s, n) for s in (10, 20) for n in range(7)]
    for draw, same in zip(draws[7:], again, strict=True):
        assert np.array_equal(draw.train, same.train)
        assert np.array_equal(draw.test, same.test)
    for draw in draws:
        assert np.array_equal(draw.test, folds[draw.number % 5][1])
        assert len(draw.train) == len(np.unique(task.groups[draw.train])) == draw.size
        assert not set(task.groups[draw.train]) & set(task.groups[draw.test])
        assert task.labels[draw.train].mean() == pytest.approx(0.5, abs=0.1)
