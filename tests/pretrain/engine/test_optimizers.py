"""The learning rate of each parameter; LAMB and LARS against NumPy; saved optimisers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from pretrain.config import OptimizerSection
from pretrain.encoders import build_encoder
from pretrain.encoders.resnet import RESNETS
from pretrain.engine.layerwise import Lamb, Lars
from pretrain.engine.optimizers import build_optimizer, depth_of, parameter_groups
from pretrain.losses.temperature import Temperature
from pretrain.model import ContrastiveModel, Projector
from tests.pretrain.encoders.names import EACH_ENCODER
from tests.reference import optimizers as naive

DEPTHS = {"densenet121": 4, **dict.fromkeys(RESNETS, 4), "unet": 4, "resenc-l": 6, "vit-small": 12, "vit-base": 12,
          "vit-large": 24, "swin-unetr": 4}  # fmt: skip


def network(name: str, **options: object) -> ContrastiveModel:
    """A model on the meta device, without memory for its weights, if the encoder can be built there."""
    with torch.device("cpu" if name == "swin-unetr" else "meta"):
        encoder = build_encoder(name, dict(options))
        return ContrastiveModel(encoder, Projector(int(encoder.feature_size), 8, 4), Temperature())


@pytest.mark.parametrize("name", EACH_ENCODER)
def test_layer_decay_reaches_every_block_of_every_encoder_in_order(name):
    model = network(name)
    depths = [depth_of(parameter) for parameter, _ in model.encoder.named_parameters()]
    counted = {depth for depth in depths if depth is not None}
    assert counted == set(range(DEPTHS[name] + 1))
    # The blocks are in order, and none holds most of the parameters.
    inside = [depth for depth in depths if depth]
    assert inside == sorted(inside)
    assert max(inside.count(depth) for depth in counted) < len(depths) * 0.75
    groups = parameter_groups(model, OptimizerSection(lr=1.0, layer_decay=0.5))
    rates = {name: group["lr"] for group in groups for name in group["names"]}
    assert rates["projector.0.weight"] == 1.0
    last = next(n for n, _ in model.encoder.named_parameters() if depth_of(n) == DEPTHS[name])
    assert rates[f"encoder.{last}"] == 0.5
    assert rates["encoder." + next(n for n, _ in model.encoder.named_parameters() if depth_of(n) == 0)] == 0.5 ** (
        DEPTHS[name] + 1
    )
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert groups[0]["lr"] == 1.0


def test_the_vits_last_norm_trains_at_the_full_rate():
    groups = parameter_groups(network("vit-small"), OptimizerSection(lr=1.0, layer_decay=0.5))
    rates = {name: group["lr"] for group in groups for name in group["names"]}
    assert rates["encoder.trunk.norm.weight"] == 1.0
    assert rates["encoder.trunk.blocks.11.norm1.weight"] == 0.5


@pytest.mark.parametrize("name", ["adam", "lamb"])
def test_without_layer_decay_all_groups_have_the_same_rate(name):
    groups = parameter_groups(network("resnet18", norm="group"), OptimizerSection(name=name, weight_decay=0.1))
    assert {group["lr"] for group in groups} == {OptimizerSection().lr}
    plain = {n for group in groups if group.get("weight_decay") == 0.0 for n in group["names"]}
    assert "temperature.log_temperature" in plain
    assert ("encoder.trunk.bn1.weight" in plain) == (name == "lamb")
    assert "projector.0.weight" not in plain
    assert [group.get("scaled", True) for group in groups].count(False) == (2 if name == "lamb" else 0)


def train(optimizer, weights, gradients):
    for step in range(len(gradients[0])):
        for parameter, series in zip(weights, gradients, strict=True):
            parameter.grad = torch.from_numpy(series[step]).float()
        optimizer.step()
    return [w.detach().double().numpy() for w in weights]


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize(("kind", "twin", "lr"), [(Lamb, naive.lamb, 0.05), (Lars, naive.lars, 3.0)])
def test_lamb_and_lars_follow_their_papers(kind, twin, lr, decay):
    source = np.random.default_rng(0)
    shapes = [(4, 3), (2, 3, 1, 2), (5,)]
    start = [source.normal(size=shape) for shape in shapes]
    start[1][:] = 0.0  # the step of a layer whose weights are 0 is not scaled
    gradients = [source.normal(size=(6, *shape)) for shape in shapes]
    weights = [nn.Parameter(torch.from_numpy(w).float()) for w in start]
    more = {"betas": (0.9, 0.999)} if kind is Lamb else {}
    groups = [{"params": weights[:2]}, {"params": weights[2:], "scaled": False, "weight_decay": 0.0}]
    found = train(kind(groups, lr=lr, weight_decay=decay, **more), weights, gradients)
    for number, (w, g) in enumerate(zip(start, gradients, strict=True)):
        scaled = number < 2
        expected = twin(w, g, lr, decay=decay if scaled else 0.0, scaled=scaled)
        np.testing.assert_allclose(found[number], expected, rtol=2e-5, atol=2e-6)
        assert np.abs(expected - w).max() > 1e-3


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "lamb", "lars"])
def test_an_optimiser_restored_from_its_state_takes_the_same_steps(name):
    def start():
        torch.manual_seed(1)
        model = ContrastiveModel(nn.Linear(3, 4), Projector(4, 5, 2))
        return model, build_optimizer(
            OptimizerSection(name=name, lr=0.1), parameter_groups(model, OptimizerSection(name=name))
        )

    def step(model, optimizer, number):
        torch.manual_seed(number)
        model.projector(model.encoder(torch.randn(6, 3))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = start()
    for number in range(6):
        step(model, optimizer, number)
        if number == 2:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other, again = start()
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    for number in range(3, 6):
        step(other, again, number)
    for restored, original in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(restored, original)
