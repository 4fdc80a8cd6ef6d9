"""Probes are fitted inside their folds, participants never straddle them, and noise stays noise."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from evaluation.probes import STRENGTHS, curve_draws, fit_predict, folds_of
from evaluation.statistics import auc
from evaluation.tasks import Task
from evaluation.tune import choose, prepare, trial


def make_task(kind="binary", people=60, signal=0.0, features=80, seed=0):
    generator = np.random.default_rng(seed)
    groups = np.repeat(np.arange(people), 2)
    labels = np.repeat(generator.permutation(people) % 2, 2).astype(float)
    if kind == "regression":
        labels = np.repeat(generator.uniform(20, 80, people), 2)
    if kind == "multiclass":
        labels = np.repeat(generator.permutation(people) % 3, 2)
    noise = np.repeat(generator.normal(size=(people, features)), 2, axis=0) + 0.1 * generator.normal(
        size=(2 * people, features)
    )
    noise[:, 0] += signal * (labels - labels.mean()) / labels.std()
    task = Task("t", "t", kind, np.arange(2 * people), labels, groups, ["a", "b", "c"])
    return task, noise


def run(task, features, sizes=(), draws=3):
    prepared = prepare(task, features, folds=5, sizes=list(sizes), draws=draws, seed=0)
    results = [trial({"task": "t", "strength": s}, {"tasks": {"t": prepared}}) for s in STRENGTHS]
    return *choose(results, prepared), prepared


@pytest.mark.parametrize("kind", ["binary", "multiclass", "regression"])
def test_no_participant_is_on_both_sides(kind):
    task, _ = make_task(kind)
    folds = folds_of(task.labels, task.groups, kind, 5, 0)
    assert sorted(np.concatenate([ask for _, ask in folds])) == list(range(120))
    for fit, ask in folds:
        assert not set(task.groups[fit]) & set(task.groups[ask])


@pytest.mark.parametrize("strength", [10.0, 1e3, 1e5])
def test_rotation_changes_no_answer(strength):
    generator = np.random.default_rng(0)
    train, test, labels = generator.normal(size=(30, 50)), generator.normal(size=(9, 50)), generator.integers(0, 2, 30)
    scaler = StandardScaler().fit(train)
    plain = LogisticRegression(C=1 / strength, class_weight="balanced", max_iter=5000, tol=1e-10)
    plain.fit(scaler.transform(train), labels)
    expected = plain.decision_function(scaler.transform(test))
    np.testing.assert_allclose(fit_predict(train, labels, test, "binary", strength), expected, atol=2e-3)
    ages = generator.uniform(20, 80, 30)
    ridge = Ridge(alpha=strength).fit(scaler.transform(train), ages).predict(scaler.transform(test))
    np.testing.assert_allclose(fit_predict(train, ages, test, "regression", strength), ridge, rtol=1e-6)


def test_noise_gives_chance_however_many_penalties_are_tried():
    found = []
    for seed in range(6):
        task, features = make_task(seed=seed)
        answers, _, _, _ = run(task, features)
        found.append(auc(task.labels, answers))
    # Choosing the penalty by the outer folds would lift this well above one half.
    assert np.mean(found) < 0.56


def test_a_signal_is_found():
    task, features = make_task(signal=1.5, features=8)
    answers, penalties, curve, _ = run(task, features, sizes=(10, 30), draws=4)
    assert auc(task.labels, answers) > 0.8
    assert len(penalties) == 5
    assert [(size, draw) for size, draw, _ in curve] == [(s, d) for s in (10, 30) for d in range(4)]
    task, features = make_task("regression", signal=3.0, features=8)
    assert np.corrcoef(run(task, features)[0], task.labels)[0, 1] > 0.8


def test_answers_of_a_fold_do_not_depend_on_its_labels():
    task, features = make_task(signal=1.0)
    answers, _, _, prepared = run(task, features)
    _, ask = prepared["folds"][0]
    task.labels[ask] = 1 - task.labels[ask]
    changed = {**prepared, "labels": task.labels}
    results = [trial({"task": "t", "strength": s}, {"tasks": {"t": changed}}) for s in STRENGTHS]
    inner = np.stack([r["inner"] for r in results])[:, 0]
    again = results[int(inner.argmax())]["answers"][ask]
    np.testing.assert_allclose(again, answers[ask])


def test_draws_are_the_same_for_everyone_and_apart_from_the_test():
    task, _ = make_task()
    test, draws = curve_draws(task.labels, task.groups, [10, 20, 500], 3, 0)
    again, fewer = curve_draws(task.labels, task.groups, [20], 3, 0)
    assert np.array_equal(test, again)
    assert set(draws) == {10, 20}
    for mine, theirs in zip(draws[20], fewer[20], strict=True):
        assert np.array_equal(mine, theirs)
    for fit in draws[20]:
        assert len(fit) == 20
        assert len(np.unique(task.groups[fit])) == 20
        assert not set(task.groups[fit]) & set(task.groups[test])
