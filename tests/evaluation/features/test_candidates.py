"""The choice of features on inner folds: by ridge regression, on training scans only, and the same as a plain search."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from evaluation.features.candidates import (
    MOST_BLOCKS,
    MOST_FEATURES,
    FeatureChoice,
    candidate_blocks,
    candidate_scores,
    ridge_answers,
    spatial_block,
)
from evaluation.features.tables import FeatureTable, split_features, table_of
from evaluation.protocols.nested_cv import PreparedTask, inner_scores, nested_fit, prepare
from evaluation.protocols.probes import LINEAR, Probe, linear, with_readout_penalties
from evaluation.statistics.metrics import auc, inner_metric
from evaluation.tasks.folds import inner_folds
from evaluation.tasks.resamples import Resampling
from evaluation.tasks.tasks import Task
from pretrain.encoders import build_encoder
from pretrain.weights.layers import features_of_blocks, main_blocks
from tests.pretrain.encoders.names import EACH_ENCODER
from tests.searches import search_task

PENALTIES = [0.1, 10.0, 1e4]
TRAIN, TEST = np.arange(45), np.arange(45, 60)


def make_table(kind, columns=200, covariates=1, scale="each", seed=0):
    generator = np.random.default_rng(seed)
    labels = {
        "binary": (generator.permutation(60) % 3 == 0).astype(int), "multiclass": generator.permutation(60) % 3,
        "regression": generator.uniform(20, 80, 60),
    }[kind]  # fmt: skip
    features = generator.normal(size=(60, columns)).astype(np.float32)
    features[:, 0] += 2 * (labels - labels.mean()) / labels.std()
    return FeatureTable(
        features, labels, np.arange(60), kind, covariates=generator.normal(size=(60, covariates)),
        confounds=np.empty((60, 0)), scale=scale,
    )  # fmt: skip


@pytest.mark.parametrize("columns", [10, 200])
@pytest.mark.parametrize("kind", ["binary", "multiclass", "regression"])
def test_ridge_answers_are_those_of_scikit_learn_with_unpenalised_covariates(kind, columns):
    table = make_table(kind, columns)
    split = split_features(table, TRAIN, TEST)
    labels, weights = table.labels[TRAIN], np.ones(45)
    if kind != "regression":
        weights = 45 / (len(set(labels)) * np.bincount(labels)[labels])
    targets = {"binary": lambda: 2 * labels - 1, "multiclass": lambda: np.eye(3)[labels], "regression": lambda: labels}[
        kind
    ]()
    train = np.column_stack([split.train, 1e5 * split.train_covariates])
    test = np.column_stack([split.test, 1e5 * split.test_covariates])
    for penalty, answers in zip(PENALTIES, ridge_answers(split, kind, PENALTIES), strict=True):
        model = Ridge(alpha=penalty, solver="svd").fit(train, targets, sample_weight=weights)
        expected = model.predict(test)
        if kind == "multiclass":
            np.testing.assert_array_equal(answers, expected.argmax(1))
        else:
            np.testing.assert_allclose(answers, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["binary", "regression"])
def test_the_scores_are_those_of_a_plain_search_and_depend_on_training_scans_only(kind):
    tables = [make_table(kind, seed=seed, covariates=0) for seed in (0, 1)]
    tables = [tables[0], replace(tables[0], scale="all"), replace(tables[1], labels=tables[0].labels)]
    folds = inner_folds(tables[0].labels[TRAIN], tables[0].groups[TRAIN], kind, 0)
    candidates = [FeatureChoice({}, table) for table in tables]
    found = candidate_scores(candidates, TRAIN, folds, PENALTIES)
    for score, table in zip(found, tables, strict=True):
        of_penalties = []
        for penalty in range(len(PENALTIES)):
            of_folds = []
            for inner, test in folds:
                answers = ridge_answers(split_features(table, TRAIN[inner], TRAIN[test]), kind, PENALTIES)[penalty]
                of_folds.append(inner_metric(table.labels[TRAIN[test]], answers, kind))
            of_penalties.append(np.mean(of_folds))
        assert score == pytest.approx(max(of_penalties))
    assert found[0] > found[2]
    for table in tables:
        table.features[TEST] = np.nan  # would spread to every score
        table.labels[TEST] = 1 - table.labels[TEST]
    np.testing.assert_array_equal(candidate_scores(candidates, TRAIN, folds, PENALTIES), found)


@pytest.mark.parametrize("kind", ["binary", "multiclass", "regression"])
def test_readouts_have_the_penalties_that_scikit_learn_gives_them(kind):
    table = replace(make_table(kind), readouts=np.random.default_rng(5).normal(size=(60, 3)))
    split, of_readouts = split_features(table, TRAIN, TEST), [0.0, 1.0, 100.0]
    labels, weights = table.labels[TRAIN], np.ones(45)
    if kind != "regression":
        weights = 45 / (len(set(labels)) * np.bincount(labels)[labels])
    targets = {"binary": 2 * labels - 1, "multiclass": np.eye(3)[labels.astype(int) % 3], "regression": labels}[kind]
    found = ridge_answers(split, kind, PENALTIES, of_readouts)
    for (penalty, readout_penalty), answers in zip(itertools.product(PENALTIES, of_readouts), found, strict=True):
        scale = np.sqrt(penalty / readout_penalty) if readout_penalty else 1e5
        train, test = (
            np.column_stack([features, 1e5 * covariates, scale * readouts])
            for features, covariates, readouts in zip(
                (split.train, split.test), (split.train_covariates, split.test_covariates), split.readouts, strict=True
            )
        )
        expected = Ridge(alpha=penalty, solver="svd").fit(train, targets, sample_weight=weights).predict(test)
        if kind == "multiclass":
            np.testing.assert_array_equal(answers, expected.argmax(1))
        else:
            np.testing.assert_allclose(answers, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("penalised", [False, True])
def test_candidates_are_scored_with_the_penalties_of_the_readouts_that_the_fit_has(penalised):
    """The fit of a regression is ridge regression too, so a candidate's score is that of a search with its features alone."""
    probe = with_readout_penalties(LINEAR) if penalised else LINEAR
    for seed in range(3):
        table = make_table("regression", seed=seed)
        # Seven of the readouts are noise, which fits the training scans if it is not penalised.
        readouts = np.random.default_rng(seed).normal(size=(60, 8))
        readouts[:, 0] += table.labels / 10
        tables = [replace(table, readouts=readouts, features=table.features[:, :count]) for count in (1, 12, 200)]
        choices = [FeatureChoice({"layer": str(n)}, each) for n, each in enumerate(tables)]
        fit = nested_fit(probe, PreparedTask(tables[0], [], [], seed, candidates=choices), TRAIN, TEST)
        alone = [inner_scores(probe, PreparedTask(each, [], [], seed), TRAIN) for each in tables]
        best = [np.nanmax(scores) for scores in alone]
        np.testing.assert_allclose(fit.candidate_scores, best, rtol=1e-3)
        assert fit.candidate == np.argmax(best)
        np.testing.assert_array_equal(fit.scores, alone[fit.candidate])
        folds = inner_folds(table.labels[TRAIN], table.groups[TRAIN], "regression", seed)
        free = candidate_scores(choices, TRAIN, folds, [params["penalty"] for params in LINEAR.grid])
        assert (fit.candidate_scores > free + 0.01).any() == penalised


