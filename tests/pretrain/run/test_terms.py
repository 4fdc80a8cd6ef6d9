"""Further terms of the loss in a recipe: what is refused, and that encoder, projector and loader stay as they are without."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from data_pipeline.loading.order import EveryScan
from data_pipeline.storage.manifest import Manifest
from infra.errors import UserError
from infra.settings import to_dict
from pretrain.config import load_recipe
from pretrain.encoders import ENCODERS
from pretrain.model import build_model
from pretrain.run.folder import check_same_network, check_same_recipe
from pretrain.run.plan import Plan

SMALL = ("--encoder.options={width: 0.25, norm: group}", "--batch.global=4")
BOTH = ("--loss.reconstruction={}", "--loss.dense.grid=2")


def plan_of(shards, *overrides):
    recipe = load_recipe("demo-cpu", [*SMALL, *overrides])
    manifest = Manifest.load(str(shards))
    rows = manifest.rows(split=["pretrain"])
    return Plan.build(recipe, manifest, rows, EveryScan(len(rows), 0, 4))


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["--loss.dense={}", "--loss.name=regression"], "loss.dense compares scans, and the loss regression does not"),
        (["--loss.reconstruction.masked=0", "--augmentation={preset: none}"], "masked=0 masks none of the 512 patches"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(shards, overrides, text):
    with pytest.raises(UserError, match=text) as caught:
        plan_of(shards, *overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("--loss.dense.gird=3", "unknown key 'loss.dense.gird' .did you mean 'grid'"),
        ("--loss.dense.grid=1", "loss.dense.grid: Input should be greater than or equal to 2, found 1"),
        ("--loss.reconstruction.weight=0", "loss.reconstruction.weight: .* greater than 0, found 0"),
        ("--loss.reconstruction.masked=1", "loss.reconstruction.masked: .* less than 1, found 1"),
    ],
)
def test_wrong_keys_and_values_are_refused(override, text):
    with pytest.raises(UserError, match=text):
        load_recipe("demo-cpu", [override])


def test_without_terms_the_loader_adds_nothing_and_cuts_out_by_itself(shards):
    plain, both = plan_of(shards), plan_of(shards, *BOTH)
    assert plain.view_details is None
    assert plain.loader_augmentation is plain.augmentation
    assert plain.objective.weights == {}
    assert both.objective.weights == {"contrastive": 1.0, "reconstruction": 1.0, "dense": 1.0}
    assert (both.view_details.masked, both.view_details.augmentation) == (0.25, both.augmentation)
    assert "cutout" in both.augmentation.operators
    assert "cutout" not in both.loader_augmentation.operators
    dense = plan_of(shards, "--loss.dense={}")
    assert dense.view_details.masked == 0.0
    assert dense.loader_augmentation == dense.augmentation


def test_encoder_and_projector_start_from_the_same_weights_with_and_without_terms():
    plain, both = (build_model(load_recipe("demo-cpu", [*SMALL, *more])) for more in ((), BOTH))
    weights = both.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in plain.state_dict().items())
    assert {name.split(".")[0] for name in weights.keys() - plain.state_dict().keys()} == {"decoder", "cells"}
    views = torch.randn(2, 3, 1, 16, 16, 16)
    with torch.no_grad():
        assert torch.equal(plain(views)[0], both(views)[0])


def test_the_decoder_sees_a_view_without_its_hidden_voxels():
    """Values of hidden voxels change the error, but neither the embeddings nor the cells."""
    model = build_model(load_recipe("demo-cpu", [*SMALL, *BOTH])).eval()
    views, masked = torch.randn(2, 1, 1, 16, 16, 16), torch.zeros(2, 1, 8, 8, 8, dtype=torch.bool)
    masked[:, :, 2] = True
    cutout, placement = torch.zeros(2, 1, 2, 3), torch.eye(3, 4).expand(2, 1, 3, 4)
    changed = views.clone()
    changed[..., 4:6, :, :] += 5.0
    with torch.no_grad():
        embeddings, _, errors, cells = model(views, masked, cutout, placement)
        again, _, more_errors, same_cells = model(changed, masked, cutout, placement)
    assert torch.equal(embeddings, again)
    assert torch.equal(cells, same_cells)
    assert (errors[..., 1] == 2 * 16 * 16).all()
    assert (more_errors[..., 0] > errors[..., 0]).all()
    assert not torch.equal(embeddings, model(views)[0])


def test_an_encoder_without_a_map_is_refused(monkeypatch):
    class Flat(nn.Module):
        feature_size = 4

    monkeypatch.setitem(ENCODERS, "flat", lambda *, norm="group": Flat())
    with pytest.raises(UserError, match=r"flat has no map_and_features: leave them out"):
        build_model(load_recipe("demo-cpu", ["--encoder={name: flat}", "--loss.dense={}"]))


@pytest.mark.parametrize("name", ["vit-small", pytest.param("swin-unetr", marks=pytest.mark.jobs), "densenet121"])
def test_every_parameter_of_the_terms_gets_a_gradient_also_with_transformers(name):
    options = "{norm: group}" if name == "densenet121" else "{}"
    recipe = load_recipe("demo-cpu", [f"--encoder={{name: {name}, options: {options}}}", *BOTH])
    model = build_model(recipe)
    masked = torch.rand(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.3
    views, placement = torch.randn(2, 1, 1, 34, 40, 33), torch.eye(3, 4).expand(2, 1, 3, 4)
    _, _, errors, cells = model(views, masked, torch.zeros(2, 1, 2, 3), placement)
    assert cells.shape == (2, 1, 8, recipe.projector.out)
    (errors[..., 0].sum() + cells.square().sum()).backward()
    for part in (model.decoder, model.cells):
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in part.parameters())
    assert any(p.grad is not None and p.grad.any() for p in model.encoder.parameters())


def test_a_checkpoint_must_have_the_same_terms_but_may_weigh_them_otherwise(tmp_path):
    plain, both = (load_recipe("demo-cpu", [*SMALL, *more]) for more in ((), BOTH))
    heavier = load_recipe("demo-cpu", [*SMALL, *BOTH, "--loss.dense.weight=3"])
    check_same_network(heavier, to_dict(both))
    for recipe, other in ((plain, both), (both, plain)):
        with pytest.raises(UserError, match="checkpoint of another network .loss.dense.weight was"):
            check_same_network(recipe, to_dict(other))
    output = f"--run.output={tmp_path}"
    load_recipe("demo-cpu", [*SMALL, *BOTH, output]).save(tmp_path / "recipe.yaml")
    check_same_recipe(load_recipe("demo-cpu", [*SMALL, *BOTH, output]))
    with pytest.raises(UserError, match="loss.dense.grid was 2, now 3"):
        check_same_recipe(load_recipe("demo-cpu", [*SMALL, *BOTH, output, "--loss.dense.grid=3"]))
