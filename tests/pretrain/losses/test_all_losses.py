"""Every loss with every kernel, option and size of tiles, against its naive version, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from infra.errors import UserError
from pretrain.kernels import KERNELS
from pretrain.losses.contrastive import LOSSES
from pretrain.losses.proxies import build_kernel
from tests.reference import naive

KERNEL_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "gaussian": ("gaussian", {"bandwidth": 8.0}),
    "simclr": ("gaussian", {"bandwidth": 0.0}),
    "epanechnikov": ("epanechnikov", {"bandwidth": 30.0}),
    "exponential": ("exponential", {"bandwidth": 8.0}),
    "cauchy": ("cauchy", {"bandwidth": 8.0}),
    "linear": ("linear", {"bandwidth": 30.0}),
    "cosine": ("cosine", {"bandwidth": 30.0}),
    "same": ("same", {}),
    "same-softly": ("same", {"otherwise": 0.25}),
    "different": ("different", {"same": 0.5}),
}
# Two scans of subjects 0 and 2.
SUBJECTS = (0, 1, 0, 2, 3, 2)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "warm": {"temperature": 0.7},
    # 1/τ is above SAFE_LOGIT, so that the tiled form needs the maximum of each row.
    "cold": {"temperature": 0.002},
    "column": {"normalization": "column"},
    "subjects": {"subjects": SUBJECTS},
    "cross-view": {"cross_view": True},
    "cross-view-column": {"cross_view": True, "normalization": "column"},
    "subjects-column": {"subjects": SUBJECTS, "normalization": "column"},
    "subjects-cross-view": {"subjects": SUBJECTS, "cross_view": True},
    "ridge": {"ridge": 0.05, "scale": 3.0},
}
TILES = [None, 1, 2, 4, "auto"]


def has_option(loss: str, option: str) -> bool:
    if "column" in option:
        return loss == "y-aware"
    if loss == "decoupled-uniformity":
        return option in ("plain", "subjects", "ridge")
    return option != "ridge"


CASES = [(loss, option) for loss in LOSSES for option in OPTIONS if has_option(loss, option)]


def batch(scans: int = 6, depth: int = 5, missing: bool = True) -> tuple[Tensor, Tensor]:
    """Views (2, B, D) and ages (B, 1): scans 0 and 1 have the same age; the age of scan 4 is missing."""
    rng = np.random.default_rng(scans)
    views = torch.from_numpy(rng.standard_normal((2, scans, depth)))
    ages = torch.from_numpy(np.round(rng.uniform(6.0, 88.0, (scans, 1)), 1))
    if scans > 4:
        ages[1] = float(ages[0])
        ages[4] = math.nan if missing else ages[4]
    return views.requires_grad_(), ages


def arguments(option: str) -> dict[str, Any]:
    return {k: torch.tensor(v) if k == "subjects" else v for k, v in OPTIONS[option].items()}


def value_and_gradient(value: Tensor, views: Tensor) -> tuple[float, Tensor]:
    (gradient,) = torch.autograd.grad(value, views)
    return value.item(), gradient


def assert_equal(found: tuple[float, Tensor], expected: tuple[float, Tensor], rtol: float) -> None:
    assert found[0] == pytest.approx(expected[0], rel=rtol, abs=rtol)
    scale = expected[1].abs().max().item()
    torch.testing.assert_close(found[1], expected[1], rtol=0.0, atol=rtol * max(scale, 1e-3))


@pytest.mark.parametrize("case", KERNEL_OPTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_with_every_kernel_equals_the_naive_loops(loss: str, case: str) -> None:
    name, options = KERNEL_OPTIONS[case]
    views, ages = batch()
    twin = naive.TWINS[loss](views, ages, naive.pair_weight(name, **options))
    expected = value_and_gradient(twin, views)
    for tile in (None, 2):
        found = LOSSES[loss](views, ages, kernel=KERNELS[name](**options), tile=tile)
        assert_equal(value_and_gradient(found, views), expected, 1e-10)


@pytest.mark.parametrize("tile", [None, 2])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_with_a_product_of_kernels_equals_the_naive_loops(loss: str, tile: int | None) -> None:
    """Age and head size (continuous) times sex (a category); each is missing for one scan, with a weight of its own or 0."""
    views, ages = batch(7)
    sex = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, math.nan, 0.0], dtype=torch.float64)
    size = torch.tensor([1.4, 1.5, math.nan, 1.3, 1.6, 1.5, 1.4], dtype=torch.float64)
    proxies = torch.stack([ages[:, 0], sex, size], dim=1)
    recipe = {
        "age": {"kernel": "gaussian", "bandwidth": 20.0},
        "sex": {"kernel": "same", "otherwise": 0.3, "missing": 0.6},
        "size": {"kernel": "cauchy", "bandwidth": 0.1, "missing": 1.0},
    }

    def weight(a: Sequence[float], b: Sequence[float]) -> float:
        unknown = [math.isnan(x) or math.isnan(y) for x, y in zip(a, b, strict=True)]
        by_age = 0.0 if unknown[0] else math.exp(-0.5 * ((a[0] - b[0]) / 20.0) ** 2)
        by_sex = 0.6 if unknown[1] else (1.0 if a[1] == b[1] else 0.3)
        by_size = 1.0 if unknown[2] else 1 / (1 + ((a[2] - b[2]) / 0.1) ** 2)
        return by_age * by_sex * by_size

    expected = value_and_gradient(naive.TWINS[loss](views, proxies, weight), views)
    found = LOSSES[loss](views, proxies, kernel=build_kernel(recipe), tile=tile)
    assert_equal(value_and_gradient(found, views), expected, 1e-10)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("loss", "option"), CASES)
def test_every_loss_with_every_option_and_size_of_tiles_equals_the_naive_loops(
    loss: str, option: str, tile: Any
) -> None:
    views, ages = batch()
    twin = naive.TWINS[loss](views, ages, naive.pair_weight("gaussian", 8.0), **OPTIONS[option])
    kernel = KERNELS["gaussian"](bandwidth=8.0)
    found = LOSSES[loss](views, ages, kernel=kernel, tile=tile, **arguments(option))
    assert_equal(value_and_gradient(found, views), value_and_gradient(twin, views), 1e-10)


@pytest.mark.parametrize("tile", [1, 7, 16, 64, "auto"], ids=str)
@pytest.mark.parametrize(("loss", "option"), CASES)
def test_the_tiled_form_equals_the_plain_form_to_1e_12(loss: str, option: str, tile: Any) -> None:
    views, ages = batch(scans=45, depth=16)
    options = {**arguments(option), "kernel": KERNELS["gaussian"](bandwidth=8.0)}
    if "subjects" in options:
        options["subjects"] = torch.arange(45) // 2
    plain = LOSSES[loss](views, ages, **options)
    tiled = LOSSES[loss](views, ages, tile=tile, **options)
    assert_equal(value_and_gradient(tiled, views), value_and_gradient(plain, views), 1e-12)


@pytest.mark.parametrize("tile", [None, 2])
@pytest.mark.parametrize(("loss", "option"), CASES)
def test_the_gradient_in_the_embeddings_passes_gradcheck(loss: str, option: str, tile: int | None) -> None:
    views, ages = batch()
    kernel = KERNELS["gaussian"](bandwidth=8.0)
    options = {"temperature": 0.3, **arguments(option)}
    if loss == "decoupled-uniformity":
        del options["temperature"]
    assert torch.autograd.gradcheck(lambda z: LOSSES[loss](z, ages, kernel=kernel, tile=tile, **options), views)


@pytest.mark.parametrize("tile", [None, 2, "auto"])
@pytest.mark.parametrize("option", ["plain", "column", "cross-view", "subjects-cross-view"])
@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "decoupled-uniformity"])
def test_the_gradient_in_the_temperature_passes_gradcheck(loss: str, option: str, tile: Any) -> None:
    if not has_option(loss, option):
        return
    views, ages = batch()
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    options = {"kernel": KERNELS["gaussian"](bandwidth=8.0), "tile": tile, **arguments(option)}
    fixed = views.detach()
    assert torch.autograd.gradcheck(lambda tau: LOSSES[loss](fixed, ages, temperature=tau, **options), temperature)


@pytest.mark.parametrize("tile", [None, 1, "auto"], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", LOSSES)
def test_unusual_batches_give_finite_values_and_gradients(loss: str, dtype: torch.dtype, tile: Any) -> None:
    _, ages = batch(6)
    single = torch.ones(2, 1, 5, dtype=dtype)
    zeros = torch.zeros(2, 6, 5, dtype=dtype)
    some = torch.cat([zeros[:, :3], torch.ones(2, 3, 5, dtype=dtype)], dim=1)
    known, equal, missing = ages.nan_to_num(40.0), torch.full_like(ages, 40.0), torch.full_like(ages, math.nan)
    for views in (single, zeros, torch.ones(2, 6, 5, dtype=dtype), some):
        for proxies in (known, equal, missing):
            for bandwidth in (0.0, 1e-3, 1e6):
                leaf = views.clone().requires_grad_()
                kernel = KERNELS["gaussian"](bandwidth=bandwidth)
                value = LOSSES[loss](leaf, proxies[: views.shape[1]], kernel=kernel, tile=tile)
                value.backward()
                assert torch.isfinite(value)
                assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("tile", [None, 4, "auto"], ids=str)
@pytest.mark.parametrize("temperature", [1e-4, 1e-2, 1e3])
@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "decoupled-uniformity"])
def test_huge_and_tiny_logits_give_the_exact_value(loss: str, temperature: float, tile: Any) -> None:
    views, ages = batch(9)
    kernel = KERNELS["gaussian"](bandwidth=8.0)
    exact = LOSSES[loss](views, ages, kernel=kernel, temperature=temperature).item()
    leaf = views.detach().float().requires_grad_()
    value = LOSSES[loss](leaf, ages, kernel=kernel, temperature=temperature, tile=tile)
    value.backward()
    assert value.item() == pytest.approx(exact, rel=1e-4)
    assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_views_are_compared_in_float32_also_under_autocast(loss: str) -> None:
    views, ages = batch(9)
    kernel = KERNELS["gaussian"](bandwidth=8.0)
    half = views.detach().bfloat16()
    for tile in (None, 4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = LOSSES[loss](half, ages, kernel=kernel, tile=tile)
        assert found.dtype == torch.float32
        exact = LOSSES[loss](half.double(), ages, kernel=kernel)
        assert found.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_order_of_the_scans_does_not_matter(loss: str) -> None:
    views, ages = batch(9)
    order = torch.tensor([3, 1, 8, 5, 0, 2, 7, 4, 6])
    kernel = KERNELS["gaussian"](bandwidth=8.0)
    expected = LOSSES[loss](views, ages, kernel=kernel).item()
    assert LOSSES[loss](views[:, order], ages[order], kernel=kernel).item() == pytest.approx(expected, rel=1e-12)


def test_rank_n_contrast_depends_only_on_the_order_of_the_weights() -> None:
    views, ages = batch()
    expected = naive.rank_n_contrast(views, ages, naive.pair_weight("cauchy", 1.0))
    assert LOSSES["rank-n-contrast"](views, ages).item() == pytest.approx(expected.item(), rel=1e-12)
    wide = LOSSES["rank-n-contrast"](views, ages, kernel=KERNELS["exponential"](bandwidth=50.0))
    assert wide.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("tile", [0, -1, 2.5, "small"])
def test_a_wrong_tile_is_refused(tile: Any) -> None:
    views, ages = batch()
    with pytest.raises(UserError, match="tile="):
        LOSSES["y-aware"](views, ages, kernel=KERNELS["gaussian"](bandwidth=8.0), tile=tile)


def test_wrong_subjects_and_a_negative_ridge_are_refused() -> None:
    views, ages = batch()
    with pytest.raises(UserError, match="subjects has shape"):
        LOSSES["y-aware"](views, ages, kernel=KERNELS["gaussian"](bandwidth=8.0), subjects=torch.ones(3))
    with pytest.raises(UserError, match="ridge=-1"):
        LOSSES["decoupled-uniformity"](views, ages, kernel=KERNELS["gaussian"](bandwidth=8.0), ridge=-1)
