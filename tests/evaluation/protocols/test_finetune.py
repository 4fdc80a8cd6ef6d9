"""Networks learn a task, freeze, and stop by inner folds only; two ranks train as one does."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice, pairwise

import numpy as np
import pytest
import torch

from data_pipeline.storage.manifest import Manifest
from evaluation.protocols.finetune import (
    EncoderWithHead,
    FineTuning,
    TaskScans,
    TrainingJob,
    build,
    check_head_pooling,
    epochs,
    final_fit,
    parameter_groups,
    predict,
    trial,
)
from evaluation.protocols.probes import inner_metric
from infra import ray_cluster, tuning
from infra.errors import UserError
from pretrain.encoders import build_encoder
from pretrain.encoders.pooling import POOLINGS
from tests.pretrain.encoders.names import EACH_ENCODER
from tests.pretrain.engine.test_optimizers import DEPTHS

ENCODER = {"name": "resnet18", "options": {"width": 0.125, "norm": "group"}}
PARAMS = {"lr": 3e-3, "layer_decay": 0.5, "weight_decay": 1e-4}


@pytest.fixture
def job(shards):
    """Classify which scans of the tiny cohort are of people over 50; the size of a blob shows the age."""
    manifest = Manifest.load(shards)
    rows = np.arange(0, len(manifest.scans), 2)
    labels = (manifest.scans["age"].to_numpy()[rows] > 50).astype(int)
    return TrainingJob(
        shards=str(shards), folder=None, encoder=ENCODER, rows=rows, labels=labels, groups=manifest.subjects()[rows],
        kind="binary", covariates=np.empty((len(rows), 0)),
        settings=FineTuning(epochs=4, patience=2, batch=8, trials=2), device="cpu",
    )  # fmt: skip


def train_all(job, count, params=PARAMS):
    """Train on all scans for some epochs; return the network, the scans and their positions."""
    train = np.arange(len(job.rows))
    scans = TaskScans(job, train)
    return next(islice(epochs(job, params, train, scans), count - 1, None)), scans, train


@pytest.mark.parametrize("kind", ["binary", "multiclass", "regression"])
def test_a_network_learns_its_training_scans(job, kind):
    ages = Manifest.load(job.shards).scans["age"].to_numpy()[job.rows]
    labels = {"binary": job.labels, "multiclass": np.digitize(ages, [40, 60]), "regression": ages}[kind]
    job = replace(job, kind=kind, labels=labels, covariates=np.random.default_rng(0).normal(size=(len(ages), 1)))
    scores = []
    for count in (1, 21):
        network, scans, train = train_all(job, count, {**PARAMS, "lr": 1.5e-3})
        predictions = predict(job, network, scans, train, train)
        scores.append(inner_metric(labels, predictions.predicted, kind))
    assert scores[1] > scores[0]
    assert scores[1] > {"binary": 0.85, "multiclass": 0.6, "regression": -10}[kind]
    if kind == "multiclass":
        np.testing.assert_allclose(predictions.probability.sum(1), 1.0)


def test_a_frozen_encoder_does_not_change_until_it_is_unfrozen(job):
    job = replace(job, settings=replace(job.settings, freeze_epochs=2))
    before = build(job, 0).state_dict()
    frozen, _, _ = train_all(job, 2)
    assert all(torch.equal(before[name], value) for name, value in frozen.state_dict().items() if "encoder" in name)
    assert not torch.equal(before["head.weight"], frozen.head.weight)
    unfrozen, _, _ = train_all(job, 3)
    assert not torch.equal(before["encoder.trunk.conv1.weight"], unfrozen.encoder.trunk.conv1.weight)


@pytest.mark.parametrize(("pooling", "features"), [("grid2", 8), ("none", 12)])
def test_the_head_can_have_the_places_of_the_last_map(job, pooling, features):
    sides = (64, 96, 64)
    job = replace(job, settings=replace(job.settings, pooling=pooling), sides=sides)
    check_head_pooling(build_encoder(ENCODER["name"], ENCODER["options"]), pooling, sides)
    network, volumes = build(job, 0).eval(), torch.randn(2, 1, *sides)
    assert network.head.in_features == 64 * features
    with torch.no_grad():
        expected = network.head(POOLINGS[pooling](network.encoder.trunk(volumes)))
        torch.testing.assert_close(network(volumes, torch.empty(2, 0)), expected)
    network(volumes, torch.empty(2, 0)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_a_pooling_of_the_head_that_does_not_fit_is_refused():
    encoder = build_encoder(ENCODER["name"], ENCODER["options"])
    with pytest.raises(
        UserError, match=r"finetune.pooling='grid9' is not known \(did you mean .*\); allowed: mean, max, grid2"
    ):
        check_head_pooling(encoder, "grid9", (64, 64, 64))
    with pytest.raises(UserError, match="pooling grid3 needs a map of 3 or more"):
        check_head_pooling(encoder, "grid3", (64, 64, 64))
    check_head_pooling(encoder, "grid2", (64, 64, 64))
    assert (encoder.pooling, encoder.feature_size) == ("mean", 64)


@pytest.mark.parametrize("name", EACH_ENCODER)
def test_earlier_blocks_learn_more_slowly(name):
    with torch.device("cpu" if name == "swin-unetr" else "meta"):
        encoder = build_encoder(name, {})
        network = EncoderWithHead(encoder, int(encoder.feature_size), 0, 1)
    groups = parameter_groups(network, 1.0, 0.5)
    rates = [group["lr"] for group in groups]
    assert rates[-2:] == [1.0, 10.0]  # the last block and the head
    assert len(rates) == DEPTHS[name] + 2  # the stem, every block, the head
    assert all(rate == pytest.approx(0.5 * following) for rate, following in pairwise(rates[:-1]))
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in network.parameters())


def test_a_trial_uses_only_its_training_scans_and_stops_early(job):
    train = np.arange(0, len(job.rows) - 8)
    scores = [row["score"] for row in trial(PARAMS, {"job": job, "train": train})]
    assert 1 <= len(scores) <= 4
    labels = job.labels.copy()
    labels[len(labels) - 8 :] = 1 - labels[len(labels) - 8 :]
    other_test_labels = [row["score"] for row in trial(PARAMS, {"job": replace(job, labels=labels), "train": train})]
    assert other_test_labels == scores
    patient = replace(job, settings=replace(job.settings, epochs=50, patience=1))
    assert len(list(trial({**PARAMS, "lr": 1e-12}, {"job": patient, "train": train}))) == 2


def fit_and_report_ranks(data, rank, world_size):
    return {**final_fit(data, rank, world_size), "world_size": world_size}


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_of_ray_train_train_as_one_rank_does(job, tmp_path):
    train, test = np.arange(0, 28), np.arange(28, len(job.rows))
    data = {"job": job, "params": PARAMS, "epochs": 2, "train": train, "test": test}
    one_rank = final_fit(data)
    with ray_cluster.session(3):
        two_ranks = tuning.train_ranks(fit_and_report_ranks, data, ranks=2, storage=tmp_path, name="both")
        stored = tuning.train_ranks(fit_and_report_ranks, None, ranks=2, storage=tmp_path, name="both")
    assert two_ranks["world_size"] == 2
    assert np.ptp(one_rank["predicted"]) > 1e-3
    np.testing.assert_allclose(two_ranks["predicted"], one_rank["predicted"], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(stored["predicted"], two_ranks["predicted"])
