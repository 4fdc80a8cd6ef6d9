"""Probes are fitted inside their folds, participants never straddle them, and noise stays noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from evaluation.protocols.nested_cv import choose, prepare, trial
from evaluation.protocols.probes import GRIDS, FeatureTable, fit_predict
from evaluation.statistics.metrics import auc
from evaluation.tasks.tasks import Task


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
    return choose(trials(prepared), prepared), prepared


def trials(prepared, model="linear"):
    with threadpool_limits(1):  # as in Ray's workers; threads of small matrices only wait for each other
        return [trial({"task": "t", "model": model, "params": at}, {"tasks": {"t": prepared}}) for at in GRIDS[model]]


def table(features, labels, kind="binary", covariates=None, confounds=None, groups=None, scale="each"):
    none = np.empty((len(labels), 0))
    groups = np.arange(len(labels)) if groups is None else groups
    beside = (none if part is None else part for part in (covariates, confounds))
    return FeatureTable(features, labels, groups, kind, *beside, scale)


ALL = {"train": np.arange(30), "test": np.arange(30, 39)}


@pytest.mark.parametrize("penalty", [10.0, 1e3, 1e5])
def test_rotation_changes_no_answer(penalty):
    generator = np.random.default_rng(0)
    features, labels = generator.normal(size=(39, 50)), generator.integers(0, 2, 39)
    train, test = features[:30], features[30:]
    scaler = StandardScaler().fit(train)
    plain = LogisticRegression(C=1 / penalty, class_weight="balanced", max_iter=5000, tol=1e-10)
    plain.fit(scaler.transform(train), labels[:30])
    found = fit_predict("linear", {"penalty": penalty}, table(features, labels), **ALL)
    np.testing.assert_allclose(found.predicted, plain.decision_function(scaler.transform(test)), atol=2e-3)
    ages = generator.uniform(20, 80, 39)
    ridge = Ridge(alpha=penalty).fit(scaler.transform(train), ages[:30]).predict(scaler.transform(test))
    found = fit_predict("linear", {"penalty": penalty}, table(features, ages, "regression"), **ALL)
    np.testing.assert_allclose(found.predicted, ridge, rtol=1e-6)


@pytest.mark.parametrize("kind", ["binary", "regression"])
def test_covariates_are_not_penalised(kind):
    generator = np.random.default_rng(1)
    age, features = generator.uniform(20, 80, (39, 1)), generator.normal(size=(39, 20))
    labels = (age[:, 0] + 15 * generator.normal(size=39) > 50).astype(int) if kind == "binary" else 3 * age[:, 0] + 1
    # So strong a penalty leaves the covariate alone, at the weight that it has without any.
    given = table(features, labels, kind, covariates=age)
    found = fit_predict("linear", {"penalty": 1e5}, given, **ALL).predicted
    if kind == "binary":
        alone = LogisticRegression(C=np.inf, class_weight="balanced", max_iter=5000, tol=1e-10)
        expected = alone.fit(age[:30], labels[:30]).decision_function(age[30:])
    else:
        expected = labels[30:]
    np.testing.assert_allclose(found, expected, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("model", ["linear", "knn", "mlp"])
def test_no_answer_depends_on_the_other_scans_asked_about(model):
    generator = np.random.default_rng(2)
    features, labels = generator.normal(size=(39, 12)), generator.integers(0, 2, 39)
    beside = {"covariates": generator.normal(size=(39, 1)), "confounds": generator.normal(size=(39, 2))}
    point = {**GRIDS.get(model, [{}])[-1], "hidden": 8, "alpha": 1.0, "lr": 1e-2, "epochs": 5}
    every = fit_predict(model, point, table(features, labels, **beside), **ALL)
    # Scalers, confounds, models: nothing may be fitted to the scans asked about, nor to how they are labelled.
    others = features.copy()
    others[31:] *= 100
    labels[30:] = 1 - labels[30:]
    beside["confounds"][31:] += 7
    again = fit_predict(model, point, table(others, labels, **beside), ALL["fit"], np.array([30, 35]))
    assert again.predicted[0] == pytest.approx(every.predicted[0])
    assert again.probability[0] == pytest.approx(every.probability[0])


def test_confounds_are_regressed_out():
    generator = np.random.default_rng(3)
    site = generator.integers(0, 2, 300)
    labels = np.where(generator.random(300) < 0.9, site, 1 - site)  # the label goes with the site
    features = generator.normal(size=(300, 10)) + 2.0 * site[:, None]
    found = {}
    for name, confounds in (("kept", None), ("out", site[:, None].astype(float))):
        given = table(features, labels, confounds=confounds)
        answers = fit_predict("linear", {"penalty": 10.0}, given, np.arange(200), np.arange(200, 300)).predicted
        found[name] = auc(labels[200:], answers)
    assert found["kept"] > 0.85
    assert abs(found["out"] - 0.5) < 0.15


def test_probabilities_are_those_of_the_training_scans_proportion():
    generator = np.random.default_rng(4)
    labels = (generator.random(3000) < 0.2).astype(int)
    features = generator.normal(size=(3000, 3)) + 0.8 * labels[:, None]
    fit, ask = np.arange(2000), np.arange(2000, 3000)
    found = fit_predict("linear", {"penalty": 1.0}, table(features, labels), fit, ask).probability
    for low, high in ((0, 0.1), (0.1, 0.3), (0.3, 0.6), (0.6, 1)):
        inside = (found >= low) & (found < high)
        standard_error = np.sqrt(found[inside].mean() * (1 - found[inside].mean()) / inside.sum())
        assert abs(found[inside].mean() - labels[ask][inside].mean()) < 4 * standard_error
    neighbours = fit_predict("knn", {"k": 63}, table(features, labels), fit, ask).probability
    assert abs(neighbours.mean() - 0.2) < 0.05


def test_nearest_neighbours_equal_scikit_learns():
    generator = np.random.default_rng(5)
    features, labels = generator.normal(size=(39, 6)), generator.integers(0, 3, 39)
    scaler = StandardScaler().fit(features[:30])
    theirs = KNeighborsClassifier(1, metric="cosine", algorithm="brute").fit(
        scaler.transform(features[:30]), labels[:30]
    )
    found = fit_predict("knn", {"k": 1}, table(features, labels, "multiclass"), **ALL).predicted
    assert np.array_equal(found, theirs.predict(scaler.transform(features[30:])))


def test_noise_gives_chance_however_many_penalties_are_tried():
    found = []
    for seed in range(6):
        task, features = make_task(seed=seed)
        found.append(auc(task.labels, run(task, features)[0].predicted))
    # Choosing the penalty by the outer folds would lift this well above one half.
    assert np.mean(found) < 0.56


@pytest.mark.parametrize(("model", "correlation"), [("linear", 0.8), ("knn", 0.7)])
def test_a_signal_is_found(model, correlation):
    task, features = make_task(signal=1.5, features=8)
    prepared = prepare(task, features, folds=5, sizes=[10, 30], draws=4, seed=0)
    found = choose(trials(prepared, model), prepared)
    assert auc(task.labels, found.predicted) > 0.8
    assert len(found.chosen) == 5
    assert [(size, draw) for size, draw, _ in found.curve] == [(s, d) for s in (10, 30) for d in range(4)]
    assert len(found.trials) == 5 * len(GRIDS[model])
    task, features = make_task("regression", signal=3.0, features=6)
    prepared = prepare(task, features, folds=5, sizes=[], draws=1, seed=0)
    assert np.corrcoef(choose(trials(prepared, model), prepared).predicted, task.labels)[0, 1] > correlation


def test_answers_of_a_fold_do_not_depend_on_its_labels():
    task, features = make_task(signal=1.0)
    before, prepared = run(task, features)
    _, ask = prepared.folds[0]
    task.labels[ask] = 1 - task.labels[ask]
    changed = replace(prepared, table=replace(prepared.table, labels=task.labels))
    results = trials(changed)
    inner = np.stack([r["inner"] for r in results])[:, 0]
    np.testing.assert_allclose(results[int(inner.argmax())]["predicted"][ask], before.predicted[ask])
