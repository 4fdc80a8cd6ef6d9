"""Probes are fitted to training scans only, participants are never in training and in test, and noise stays at chance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from evaluation.protocols.nested_cv import prepare, search_grid
from evaluation.protocols.probes import (
    LINEAR,
    NEAREST_NEIGHBOURS,
    FeatureTable,
    Probe,
    fit_predict,
    fit_predict_each,
    inner_metric,
    linear,
    nearest_neighbours,
    perceptron,
    with_readout_penalties,
)
from evaluation.statistics.metrics import auc
from evaluation.tasks.folds import inner_folds
from evaluation.tasks.tasks import Task
from infra import ray_cluster
from infra.search_place import searching
from tests.searches import search_task

TRAIN_TEST = {"train": np.arange(30), "test": np.arange(30, 39)}


def make_task(kind="binary", people=60, signal=0.0, features=80, seed=0):
    """A task with two scans per participant, and features of which the first has some signal."""
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
    task = Task(
        name="t",
        title="t",
        kind=kind,
        rows=np.arange(2 * people),
        labels=labels,
        groups=groups,
        classes=["a", "b", "c"],
    )
    return task, noise


def run(task, features, sizes=(), draws=3):
    prepared = prepare(task, features, folds=5, sizes=list(sizes), draws=draws, seed=0)
    return search(prepared), prepared


def search(prepared, probe=LINEAR):
    """Run a grid search in this process."""
    with threadpool_limits(1):  # as in Ray's workers; threads do not speed up matrices of this size
        return search_task(prepared, probe)


def table(features, labels, kind="binary", covariates=None, confounds=None, scale="each"):
    none = np.empty((len(labels), 0))
    return FeatureTable(
        features, labels, np.arange(len(labels)), kind, covariates=none if covariates is None else covariates,
        confounds=none if confounds is None else confounds, scale=scale,
    )  # fmt: skip


@pytest.mark.parametrize("penalty", [10.0, 1e3, 1e5])
def test_rotation_onto_principal_axes_changes_no_prediction(penalty):
    generator = np.random.default_rng(0)
    features, labels = generator.normal(size=(39, 50)), generator.integers(0, 2, 39)
    train, test = features[:30], features[30:]
    scaler = StandardScaler().fit(train)
    plain = LogisticRegression(C=1 / penalty, class_weight="balanced", max_iter=5000, tol=1e-10)
    plain.fit(scaler.transform(train), labels[:30])
    predictions = fit_predict(linear, {"penalty": penalty}, table(features, labels), **TRAIN_TEST)
    np.testing.assert_allclose(predictions.predicted, plain.decision_function(scaler.transform(test)), atol=2e-3)
    ages = generator.uniform(20, 80, 39)
    ridge = Ridge(alpha=penalty).fit(scaler.transform(train), ages[:30]).predict(scaler.transform(test))
    predictions = fit_predict(linear, {"penalty": penalty}, table(features, ages, "regression"), **TRAIN_TEST)
    np.testing.assert_allclose(predictions.predicted, ridge, rtol=1e-6)


@pytest.mark.parametrize("columns", [5, 50])
@pytest.mark.parametrize("kind", ["binary", "regression"])
def test_entries_of_a_grid_with_penalised_readouts_are_fitted_as_if_each_were_alone(kind, columns):
    generator = np.random.default_rng(2)
    labels = generator.integers(0, 2, 39) if kind == "binary" else generator.uniform(20, 80, 39)
    data = table(generator.normal(size=(39, columns)), labels, kind)
    data = replace(data, readouts=generator.normal(size=(39, 2)) + labels[:, None] / labels.std())
    probe = with_readout_penalties(Probe(linear, LINEAR.grid[:4]))
    together = fit_predict_each(probe, data, **TRAIN_TEST)
    for params, fitted in zip(probe.grid, together, strict=True):
        alone = fit_predict(linear, params, data, **TRAIN_TEST)
        np.testing.assert_allclose(fitted.predicted, alone.predicted, rtol=1e-3, atol=1e-3, err_msg=str(params))


@pytest.mark.parametrize("kind", ["binary", "regression"])
def test_covariates_are_not_penalised(kind):
    """With a large penalty the features have no weight, and the covariate has the weight of an unpenalised fit."""
    generator = np.random.default_rng(1)
    age, features = generator.uniform(20, 80, (39, 1)), generator.normal(size=(39, 20))
    labels = (age[:, 0] + 15 * generator.normal(size=39) > 50).astype(int) if kind == "binary" else 3 * age[:, 0] + 1
    data = table(features, labels, kind, covariates=age)
    predicted = fit_predict(linear, {"penalty": 1e5}, data, **TRAIN_TEST).predicted
    if kind == "binary":
        unpenalised = LogisticRegression(C=np.inf, class_weight="balanced", max_iter=5000, tol=1e-10)
        expected = unpenalised.fit(age[:30], labels[:30]).decision_function(age[30:])
    else:
        expected = labels[30:]
    np.testing.assert_allclose(predicted, expected, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("model", [linear, nearest_neighbours, perceptron])
def test_a_prediction_does_not_depend_on_other_test_scans_or_on_test_labels(model):
    """This fails if scalers, confounds or models are fitted to test scans."""
    generator = np.random.default_rng(2)
    features, labels = generator.normal(size=(39, 12)), generator.integers(0, 2, 39)
    columns = {"covariates": generator.normal(size=(39, 1)), "confounds": generator.normal(size=(39, 2))}
    params = {"penalty": 1e5, "k": 63, "hidden": 8, "alpha": 1.0, "lr": 1e-2, "epochs": 5}
    before = fit_predict(model, params, table(features, labels, **columns), **TRAIN_TEST)
    others = features.copy()
    others[31:] *= 100
    labels[30:] = 1 - labels[30:]
    columns["confounds"][31:] += 7
    after = fit_predict(model, params, table(others, labels, **columns), TRAIN_TEST["train"], np.array([30, 35]))
    assert after.predicted[0] == pytest.approx(before.predicted[0])
    assert after.probability[0] == pytest.approx(before.probability[0])


def test_confounds_are_regressed_out():
    generator = np.random.default_rng(3)
    site = generator.integers(0, 2, 300)
    labels = np.where(generator.random(300) < 0.9, site, 1 - site)  # the label follows the site
    features = generator.normal(size=(300, 10)) + 2.0 * site[:, None]
    areas = {}
    for name, confounds in (("kept", None), ("removed", site[:, None].astype(float))):
        data = table(features, labels, confounds=confounds)
        predicted = fit_predict(linear, {"penalty": 10.0}, data, np.arange(200), np.arange(200, 300)).predicted
        areas[name] = auc(labels[200:], predicted)
    assert areas["kept"] > 0.85
    assert abs(areas["removed"] - 0.5) < 0.15


def test_probabilities_are_calibrated_for_the_class_proportion_of_the_training_scans():
    generator = np.random.default_rng(4)
    labels = (generator.random(3000) < 0.2).astype(int)
    features = generator.normal(size=(3000, 3)) + 0.8 * labels[:, None]
    train, test = np.arange(2000), np.arange(2000, 3000)
    probabilities = fit_predict(linear, {"penalty": 1.0}, table(features, labels), train, test).probability
    for low, high in ((0, 0.1), (0.1, 0.3), (0.3, 0.6), (0.6, 1)):
        inside = (probabilities >= low) & (probabilities < high)
        mean = probabilities[inside].mean()
        standard_error = np.sqrt(mean * (1 - mean) / inside.sum())
        assert abs(mean - labels[test][inside].mean()) < 4 * standard_error
    neighbours = fit_predict(nearest_neighbours, {"k": 63}, table(features, labels), train, test).probability
    assert abs(neighbours.mean() - 0.2) < 0.05


def test_nearest_neighbours_equal_scikit_learn():
    generator = np.random.default_rng(5)
    features, labels = generator.normal(size=(39, 6)), generator.integers(0, 3, 39)
    scaler = StandardScaler().fit(features[:30])
    reference = KNeighborsClassifier(1, metric="cosine", algorithm="brute")
    reference.fit(scaler.transform(features[:30]), labels[:30])
    predicted = fit_predict(nearest_neighbours, {"k": 1}, table(features, labels, "multiclass"), **TRAIN_TEST).predicted
    assert np.array_equal(predicted, reference.predict(scaler.transform(features[30:])))


def test_noise_stays_at_chance_however_many_penalties_are_tried():
    """If the penalty were chosen on the outer folds, the mean AUC would be well above 0.5."""
    areas = []
    for seed in range(6):
        task, features = make_task(seed=seed)
        areas.append(auc(task.labels, run(task, features)[0].predicted))
    assert np.mean(areas) < 0.56


@pytest.mark.parametrize(("probe", "correlation"), [(LINEAR, 0.8), (NEAREST_NEIGHBOURS, 0.7)])
def test_a_signal_is_found(probe, correlation):
    task, features = make_task(signal=1.5, features=8)
    prepared = prepare(task, features, folds=5, sizes=[10, 30], draws=4, seed=0)
    result = search(prepared, probe)
    assert auc(task.labels, result.predicted) > 0.8
    assert len(result.chosen) == 5
    assert [(size, draw) for size, draw, _ in result.curve] == [(s, d) for s in (10, 30) for d in range(4)]
    assert len(result.trials) == 5 * len(probe.grid)
    task, features = make_task("regression", signal=3.0, features=6)
    prepared = prepare(task, features, folds=5, sizes=[], draws=1, seed=0)
    assert np.corrcoef(search(prepared, probe).predicted, task.labels)[0, 1] > correlation


@pytest.mark.parametrize("kind", ["binary", "multiclass", "regression"])
@pytest.mark.parametrize("features", [8, 200])  # fewer and more than training scans
def test_a_search_gives_what_separate_fits_of_every_entry_give(kind, features):
    task, values = make_task(kind, signal=1.0, features=features)
    prepared = prepare(task, values, folds=3, sizes=[12] if kind == "binary" else [], draws=2, seed=0)
    result, data = search(prepared), prepared.table

    def naive(train, test):
        scores = []
        for params in LINEAR.grid:
            folds = inner_folds(data.labels[train], data.groups[train], kind, 0, 1)
            found = [fit_predict(linear, params, data, train[a], train[b]).predicted for a, b in folds]
            scores.append(
                np.nanmean(
                    [inner_metric(data.labels[train[b]], f, kind) for (_, b), f in zip(folds, found, strict=True)]
                )
            )
        best = LINEAR.grid[int(np.nan_to_num(scores, nan=-np.inf).argmax())]
        return best, scores, fit_predict(linear, best, data, train, test)

    with threadpool_limits(1):
        for number, (train, test) in enumerate(prepared.folds):
            best, scores, expected = naive(train, test)
            assert result.chosen[number] == best
            assert [row["inner_score"] for row in result.trials if row["part"] == f"fold {number}"] == scores
            assert np.array_equal(result.predicted[test], expected.predicted)
            assert np.array_equal(result.probabilities[test], expected.probability, equal_nan=True)
            assert (result.fold[test] == number).all()
        for draw, (_, _, value), predicted in zip(prepared.draws, result.curve, result.draw_predicted, strict=True):
            expected = naive(draw.train, draw.test)[2].predicted
            assert np.array_equal(predicted, expected.astype(np.float32))
            assert value == auc(task.labels[draw.test], expected)


def test_predictions_for_a_fold_do_not_depend_on_its_labels():
    task, features = make_task(signal=1.0)
    before, prepared = run(task, features)
    _, test = prepared.folds[0]
    task.labels[test] = 1 - task.labels[test]
    changed = replace(prepared, table=replace(prepared.table, labels=task.labels))
    np.testing.assert_allclose(search(changed).predicted[test], before.predicted[test])


@pytest.mark.jobs
def test_a_search_in_ray_has_the_answers_of_one_in_this_process(tmp_path):
    found = {}
    for place in ("here", "ray"):
        prepared = {
            kind: prepare(*make_task(kind, people=150, features=240, signal=1.0), folds=3, sizes=[], draws=0, seed=0)
            for kind in ("binary", "regression")
        }
        with searching(place), ray_cluster.session_on_demand(2):
            found[place] = search_grid(prepared, LINEAR, tmp_path / place, "search")
            assert ray_cluster.has_cluster() == (place == "ray")
    for kind, here in found["here"].items():
        in_ray = found["ray"][kind]
        assert here.chosen == in_ray.chosen
        assert np.array_equal(here.predicted, in_ray.predicted)
        for ours, theirs in zip(here.trials, in_ray.trials, strict=True):
            assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
