"""Scaled, reduced and shared features give the predictions of a plain model on all features, in bounded memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge

from evaluation.features import tables
from evaluation.features.tables import FeatureBlock, FeatureTable, coordinates, permuted, reduced, split_features
from evaluation.protocols.probes import fit_predict, linear, nearest_neighbours

TRAIN, TEST = np.arange(40), np.arange(40, 52)


def make_table(scale="each", kind="binary", confounds=0, columns=300, dtype=np.float32):
    generator = np.random.default_rng(0)
    features = generator.normal(size=(52, columns)) * generator.uniform(0.1, 5, columns) + 3
    features[:, 5] = 1.0  # a constant feature
    labels = generator.permutation(52) % 2 if kind == "binary" else generator.uniform(20, 80, 52)
    return FeatureTable(
        features.astype(dtype), labels, np.arange(52), kind, covariates=np.empty((52, 0)),
        confounds=generator.normal(size=(52, confounds)), scale=scale,
    )  # fmt: skip


def by_hand(table):
    """Scaled features of training and test scans, without the project's code."""
    x, y = table.features[TRAIN].astype(float), table.features[TEST].astype(float)
    if table.confounds.shape[1]:
        design = [np.column_stack([np.ones(len(rows)), table.confounds[rows]]) for rows in (TRAIN, TEST)]
        weights = np.linalg.pinv(design[0]) @ x
        x, y = x - design[0] @ weights, y - design[1] @ weights
    deviation = x.std(0)
    if table.scale == "all":
        deviation = np.full(len(deviation), np.sqrt(x.var(0).mean()))
    deviation[deviation < 1e-8] = 1
    return (x - x.mean(0)) / deviation, (y - x.mean(0)) / deviation


