"""Poolings that keep places in the monitor and in the plan of a run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data_pipeline.loading.loader import volumes
from data_pipeline.storage.manifest import Manifest
from infra.errors import UserError
from pretrain.config import load_recipe
from pretrain.encoders.layers import PooledEncoder
from pretrain.encoders.pooling import POOLINGS
from pretrain.engine import engine
from pretrain.model import build_model
from pretrain.run.monitor import encode
from pretrain.run.plan import make_plan
from pretrain.run.step import lr_factor
from pretrain.weights.encoder import Encoder
from pretrain.weights.weight_shapes import empty_state
from pretrain.weights.write import write_encoder
from tests.cohorts import GRID
from tests.pretrain.weights.encoders import CONFIG, PREPROCESSING

SMALL = ["--encoder.options={width: 0.25, norm: group}", "--batch.global=4"]


def test_the_monitor_pools_the_last_map_as_its_recipe_says(one_rank, shards):
    manifest, recipe = Manifest.load(shards), load_recipe("demo-cpu", SMALL)
    trained = engine.build_engine(recipe, build_model(recipe), lr_factor(recipe.optimizer, 20, 10))
    torch.manual_seed(0)
    trunk = torch.nn.Sequential(torch.nn.Conv3d(1, 3, 3, stride=2, padding=1))
    network = PooledEncoder(trunk, 3, name="small", norm="group", pooling="mean")
    rows = np.array([5, 0, 9])
    found = encode(
        trained,
        manifest,
        rows,
        device=torch.device("cpu"),
        dtype=torch.float32,
        batch=2,
        encoder=network,
        pooling="grid2",
    )
    with torch.no_grad():
        maps = torch.cat([trunk(part) for _, part in volumes(manifest, rows, 1)])
    np.testing.assert_allclose(found, POOLINGS["grid2"](maps).numpy(), rtol=1e-4, atol=1e-5)
    assert found.shape == (3, 3 * 8)


@pytest.mark.parametrize(("pooling", "places"), [("grid2", 8), ("none", 12)])
def test_the_projector_takes_every_place_and_a_written_encoder_keeps_them(tmp_path, pooling, places):
    options = {"width": 0.125, "norm": "group", "pooling": pooling, "grid": [64, 96, 64]}
    text = ", ".join(f"{name}: {value}" for name, value in options.items())
    recipe = load_recipe("demo-cpu", [f"--encoder.options={{{text}}}"])
    model = build_model(recipe)
    assert model.projector[0].in_features == 64 * places
    embeddings, _ = model(torch.randn(2, 1, 1, 64, 96, 64))
    embeddings.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    shapes = {name: value.shape for name, value in model.encoder.state_dict().items()}
    assert {name: value.shape for name, value in empty_state("resnet18", options).items()} == shapes
    config = {**CONFIG, "encoder": {"name": "resnet18", "options": options}, "feature_size": 64 * places}
    grid = {**GRID.to_dict(), "shape": [64, 96, 64]}
    write_encoder(tmp_path / "encoder", model.encoder.state_dict(), config, {**PREPROCESSING, "grid": grid})
    encoder, volumes = Encoder.from_pretrained(tmp_path / "encoder"), torch.randn(1, 1, 64, 96, 64)
    with torch.no_grad():
        assert torch.equal(encoder(volumes), model.encoder.eval()(volumes))
    assert encoder.feature_size == 64 * places


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("--monitor.pooling=grid", r"monitor.pooling='grid' is not known \(did you mean 'grid\d'\?\); allowed: mean"),
        (
            "--monitor.pooling=grid2",
            "pooling grid2 needs a map of 2 or more positions along each side, and the map is 1x1x1",
        ),
        ("--encoder.options.pooling=grid3", "pooling grid3 needs a map of 3 or more"),
        ("--encoder.options.pooling=none", "pooling='none' needs encoder.options.grid"),
        (
            "--encoder.options={pooling: none, grid: [30, 36, 30]}",
            r"encoder.options.grid=\[30, 36, 30\] is not the grid of the scans, \[\d+, \d+, \d+\], which pooling none needs",
        ),
        (
            "--encoder={name: vit-small, options: {pooling: none}}",  # whose default grid is that of the paper
            r"encoder.options.grid=\[121, 145, 121\] is not the grid of the scans",
        ),
    ],
)
def test_a_pooling_that_does_not_fit_the_scans_is_refused_by_the_plan(shards, tmp_path, override, text):
    settings = [f"--data.shards={shards}", f"--run.output={tmp_path / 'run'}", "--monitor.every_epochs=1"]
    with pytest.raises(UserError, match=text):
        make_plan(load_recipe("demo-cpu", [*SMALL, *settings, "--monitor.split=downstream", override]), 1)
