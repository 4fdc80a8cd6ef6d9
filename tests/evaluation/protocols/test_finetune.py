"""Networks trained on a task learn, freeze, and stop by inner folds alone; two ranks do what one does."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice, pairwise

import numpy as np
import pytest
import torch

from data_pipeline.storage.manifest import Manifest
from evaluation.protocols.finetune import (
    FineTuning,
    Network,
    Scans,
    TrainingJob,
    build,
    epochs,
    final_fit,
    parameter_groups,
    predict,
    trial,
)
from evaluation.protocols.probes import score
from infra import ray_cluster, tuning
from pretrain.encoders import ENCODERS, build_encoder
from tests.pretrain.engine.test_optimizers import DEPTHS

ENCODER = {"name": "resnet18", "options": {"width": 0.125, "norm": "group"}}
POINT = {"lr": 3e-3, "layer_decay": 0.5, "weight_decay": 1e-4}


@pytest.fixture
def job(shards):
    """Which of the tiny cohort's scans are of people over 50: age is in the size of a blob."""
    manifest = Manifest.load(shards)
    rows = np.arange(0, len(manifest.scans), 2)
    labels = (manifest.scans["age"].to_numpy()[rows] > 50).astype(int)
    return TrainingJob(
        str(shards), None, ENCODER, rows, labels, manifest.subjects()[rows], "binary", np.empty((len(rows), 0)),
        FineTuning(epochs=4, patience=2, batch=8, trials=2), "cpu",
    )  # fmt: skip


def after(job, count, point=POINT, fit=None):
    fit = np.arange(len(job.rows)) if fit is None else fit
    scans = Scans(job, fit)
    return next(islice(epochs(job, point, fit, scans), count - 1, None)), scans, fit


@pytest.mark.parametrize("kind", ["binary", "multiclass", "regression"])
def test_a_network_learns_its_training_scans(job, kind):
    ages = Manifest.load(job.shards).scans["age"].to_numpy()[job.rows]
    labels = {"binary": job.labels, "multiclass": np.digitize(ages, [40, 60]), "regression": ages}[kind]
    job = replace(job, kind=kind, labels=labels, covariates=np.random.default_rng(0).normal(size=(len(ages), 1)))
    found = []
    for count in (1, 21):
        network, scans, fit = after(job, count, {**POINT, "lr": 1.5e-3})
        answers = predict(job, network, scans, fit, fit)
        found.append(score(labels, answers.predicted, kind))
    assert found[1] > found[0]
    assert found[1] > {"binary": 0.85, "multiclass": 0.6, "regression": -10}[kind]
    if kind == "multiclass":
        np.testing.assert_allclose(answers.probability.sum(1), 1.0)


def test_the_encoder_stays_as_it_was_while_it_is_frozen(job):
    job = replace(job, settings=replace(job.settings, freeze_epochs=2))
    before = build(job, 0).state_dict()
    frozen, _, _ = after(job, 2)
    assert all(torch.equal(before[name], value) for name, value in frozen.state_dict().items() if "encoder" in name)
    assert not torch.equal(before["head.weight"], frozen.head.weight)
    free, _, _ = after(job, 3)
    assert not torch.equal(before["encoder.trunk.conv1.weight"], free.encoder.trunk.conv1.weight)


@pytest.mark.parametrize("name", ENCODERS)
def test_earlier_blocks_learn_more_slowly(name):
    with torch.device("cpu" if name == "swin-unetr" else "meta"):
        encoder = build_encoder(name, {})
        network = Network(encoder, int(encoder.feature_size), 0, 1)
    groups = parameter_groups(network, 1.0, 0.5)
    rates = [group["lr"] for group in groups]
    assert rates[-2:] == [1.0, 10.0]  # the last block and the head
    assert len(rates) == DEPTHS[name] + 2  # the stem, every block, the head
    assert all(one == pytest.approx(0.5 * other) for one, other in pairwise(rates[:-1]))
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in network.parameters())


def test_a_trial_sees_its_training_scans_alone_and_stops(job):
    fit = np.arange(0, len(job.rows) - 8)
    scores = [found["score"] for found in trial(POINT, {"job": job, "train": fit})]
    assert 1 <= len(scores) <= 4
    labels = job.labels.copy()
    labels[len(labels) - 8 :] = 1 - labels[len(labels) - 8 :]
    again = [found["score"] for found in trial(POINT, {"job": replace(job, labels=labels), "train": fit})]
    assert again == scores
    never = replace(job, settings=replace(job.settings, epochs=50, patience=1))
    assert len(list(trial({**POINT, "lr": 1e-12}, {"job": never, "train": fit}))) == 2


def one_epoch(data, rank, world_size):
    return {**final_fit(data, rank, world_size), "world_size": world_size}


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_of_ray_train_do_what_one_does(job, tmp_path):
    fit, ask = np.arange(0, 28), np.arange(28, len(job.rows))
    data = {"job": job, "params": POINT, "epochs": 2, "train": fit, "test": ask}
    alone = final_fit(data)
    with ray_cluster.session(3):
        both = tuning.train_ranks(one_epoch, data, ranks=2, storage=tmp_path, name="both")
        again = tuning.train_ranks(one_epoch, None, ranks=2, storage=tmp_path, name="both")  # read, not trained
    assert both["world_size"] == 2
    assert np.ptp(alone["predicted"]) > 1e-3
    np.testing.assert_allclose(both["predicted"], alone["predicted"], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(again["predicted"], both["predicted"])
