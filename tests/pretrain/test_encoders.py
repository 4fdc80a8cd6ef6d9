"""Encoders: shapes, published size, options that fail by name."""

from __future__ import annotations

import pytest
import torch

from infra.errors import UserError
from pretrain.config import load_recipe
from pretrain.encoders import ENCODERS, build_encoder
from pretrain.model import ContrastiveModel, Projector, build_model


@pytest.mark.parametrize("name", sorted(ENCODERS))
@pytest.mark.parametrize("shape", [(30, 36, 30), (32, 32, 32)])
def test_features_have_the_announced_size(name, shape):
    encoder = build_encoder(name, {"norm": "group"}).eval()
    with torch.no_grad():
        features = encoder(torch.randn(2, 1, *shape))
    assert features.shape == (2, encoder.feature_size)
    assert features.isfinite().all()


@pytest.mark.parametrize("name", sorted(ENCODERS))
@pytest.mark.parametrize("norm", ["group", "instance"])
def test_features_of_a_scan_do_not_depend_on_the_batch_without_batch_statistics(name, norm):
    torch.manual_seed(0)
    encoder = build_encoder(name, {"norm": norm}).double().train()
    volumes = torch.randn(3, 1, 64, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(encoder(volumes)[:1], encoder(volumes[:1]))
    assert not any(isinstance(m, torch.nn.BatchNorm3d) for m in encoder.modules())


def test_densenet121_has_the_published_number_of_parameters():
    encoder = build_encoder("densenet121", {})
    model = ContrastiveModel(encoder, Projector(1024, 512, 128))
    assert sum(p.numel() for p in model.parameters()) == 11_831_040
    assert not any("norm5" in name for name in model.state_dict())


def test_densenet121_ends_in_the_published_feature_map():
    encoder = build_encoder("densenet121", {"norm": "group"}).eval()
    with torch.no_grad():
        assert encoder.trunk(torch.zeros(1, 1, 121, 145, 121)).shape == (1, 1024, 3, 4, 3)


def test_block_recomputation_changes_no_gradient():
    torch.manual_seed(0)
    plain = build_encoder("densenet121", {"norm": "group"})
    saving = build_encoder("densenet121", {"norm": "group", "checkpointing": True})
    saving.load_state_dict(plain.state_dict())
    volumes = torch.randn(2, 1, 32, 32, 32)
    for network in (plain, saving):
        network(volumes).square().sum().backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_width_scales_the_features():
    assert build_encoder("resnet18", {"width": 0.25}).feature_size == 128


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("densnet121", {}, r"encoder.name='densnet121' is not known \(did you mean 'densenet121'\?\)"),
        ("resnet18", {"widht": 1}, r"encoder.options.widht is no option of resnet18 \(did you mean 'width'\?\)"),
        ("resnet18", {"norm": "grop"}, r"encoder.options.norm='grop' is not known \(did you mean 'group'\?\)"),
    ],
)
def test_unknown_names_fail(name, options, text):
    with pytest.raises(UserError, match=text):
        build_encoder(name, options)


def test_model_is_a_function_of_the_seed_and_leaves_the_global_generator_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    small = ["--encoder.options={width: 0.25}"]
    a, b = (build_model(load_recipe("demo-cpu", small)) for _ in range(2))
    c = build_model(load_recipe("demo-cpu", [*small, "--run.seed=1"]))
    assert torch.equal(torch.rand(3), expected)
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in (a, b, c)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_model_keeps_views_apart():
    model = build_model(load_recipe("demo-cpu", ["--encoder.options={width: 0.25}"])).eval()
    views = torch.randn(2, 3, 1, 16, 16, 16)
    with torch.no_grad():
        both, temperature = model(views)
        assert temperature is None
        assert both.shape == (2, 3, 128)
        torch.testing.assert_close(both[1], model(views[1:].expand(2, -1, -1, -1, -1, -1))[0][0])
