"""The trained network: its weights depend on the seed, and it keeps the two views separate."""

from __future__ import annotations

import torch

from pretrain.config import load_recipe
from pretrain.model import build_model


def test_the_weights_depend_only_on_the_seed_and_the_global_generator_is_untouched():
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


def test_the_model_keeps_the_views_separate():
    model = build_model(load_recipe("demo-cpu", ["--encoder.options={width: 0.25}"])).eval()
    views = torch.randn(2, 3, 1, 16, 16, 16)
    with torch.no_grad():
        both, temperature = model(views)
        assert temperature is None
        assert both.shape == (2, 3, 128)
        torch.testing.assert_close(both[1], model(views[1:].expand(2, -1, -1, -1, -1, -1))[0][0])
