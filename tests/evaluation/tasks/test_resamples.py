"""Repeats, halves and permuted features: who is in them, and that nobody is on both sides."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation.protocols.nested_cv import NestedCVResult, prepare
from evaluation.protocols.probes import Probe, linear
from evaluation.protocols.results import resample_rows
from evaluation.statistics.metrics import auc
from evaluation.tasks.folds import inner_folds, outer_folds
from evaluation.tasks.resamples import NO_RESAMPLING, Resampling, halves, make_resamples, permuted_rows
from evaluation.tasks.tasks import Task
from tests.searches import search_task

KINDS = ("binary", "multiclass", "regression")


def task_of(kind="binary", people=40, positives=20, scans=1, **more):
    groups = np.repeat(np.arange(people), scans)
    labels = {
        "binary": (groups < positives).astype(np.int64), "multiclass": (groups % 3).astype(np.int64),
        "regression": np.random.default_rng(0).normal(size=people)[groups],
    }[kind]  # fmt: skip
    return Task(
        name="t", title="t", kind=kind, rows=np.arange(len(groups)), labels=labels, groups=groups, classes=["a", "b", "c"],
        participants=groups.astype(str), **more,
    )  # fmt: skip


def resamples_of(task, *, seed=0, by_site=False, **asked):
    resampling = Resampling(**{"repeats": 3, "halvings": 6, "permutations": 2, **asked})
    folds = outer_folds(task, 5, seed, by_site)
    return folds, make_resamples(task, folds, resampling, count=5, seed=seed, by_site=by_site)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scans", [1, 2])
def test_two_halves_hold_everybody_once_and_share_nobody(kind, scans):
    task = task_of(kind, scans=scans)
    _, made = resamples_of(task)
    assert [(each.kind, each.number, each.side) for each in made] == [
        ("repeat", 1, 0), ("repeat", 2, 0), *(("half", number, side) for number in range(6) for side in (0, 1)),
        ("permuted", 0, 0), ("permuted", 1, 0),
    ]  # fmt: skip
    for number in range(6):
        one, other = (each for each in made if (each.kind, each.number) == ("half", number))
        tested = [np.concatenate([test for _, test in half.folds]) for half in (one, other)]
        assert sorted(np.concatenate(tested)) == list(range(len(task.rows)))
        assert not set(task.groups[tested[0]]) & set(task.groups[tested[1]])
        for half, scans_of_half in zip((one, other), tested, strict=True):
            for train, test in half.folds:
                assert not set(task.groups[train]) & set(task.groups[test])
                assert set(train) | set(test) == set(scans_of_half)


def test_classes_and_a_fixed_test_set_are_halved_but_numbers_are_dealt_at_random():
    positive = task_of(positives=7)
    assert {int(positive.labels[halves(positive, 0, number) == 0].sum()) for number in range(20)} == {3, 4}
    fixed = task_of(test=np.arange(40) % 4 == 0)
    _, made = resamples_of(fixed)
    assert not [each for each in made if each.kind == "repeat"]  # the fixed test set has one division only
    for half in (each for each in made if each.kind == "half"):
        ((train, test),) = half.folds
        assert fixed.test[test].all()
        assert not fixed.test[train].any()
        assert len(train) in (14, 15, 16)
        assert len(test) in (4, 5, 6)
    numbers = task_of("regression")
    highest = np.argsort(numbers.labels)[-20:]
    counts = {int((halves(numbers, 0, number)[highest] == 0).sum()) for number in range(20)}
    assert len(counts) > 3  # the spread between halves contains the chance of the labels


def test_a_half_has_as_many_folds_as_its_smallest_class_and_too_small_a_class_has_no_halves():
    _, made = resamples_of(task_of(positives=6))
    assert {len(each.folds) for each in made if each.kind == "half"} == {3}
    _, made = resamples_of(task_of(positives=5))
    assert {len(each.folds) for each in made if each.kind == "half"} == {2, 3}
    groups = np.arange(40)
    few = task_of(people=40, positives=3)
    made = make_resamples(few, [(groups, groups)], Resampling(1, 6), count=5, seed=0, by_site=False)
    assert made == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scans", [1, 2])
def test_a_half_has_enough_people_for_the_inner_folds_or_is_left_out(kind, scans):
    with_halves = []
    for people in range(5, 20):
        task = task_of(kind, people=people, positives=people // 2, scans=scans)
        folds = outer_folds(task, 2, 0)
        for made in make_resamples(task, folds, Resampling(1, 5), count=2, seed=0, by_site=False):
            for train, _ in made.folds:
                assert len(inner_folds(task.labels[train], task.groups[train], kind, made.seed)) == 3
            with_halves.append(people)
    assert min(with_halves) < 18
    assert 5 not in with_halves


def test_left_out_sites_stay_whole_in_halves():
    sites = np.array(["x", "y", "z", "z"])[np.arange(40) % 4]
    task = task_of(sites=sites, positives=20)
    _, made = resamples_of(task, by_site=True)
    assert {each.kind for each in made} == {"half", "permuted"}  # three sites of three folds have one division only
    for each in made:
        for train, test in each.folds:
            assert not set(sites[train]) & set(sites[test])


def test_resamples_depend_on_the_seed_only():
    task = task_of(scans=2)
    same = [resamples_of(task, halvings=halvings, repeats=repeats)[1] for halvings, repeats in ((6, 3), (9, 5))]
    by_key = [{(each.kind, each.number, each.side): each for each in made} for made in same]
    for key, each in by_key[0].items():
        other = by_key[1][key]
        assert each.seed == other.seed
        assert all(np.array_equal(a, b) for one, two in zip(each.folds, other.folds, strict=True)
                   for a, b in zip(one, two, strict=True))  # fmt: skip
    assert not np.array_equal(halves(task, 0, 0), halves(task, 1, 0))
    assert not np.array_equal(halves(task, 0, 0), halves(task, 0, 1))


def test_permuted_features_are_exchanged_between_groups():
    groups = np.array([0, 0, 1, 2, 2, 2, 3])
    for number in range(20):
        rows = permuted_rows(groups, 0, number)
        donors = [set(groups[rows[groups == each]]) for each in range(4)]
        assert all(len(donor) == 1 for donor in donors)
        assert set.union(*donors) == {0, 1, 2, 3}
    assert not np.array_equal(permuted_rows(groups, 0, 0), permuted_rows(groups, 0, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_resamples_of_a_search_are_those_of_separate_searches(kind):
    task = task_of(kind, scans=2)
    features = np.random.default_rng(1).normal(size=(len(task.rows), 3)) + task.labels[:, None]
    probe = Probe(linear, [{"penalty": 1.0}, {"penalty": 1000.0}])

    def search(prepared):
        return search_task(prepared, probe)

    asked = {"folds": 5, "sizes": [], "draws": 1, "seed": 0}
    prepared = prepare(task, features, **asked, resampling=Resampling(2, 5, 1))
    result, plain = search(prepared), search(prepare(task, features, **asked, resampling=NO_RESAMPLING))
    np.testing.assert_array_equal(result.predicted, plain.predicted)
    assert plain.resampled == []
    assert len(result.resampled) == 1 + 10 + 1
    for resample, predicted, _ in result.resampled:
        given = features if resample.rows is None else features[resample.rows]
        alone = prepare(task, given, **asked)
        alone.folds, alone.seed = resample.folds, resample.seed
        np.testing.assert_array_equal(predicted, search(alone).predicted)
    assert resample_rows(task, plain) == []
    rows = resample_rows(task, result)
    if kind == "binary":
        aucs = {row[2:5]: row[5] for row in rows if row[1] == "auc"}
        assert aucs["repeat", 0, 0] == auc(task.labels, result.predicted)
        assert aucs["repeat", 0, 0] > 0.7
        assert abs(aucs["permuted", 0, 0] - 0.5) < 0.3


def test_a_result_without_predictions_of_a_half_has_no_value_for_it():
    empty = NestedCVResult.empty(prepare(task_of(), np.ones((40, 1)), folds=5, sizes=[], draws=1, seed=0).table, [])
    assert resample_rows(task_of(), empty) == []
