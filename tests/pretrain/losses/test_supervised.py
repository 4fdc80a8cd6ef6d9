"""Regression of the proxies as a loss: value of a naive loop, missing proxies, and the choice in a recipe."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from infra.errors import UserError
from pretrain.config import load_recipe
from pretrain.losses.supervised import regression, target_scale
from pretrain.run.folder import method_of
from pretrain.run.objective import loss_options


def naive(views, proxies, center, scale):
    total, known = 0.0, 0
    for scan in range(proxies.shape[0]):
        for p in range(proxies.shape[1]):
            if np.isnan(proxies[scan, p]):
                continue
            known += 1
            for view in range(2):
                total += (views[view, scan, p] - (proxies[scan, p] - center[p]) / scale[p]) ** 2
    return total / (2 * known)


def batch(scans, seed=0):
    source = torch.Generator().manual_seed(seed)
    views = torch.randn(2, scans, 5, generator=source, dtype=torch.float64)
    proxies = 20 + 40 * torch.rand(scans, 2, generator=source, dtype=torch.float64)
    proxies[0, 1] = torch.nan
    return views, proxies


def test_the_value_is_that_of_a_naive_loop():
    views, proxies = batch(7)
    moments = target_scale(proxies)
    found = regression(views, proxies, **moments)
    expected = naive(views.numpy(), proxies.numpy(), moments["center"].numpy(), moments["scale"].numpy())
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_only_the_first_outputs_get_a_gradient_and_a_missing_proxy_gives_none():
    views, proxies = batch(4)
    views.requires_grad_()
    regression(views, proxies, **target_scale(proxies)).backward()
    assert torch.count_nonzero(views.grad[..., 2:]) == 0
    assert torch.count_nonzero(views.grad[:, 0, 1]) == 0
    assert torch.count_nonzero(views.grad[..., :2]) == 2 * (4 * 2 - 1)
    nothing = regression(views, torch.full_like(proxies, torch.nan), **target_scale(proxies))
    assert float(nothing.detach()) == 0.0


def test_too_small_a_projector_and_constant_proxies_are_refused():
    views, proxies = batch(4)
    with pytest.raises(UserError, match="projector.out=1 is too small for 2 proxies"):
        regression(views[..., :1], proxies, **target_scale(proxies))
    with pytest.raises(UserError, match="needs scans with different values of every proxy"):
        target_scale(torch.ones(3, 1))


def test_a_recipe_chooses_regression_by_name():
    recipe = load_recipe("demo-cpu", ["--loss.name=regression"])
    assert method_of(recipe) == "age regression"
    assert loss_options(recipe.loss) == {}
    with pytest.raises(UserError, match="loss.cross_view is not an option of the loss regression"):
        loss_options(load_recipe("demo-cpu", ["--loss.name=regression", "--loss.cross_view=true"]).loss)
    with pytest.raises(UserError, match=r"loss.name='regresion' is not known \(did you mean 'regression'\?\)"):
        loss_options(load_recipe("demo-cpu", ["--loss.name=regresion"]).loss)