def make_task(people=80, seed=0):
    generator = np.random.default_rng(seed)
    labels = generator.permutation(people) % 2
    task = Task(
        name="t",
        title="t",
        kind="binary",
        rows=np.arange(people),
        labels=labels,
        groups=np.arange(people),
        classes=["a", "b"],
    )
    noise = generator.normal(size=(people, 30)).astype(np.float32)
    signal = generator.normal(size=(people, 300)).astype(np.float32)
    signal[:, 7] += 4 * labels
    return task, noise, signal


def choices_of(task, noise, signal):
    places = np.arange(len(task.rows))
    return [
        FeatureChoice({"layer": layer, "pooling": "mean", "scale": scale}, table_of(task, features, scale, places))
        for layer, features in (("encoder", noise), ("layer2", signal))
        for scale in ("each", "all")
    ]


def test_each_fold_chooses_its_features_and_reports_them():
    task, noise, signal = make_task()
    probe = Probe(linear, LINEAR.grid[::3])
    prepared = prepare(
        task, noise, folds=3, sizes=[30], draws=3, seed=0, resampling=Resampling(2, 3, 2),
        candidates=choices_of(task, noise, signal),
    )  # fmt: skip
    result = search_task(prepared, probe)
    plain = search_task(prepare(task, noise, folds=3, sizes=[30], draws=3, seed=0), probe)
    assert [params["layer"] for params in result.chosen] == ["layer2"] * 3
    assert all(set(params) == {"layer", "pooling", "scale", "penalty"} for params in result.chosen)
    assert auc(task.labels, result.predicted) > 0.75 > 0.65 > auc(task.labels, plain.predicted)
    assert [row[:2] for row in result.curve] == [row[:2] for row in plain.curve]
    values = {"repeat": [], "permuted": [], "half": []}
    for resample, predicted, _ in result.resampled:
        tested = np.isfinite(predicted)
        values[resample.kind].append(auc(task.labels[tested], predicted[tested]))
    assert [len(of_kind) for of_kind in values.values()] == [1, 2, 6]
    assert min(values["repeat"]) > 0.7 > max(values["permuted"])
    screened = [row for row in result.trials if "penalty" not in row["point"]]
    assert len(screened) == 3 * 4
    assert len(result.trials) == 3 * 4 + 3 * len(probe.grid)
    first = [row for row in screened if row["part"] == "fold 0"]
    best = max(first, key=lambda row: row["inner_score"])
    assert {**best["point"], "penalty": result.chosen[0]["penalty"]} == result.chosen[0]


