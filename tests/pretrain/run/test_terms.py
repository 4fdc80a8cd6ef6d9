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
LAYER2 = ("--loss.reconstruction.layer=layer2", "--loss.dense.layer=layer2")


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
        (
            ["--loss.dense.layer=layer22"],
            r"loss.dense.layer='layer22' is not a block of resnet18 \(did you mean 'layer2'\?\); "
            "allowed: layer1, layer2, layer3, layer4, or null for the last map",
        ),
        (["--loss.reconstruction.layer=layer2.0"], r"loss.reconstruction.layer='layer2.0' is not a block of resnet18"),
        (
            ["--loss.dense={}"],
            "loss.dense: the last map of resnet18 has 1x1x1 positions for scans of 14x16x12 voxels, and at least 2 "
            "along each side are needed; set loss.dense.layer to an earlier block, as layer2, or leave loss.dense out",
        ),
        (
            ["--loss.reconstruction.layer=layer3"],
            "loss.reconstruction: the map of layer3 of resnet18 has 1x1x1 positions",
        ),
        (
            ["--encoder={name: vit-small}", "--loss.dense={}"],
            "scans of 14x16x12 voxels, .*; use scans of a finer spacing, or leave",
        ),
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
    plain, both = plan_of(shards), plan_of(shards, *BOTH, *LAYER2)
    assert plain.view_details is None
    assert plain.loader_augmentation is plain.augmentation
    assert plain.objective.weights == {}
    assert both.objective.weights == {"contrastive": 1.0, "reconstruction": 1.0, "dense": 1.0}
    assert (both.view_details.masked, both.view_details.augmentation) == (0.25, both.augmentation)
    assert "cutout" in both.augmentation.operators
    assert "cutout" not in both.loader_augmentation.operators
    dense = plan_of(shards, "--loss.dense={layer: layer2}")
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


def test_the_terms_have_the_sizes_of_the_maps_of_their_blocks():
    """At 6 mm the last map has two positions, and layer2 4 x 5 x 4, of 32 channels for a quarter of the width."""
    blocks = "--loss.reconstruction.layer=layer1", "--loss.dense.layer=layer2"
    model = build_model(load_recipe("demo-cpu", [*SMALL, *BOTH, *blocks]))
    assert (model.decoder[0].in_channels, model.decoder.doublings, model.cells[0].in_features) == (16, 2, 32)
    maps, _ = model.encoder.maps_and_features(torch.zeros(1, 1, 30, 36, 30), ["layer1", "layer2", None])
    assert [tuple(block_map.shape[1:]) for block_map in maps] == [(16, 8, 9, 8), (32, 4, 5, 4), (128, 1, 2, 1)]
    assert model.decoder(maps[0]).shape[2:] == (32, 36, 32)  # voxels of a padded volume


@pytest.mark.parametrize("options", ["", ", checkpointing: true", ", channels_last: true"])
def test_the_terms_of_a_block_train_it_and_what_is_before_it_alone(options):
    network = f"--encoder.options={{width: 0.25, norm: group{options}}}"
    model = build_model(load_recipe("demo-cpu", [network, *BOTH, *LAYER2]))
    masked = torch.rand(2, 2, 8, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.3
    views, placement = torch.randn(2, 2, 1, 30, 36, 30), torch.eye(3, 4).expand(2, 2, 3, 4)
    embeddings, _, errors, cells = model(views, masked, torch.zeros(2, 2, 2, 3), placement)
    (errors[..., 0].sum() + cells.square().sum()).backward(retain_graph=True)
    trained = {name.split(".")[2] for name, p in model.named_parameters() if p.grad is not None and "trunk" in name}
    assert trained == {"conv1", "bn1", "layer1", "layer2"}
    embeddings.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_cells_in_what_the_reconstruction_masks_are_not_shown_to_the_dense_loss():
    model = build_model(load_recipe("demo-cpu", [*SMALL, *BOTH, *LAYER2])).eval()
    views, masked = torch.randn(2, 1, 1, 16, 16, 16), torch.zeros(2, 1, 8, 8, 8, dtype=torch.bool)
    masked[1, :, :4] = True  # the low half of the second view
    with torch.no_grad():
        *_, cells = model(views, masked, torch.zeros(2, 1, 2, 3), torch.eye(3, 4).expand(2, 1, 3, 4))
    shown = cells[:, 0, :, -1].view(2, 2, 2, 2)
    assert shown[0].all()
    assert not shown[1, 0].any()


def test_an_encoder_without_a_map_is_refused(monkeypatch):
    class Flat(nn.Module):
        feature_size = 4

    monkeypatch.setitem(ENCODERS, "flat", lambda *, norm="group": Flat())
    with pytest.raises(UserError, match=r"flat has no maps_and_features: leave it out"):
        build_model(load_recipe("demo-cpu", ["--encoder={name: flat}", "--loss.dense={}"]))


@pytest.mark.parametrize("name", ["vit-small", pytest.param("swin-unetr", marks=pytest.mark.jobs), "densenet121"])
def test_every_parameter_of_the_terms_gets_a_gradient_also_with_transformers(name):
    options = "{norm: group}" if name == "densenet121" else "{}"
    recipe = load_recipe("demo-cpu", [f"--encoder={{name: {name}, options: {options}}}", *BOTH])
    model = build_model(recipe)
    masked = torch.rand(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.3
    views, placement = torch.randn(2, 1, 1, 34, 40, 33), torch.eye(3, 4).expand(2, 1, 3, 4)
    _, _, errors, cells = model(views, masked, torch.zeros(2, 1, 2, 3), placement)
    assert cells.shape == (2, 1, 8, recipe.projector.out + 1)
    assert set(cells[..., -1].unique().tolist()) <= {0.0, 1.0}
    (errors[..., 0].sum() + cells.square().sum()).backward()
    for part in (model.decoder, model.cells):
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in part.parameters())
    assert any(p.grad is not None and p.grad.any() for p in model.encoder.parameters())


def test_a_checkpoint_must_have_the_same_terms_but_may_weigh_them_otherwise(tmp_path):
    plain, both = (load_recipe("demo-cpu", [*SMALL, *more]) for more in ((), BOTH))
    heavier = load_recipe("demo-cpu", [*SMALL, *BOTH, "--loss.dense.weight=3"])
    check_same_network(heavier, to_dict(both))
    with pytest.raises(UserError, match="another network .loss.dense.layer was None, now 'layer2'"):
        check_same_network(load_recipe("demo-cpu", [*SMALL, *BOTH, "--loss.dense.layer=layer2"]), to_dict(both))
    for recipe, other in ((plain, both), (both, plain)):
        with pytest.raises(UserError, match="checkpoint of another network .loss.dense.weight was"):
            check_same_network(recipe, to_dict(other))
    output = f"--run.output={tmp_path}"
    load_recipe("demo-cpu", [*SMALL, *BOTH, output]).save(tmp_path / "recipe.yaml")
    check_same_recipe(load_recipe("demo-cpu", [*SMALL, *BOTH, output]))
    with pytest.raises(UserError, match="loss.dense.grid was 2, now 3"):
        check_same_recipe(load_recipe("demo-cpu", [*SMALL, *BOTH, output, "--loss.dense.grid=3"]))