@pytest.mark.parametrize("scale", ["each", "all"])
@pytest.mark.parametrize("confounds", [0, 2])
@pytest.mark.parametrize("kind", ["binary", "regression"])
def test_slabs_give_the_predictions_of_a_plain_model(monkeypatch, scale, confounds, kind):
    monkeypatch.setattr(tables, "SLAB", 70)  # several slabs, and the last one smaller
    table = make_table(scale, kind, confounds)
    x, y = by_hand(table)
    split = split_features(table, TRAIN, TEST)
    np.testing.assert_allclose(split.gram[0], x @ x.T, atol=1e-8)
    np.testing.assert_allclose(split.gram[1], y @ x.T, atol=1e-8)
    predicted = fit_predict(linear, {"penalty": 50.0}, table, TRAIN, TEST).predicted
    if kind == "regression":
        expected = Ridge(alpha=50.0).fit(x, table.labels[TRAIN]).predict(y)
    else:
        model = LogisticRegression(C=1 / 50, class_weight="balanced", max_iter=5000, tol=1e-10)
        expected = model.fit(x, table.labels[TRAIN]).decision_function(y)
    np.testing.assert_allclose(predicted, expected, rtol=1e-3, atol=2e-3)
    plain = fit_predict(linear, {"penalty": 50.0}, replace(table, features=table.features.astype(float)), TRAIN, TEST)
    np.testing.assert_allclose(predicted, plain.predicted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("confounds", [0, 2])
def test_coordinates_with_one_scale_serve_every_fold(confounds):
    table = make_table("all", confounds=confounds)
    columns, count = reduced(table.features, "all")
    assert (columns.shape, count) == ((52, 52), 300)
    dual = replace(table, features=columns, count=count)
    for train, test in ((TRAIN, TEST), (np.arange(20, 52), np.arange(20)), (TRAIN[::2], TEST)):
        for penalty in (1.0, 300.0):
            predictions = [fit_predict(linear, {"penalty": penalty}, t, train, test).predicted for t in (table, dual)]
            np.testing.assert_allclose(predictions[1], predictions[0], rtol=1e-5, atol=1e-6)
        neighbours = [fit_predict(nearest_neighbours, {"k": 5}, t, train, test).predicted for t in (table, dual)]
        np.testing.assert_allclose(neighbours[1], neighbours[0], atol=1e-6)


def test_features_stay_as_they_are_if_coordinates_would_not_serve_or_not_be_smaller():
    features = make_table().features
    assert reduced(features, "each")[0] is features
    assert reduced(features[:, :104], "all")[1] == 0
    assert reduced(features[:, :105], "all")[1] == 105
    products = coordinates(features) @ coordinates(features).T
    centred = features.astype(float) - features.astype(float).mean(0)
    np.testing.assert_allclose(products, centred @ centred.T, atol=1e-6)


def test_a_table_of_shared_features_is_that_of_its_own_rows_and_can_be_permuted():
    table = make_table(confounds=1)
    everyone = np.zeros((100, 300), np.float32)
    places = np.random.default_rng(1).permutation(100)[:52]
    everyone[places] = table.features
    shared = replace(table, features=everyone, places=places)
    rows = np.random.default_rng(2).permutation(52)
    for plain, other in ((table, shared), (permuted(table, rows), permuted(shared, rows))):
        predictions = [fit_predict(linear, {"penalty": 9.0}, t, TRAIN, TEST).predicted for t in (plain, other)]
        np.testing.assert_array_equal(predictions[0], predictions[1])
    assert permuted(shared, rows).features is everyone
    before = fit_predict(linear, {"penalty": 9.0}, table, TRAIN, TEST).predicted
    assert np.abs(predictions[0] - before).max() > 0.01


def test_wide_features_are_never_copied_whole(monkeypatch):
    """Of a training set the largest array is a slab."""
    largest = []
    slab = tables.TrainTestSplit._slab

    def noting(self, columns):
        pair = slab(self, columns)
        largest.append(max(part.shape[1] for part in pair))
        return pair

    monkeypatch.setattr(tables.TrainTestSplit, "_slab", noting)
    monkeypatch.setattr(tables, "SLAB", 64)
    fit_predict(linear, {"penalty": 9.0}, make_table(), TRAIN, TEST)
    assert largest == [64, 64, 64, 64, 44]


@pytest.mark.parametrize("coordinates_of_second", [False, True])
@pytest.mark.parametrize("confounds", [0, 2])
def test_blocks_keep_their_scale_and_get_the_same_total_variance(coordinates_of_second, confounds):
    """Own features of variance 1 each beside spatial ones of one scale, also if coordinates stand for these."""
    first, second = make_table("each", confounds=confounds, columns=20), make_table("all", columns=300)
    x, y = by_hand(first)
    spatial = by_hand(replace(second, confounds=first.confounds))
    columns, count = reduced(second.features, "all") if coordinates_of_second else (second.features, 300)
    assert columns.shape[1] == (52 if coordinates_of_second else 300)
    table = replace(
        first,
        features=np.column_stack([first.features, columns]).astype(float),
        blocks=(FeatureBlock(20, "each", 20), FeatureBlock(columns.shape[1], "all", count)),
    )
    split = split_features(table, TRAIN, TEST)
    # The variances of all features have the mean 1, half of their sum in each block.
    weights = np.sqrt(320 / (2 * 20)), np.sqrt(320 / (2 * 300))
    train = np.column_stack([weights[0] * x, weights[1] * spatial[0]])
    test = np.column_stack([weights[0] * y, weights[1] * spatial[1]])
    np.testing.assert_allclose(split.gram[0], train @ train.T, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(split.gram[1], test @ train.T, rtol=1e-5, atol=1e-4)
    of_blocks = [np.square(part).sum() for part in np.split(split.train, [20], axis=1)]
    # One of the own features is constant.
    np.testing.assert_allclose(of_blocks, [160 * len(TRAIN) * 19 / 20, 160 * len(TRAIN)], rtol=1e-5)
    predicted = fit_predict(linear, {"penalty": 50.0}, table, TRAIN, TEST).predicted
    model = LogisticRegression(C=1 / 50, class_weight="balanced", max_iter=5000, tol=1e-10)
    expected = model.fit(train, table.labels[TRAIN]).decision_function(test)
    np.testing.assert_allclose(predicted, expected, rtol=1e-3, atol=2e-3)


def test_test_scans_do_not_change_the_scale_of_a_block():
    table = make_table(columns=30, dtype=float)
    table = replace(table, blocks=(FeatureBlock(10, "each", 10), FeatureBlock(20, "all", 20)))
    other = replace(table, features=np.where(np.arange(52)[:, None] >= 40, 7 * table.features, table.features))
    np.testing.assert_array_equal(*(split_features(each, TRAIN, TEST).train for each in (table, other)))
