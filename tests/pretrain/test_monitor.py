"""The probe on held-out participants while training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data_pipeline.loader import volumes
from data_pipeline.manifest import Manifest
from infra.errors import UserError
from pretrain import engine
from pretrain.config import Monitor, load_recipe
from pretrain.ema import Average
from pretrain.engine import NotFinite
from pretrain.model import build_model
from pretrain.monitor import Watched, encode, probe_figures, watched_scans
from pretrain.step import lr_factor, train_step

SMALL = ["--encoder.options={width: 0.25, norm: group}", "--batch.global=4"]


@pytest.fixture(scope="module")
def manifest(shards):
    return Manifest.load(shards)


@pytest.fixture(scope="module", params=[0, 1, 3])
def trained(one_rank, request):
    recipe = load_recipe("demo-cpu", [*SMALL, f"--deepspeed.zero_optimization.stage={request.param}"])
    return engine.build_engine(recipe, build_model(recipe), lr_factor(recipe.optimizer, 20, 10))


def test_features_are_those_of_the_encoder_in_the_order_of_the_scans(trained, manifest):
    trained.train()
    rows = np.array([5, 0, 9, 3, 7])
    found = encode(trained, manifest, rows, torch.device("cpu"), torch.float32, batch=2)
    assert trained.module.training
    trained.module.eval()
    with torch.no_grad():
        expected = torch.cat([trained.module.encoder(part) for _, part in volumes(manifest, rows, 1)])
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_the_monitor_judges_the_average_where_there_is_one(trained, manifest):
    average = Average(trained, 0.5)
    before = average.state()
    for step in (1, 2):
        views = torch.randn(2, 4, 1, 12, 12, 12, generator=torch.Generator().manual_seed(step))
        train_step(trained, lambda z, temperature, batch: z.square().mean(), {"views": views}, step, torch.float32)
        average.update(step)
    network = average.network(load_recipe("demo-cpu", SMALL).encoder, torch.device("cpu"), torch.float32)
    assert not network.training
    averaged, now = average.state(), engine.encoder_state(trained)
    name = "trunk.conv1.weight"
    assert not torch.equal(averaged[name], now[name])
    assert not torch.equal(averaged[name], before[name])
    assert all(torch.equal(value, averaged[name]) for name, value in network.state_dict().items())
    rows = np.array([5, 0, 9])
    found = encode(trained, manifest, rows, torch.device("cpu"), torch.float32, 2, network)
    with torch.no_grad():
        expected = torch.cat([network(part) for _, part in volumes(manifest, rows, 1)])
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)
    plain = encode(trained, manifest, rows, torch.device("cpu"), torch.float32, 2)
    assert not np.allclose(found, plain, rtol=1e-4, atol=1e-5)


def test_the_probe_finds_a_signal_and_no_other():
    generator = np.random.default_rng(0)
    ages, people = generator.uniform(20, 80, 200), np.arange(200) // 2
    ages = ages[people]
    noise = generator.normal(size=(200, 30))
    watched = Watched(np.arange(200), ages, people, 10)
    told = probe_figures(noise + 0.2 * ages[:, None] * generator.normal(size=30), watched, "age")
    untold = probe_figures(noise, watched, "age")
    assert told["monitor/age_mae"] < 3 < 10 < untold["monitor/age_mae"]
    assert told["monitor/age_r2"] > 0.9
    assert untold["monitor/age_r2"] < 0.2
    assert probe_figures(np.ones((200, 4)), watched, "age")["monitor/spread"] == 0.0


def test_which_scans_are_watched(manifest):
    assert watched_scans(Monitor(every_epochs=0), manifest, 10.0, 0) is None
    assert watched_scans(Monitor(split="nowhere"), manifest, 10.0, 0) is None
    found = watched_scans(Monitor(split="downstream", every_epochs=0.5, max_scans=20), manifest, 10.0, 0)
    assert found is not None
    assert (len(found.rows), found.every_steps) == (20, 5)
    assert set(manifest.scans["split"].iloc[found.rows]) == {"downstream"}
    assert np.array_equal(found.labels, manifest.scans["age"].to_numpy(np.float32)[found.rows])
    with pytest.raises(UserError, match=r"monitor.proxy='sex' is no number"):
        watched_scans(Monitor(split="downstream", proxy="sex"), manifest, 10.0, 0)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_no_weight(trained, what):
    trained.train()
    before = engine.encoder_state(trained)
    views = torch.randn(2, 4, 1, 12, 12, 12, generator=torch.Generator().manual_seed(0))

    def loss(embeddings, temperature, batch):
        return embeddings.sum() * float("nan") if what == "loss" else (embeddings.sum() * 0.0).sqrt()

    with pytest.raises(NotFinite, match=f"step 3: the {what} is"):
        train_step(trained, loss, {"views": views}, 3, torch.float32)
    after = engine.encoder_state(trained)
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_votes_are_added_up(trained):
    views = torch.randn(2, 4, 1, 12, 12, 12, generator=torch.Generator().manual_seed(0))
    trained.optimizer.zero_grad()
    figures, sums = train_step(
        trained, lambda z, temperature, batch: z.square().mean(), {"views": views}, 0, torch.float32, None, [15.0, 0.0]
    )
    assert sums == [15.0, 0.0]
    assert figures["loss"] > 0