def test_the_choice_of_a_fold_does_not_depend_on_its_test_scans():
    """The answers to a test scan are the same whatever the other test scans are, and whatever the labels of all are."""
    task, noise, signal = make_task()
    probe = Probe(linear, LINEAR.grid[::3])
    results = []
    for change in (False, True):
        prepared = prepare(task, noise, folds=3, sizes=[], draws=0, seed=0, candidates=choices_of(task, noise, signal))
        test = prepared.folds[0][1]
        if change:
            noise[test[1:]] *= 50
            signal[test[1:]] = -signal[test[1:]]
            task.labels[test] = 1 - task.labels[test]
        prepared.folds = prepared.folds[:1]
        results.append(search_task(prepared, probe))
    assert results[0].chosen == results[1].chosen
    assert results[0].predicted[test[0]] == results[1].predicted[test[0]]
    assert results[0].trials[0]["inner_score"] == results[1].trials[0]["inner_score"]


@pytest.mark.parametrize("name", EACH_ENCODER)
def test_every_encoder_has_candidates_of_bounded_size(name):
    options = {"grid": [64, 64, 64]} if name.startswith("vit") else {}
    with torch.device("cpu" if name == "swin-unetr" else "meta"):
        encoder = build_encoder(name, options)
    encoder.to("meta").eval()
    blocks = candidate_blocks(encoder, (64, 70, 64))
    assert blocks[0] == (None, ("mean",))
    assert len({layer for layer, _ in blocks}) <= MOST_BLOCKS + 1
    assert {pooling for _, pooling in blocks} - {("mean",)} in ({("none",)}, {("grid3",)}, {("none",), ("grid3",)})
    assert len(set(blocks)) == len(blocks)
    sizes = [
        features.shape[1]
        for features in features_of_blocks(encoder, blocks)(torch.empty(1, 1, 64, 70, 64, device="meta"))
    ]
    assert max(sizes) <= MOST_FEATURES
    assert sizes[0] == encoder.feature_size


@pytest.mark.parametrize("name", EACH_ENCODER)
def test_every_encoder_has_spatial_features_of_bounded_size(name):
    options = {"grid": [96, 112, 96]} if name.startswith("vit") else {}
    with torch.device("cpu" if name == "swin-unetr" else "meta"):
        encoder = build_encoder(name, options)
    encoder.to("meta").eval()
    block = spatial_block(encoder, (96, 112, 96))
    assert block is not None
    layer, pooling = block
    assert layer in main_blocks(encoder)
    assert pooling in (("none",), ("grid3",))
    (features,) = features_of_blocks(encoder, [block])(torch.empty(1, 1, 96, 112, 96, device="meta"))
    assert 8 <= features.shape[1] <= MOST_FEATURES


def test_the_spatial_features_of_a_resnet_are_those_of_its_deepest_map_of_four_positions():
    encoder = build_encoder("resnet18", {"width": 0.125, "norm": "group"})
    assert spatial_block(encoder, (121, 145, 121)) == ("layer4", ("none",))  # 4 x 5 x 4 positions
    assert spatial_block(encoder, (30, 36, 30)) == ("layer2", ("none",))  # 4 x 5 x 4; layer3 has 2 x 3 x 2
    encoder = build_encoder("resnet18", {"width": 0.125, "norm": "batch"}).eval()
    assert spatial_block(encoder, (12, 12, 12)) == ("layer1", ("none",))  # 3 x 3 x 3
    assert spatial_block(encoder, (8, 8, 8)) == ("layer1", ("none",))  # 2 x 2 x 2
    assert spatial_block(encoder, (4, 4, 4)) is None


def test_a_map_of_too_many_features_gives_way_to_one_of_three_positions():
    with torch.device("meta"):
        encoder = build_encoder("densenet121", {})
    # denseblock4 has 1,024 x 3 x 4 x 3 features, denseblock3 1,024 x 7 x 9 x 7
    assert spatial_block(encoder, (121, 145, 121)) == ("denseblock4", ("none",))


def test_too_many_positions_become_the_cells_of_a_grid():
    encoder = build_encoder("resnet18", {"norm": "group", "max_pool": False})
    assert spatial_block(encoder, (250, 250, 250)) == ("layer4", ("grid3",))


def test_the_candidates_of_a_resnet_on_a_coarse_grid():
    encoder = build_encoder("resnet18", {"width": 0.125, "norm": "group"})
    places = [("layer1", ("grid3",)), ("layer1", ("none",)), ("layer2", ("grid3",)), ("layer2", ("none",))]
    means = [(name, ("mean",)) for name in ("layer1", "layer2", "layer3")]  # that of layer4 is the encoder's own
    last = [("layer3", ("none",)), ("layer4", ("none",))]  # 2 x 3 x 2 and 1 x 2 x 1 positions have no three cells
    assert sorted(candidate_blocks(encoder, (30, 36, 30))[1:]) == sorted([*places, *means, *last])
