"""Kernels: formulas, symmetry, missing proxies, products, and wrong arguments."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import Tensor

from infra.errors import UserError
from pretrain.kernels import KERNELS, Kernel, product, with_missing
from tests.reference import naive

CONTINUOUS = ["gaussian", "epanechnikov", "exponential", "cauchy", "linear", "cosine"]


def make(name: str, proxies: int) -> Kernel:
    if name == "multivariate-gaussian":
        return KERNELS[name](covariance=torch.eye(proxies).tolist())
    return KERNELS[name](bandwidth=30.0) if name in CONTINUOUS else KERNELS[name]()


def proxies(scans: int, count: int = 1, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return 6.0 + 82.0 * torch.rand(scans, count, generator=source, dtype=torch.float64)


def by_loop(name: str, bandwidth: float, a: Tensor, b: Tensor) -> Tensor:
    weight = naive.pair_weight(name, bandwidth)
    return torch.tensor([[weight(x, y) for y in b.tolist()] for x in a.tolist()], dtype=torch.float64)


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("bandwidth", [0.5, 5.0, 40.0])
def test_continuous_kernels_equal_their_formulas(name: str, count: int, bandwidth: float) -> None:
    a, b = proxies(7, count), proxies(5, count, seed=1)
    found = KERNELS[name](bandwidth=bandwidth)(a, b)
    torch.testing.assert_close(found, by_loop(name, bandwidth, a, b), rtol=1e-12, atol=1e-15)


def test_a_gaussian_bandwidth_is_the_standard_deviation_not_its_square() -> None:
    weights = KERNELS["gaussian"](bandwidth=5.0)(torch.tensor([[30.0]]), torch.tensor([[30.0], [35.0], [40.0]]))
    torch.testing.assert_close(weights, torch.tensor([[1.0, math.exp(-0.5), math.exp(-2.0)]]))


@pytest.mark.parametrize("name", CONTINUOUS)
def test_weights_are_symmetric_and_fall_from_1_with_the_distance(name: str) -> None:
    ages = torch.linspace(20.0, 60.0, 41, dtype=torch.float64)[:, None]
    weights = KERNELS[name](bandwidth=8.0)(ages, ages)
    torch.testing.assert_close(weights, weights.T, rtol=0, atol=0)
    torch.testing.assert_close(weights.diagonal(), torch.ones(41, dtype=torch.float64))
    assert (weights[0].diff() <= 0).all()
    assert (weights >= 0).all()


@pytest.mark.parametrize("name", CONTINUOUS)
def test_bandwidth_zero_gives_weight_0_even_at_equal_ages(name: str) -> None:
    ages = torch.tensor([[30.0], [30.0], [50.0]])
    assert (KERNELS[name](bandwidth=0)(ages, ages) == 0).all()


@pytest.mark.parametrize("name", KERNELS)
def test_a_missing_proxy_has_weight_0_with_every_scan(name: str) -> None:
    kernel = make(name, 2)
    a = torch.tensor([[30.0, 1.0], [math.nan, 1.0], [31.0, math.nan]])
    weights = kernel(a, a)
    assert (weights[1:] == 0).all()
    assert (weights[:, 1:] == 0).all()
    assert torch.isfinite(weights).all()


def test_kernels_of_categories_compare_for_equality() -> None:
    sex = torch.tensor([[0.0], [1.0], [0.0]])
    equal = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    torch.testing.assert_close(KERNELS["same"]()(sex, sex), equal)
    torch.testing.assert_close(KERNELS["same"](otherwise=0.25)(sex, sex), 0.25 + 0.75 * equal)
    torch.testing.assert_close(KERNELS["different"]()(sex, sex), 1 - equal)
    torch.testing.assert_close(KERNELS["different"](same=0.5)(sex, sex), 1 - 0.5 * equal)
    both = torch.tensor([[0.0, 3.0], [0.0, 4.0]])
    torch.testing.assert_close(KERNELS["same"]()(both, both), torch.eye(2))


def test_a_bandwidth_per_proxy_scales_each_proxy() -> None:
    a = proxies(6, 2)
    scaled = a / torch.tensor([5.0, 20.0], dtype=torch.float64)
    found = KERNELS["gaussian"](bandwidth=[5.0, 20.0])(a, a)
    torch.testing.assert_close(found, KERNELS["gaussian"](bandwidth=1.0)(scaled, scaled))


def test_the_multivariate_gaussian_equals_its_formula() -> None:
    covariance = torch.tensor([[25.0, 30.0], [30.0, 100.0]], dtype=torch.float64)
    a, b = proxies(6, 2), proxies(4, 2, seed=1)
    found = KERNELS["multivariate-gaussian"](covariance=covariance.tolist())(a, b)
    for i in range(6):
        for j in range(4):
            difference = a[i] - b[j]
            expected = math.exp(-0.5 * float(difference @ torch.linalg.inv(covariance) @ difference))
            assert found[i, j].item() == pytest.approx(expected, rel=1e-9, abs=1e-300)
    diagonal = KERNELS["multivariate-gaussian"](covariance=[[25.0, 0.0], [0.0, 400.0]])
    torch.testing.assert_close(diagonal(a, b), KERNELS["gaussian"](bandwidth=[5.0, 20.0])(a, b))


@pytest.mark.parametrize(
    "covariance", [[[1.0, 2.0], [2.0, 1.0]], [[1.0, 0.1], [0.2, 1.0]], [[1.0, 0.0]], [], [[math.nan]]]
)
def test_a_wrong_covariance_is_refused(covariance: list[list[float]]) -> None:
    with pytest.raises(UserError, match="covariance="):
        KERNELS["multivariate-gaussian"](covariance=covariance)


def test_a_product_multiplies_one_kernel_per_proxy() -> None:
    scans = torch.stack([proxies(6)[:, 0], torch.tensor([0.0, 1, 0, 1, 0, math.nan], dtype=torch.float64)], dim=1)
    age, sex = KERNELS["gaussian"](bandwidth=20.0), KERNELS["same"](otherwise=0.5)
    found = product([age, sex])(scans, scans)
    torch.testing.assert_close(found, age(scans[:, :1], scans[:, :1]) * sex(scans[:, 1:], scans[:, 1:]))
    assert (found[5] == 0).all()
    with pytest.raises(UserError, match=r"compare the proxy columns \[0, 1\]"):
        product([age, sex])(scans[:, :1], scans[:, :1])


@pytest.mark.parametrize("name", KERNELS)
def test_pairs_with_a_missing_proxy_get_the_weight_that_is_set_for_them(name: str) -> None:
    a = torch.tensor([[30.0, 1.0], [math.nan, 1.0], [31.0, 0.0], [31.0, math.nan]])
    plain, found = make(name, 2)(a, a), with_missing(make(name, 2), 0.25)(a, a)
    known = torch.tensor([0, 2])
    assert torch.equal(found[known][:, known], plain[known][:, known])
    assert (found[[1, 3]] == 0.25).all()
    assert (found[:, [1, 3]] == 0.25).all()
    with pytest.raises(UserError, match="missing=1.5"):
        with_missing(make(name, 2), 1.5)


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_keeps_the_type_and_does_not_change_its_input(name: str) -> None:
    kernel = make(name, 1)
    a = proxies(4).float()
    before = a.clone()
    weights = kernel(a, a[:0])
    assert weights.shape == (4, 0)
    assert kernel(a, a).dtype == torch.float32
    assert torch.equal(a, before)
    assert torch.equal(pickle.loads(pickle.dumps(kernel))(a, a), kernel(a, a))


@pytest.mark.parametrize("bandwidth", [-1.0, math.nan, math.inf, "wide", [], [5.0, 0.0]])
def test_a_wrong_bandwidth_is_refused(bandwidth: object) -> None:
    with pytest.raises(UserError, match="bandwidth="):
        KERNELS["gaussian"](bandwidth=bandwidth)


def test_wrong_shapes_are_refused() -> None:
    kernel = KERNELS["gaussian"](bandwidth=5.0)
    with pytest.raises(UserError, match=r"\(A, P\) and \(B, P\)"):
        kernel(torch.ones(3), torch.ones(3))
    with pytest.raises(UserError, match=r"\(A, P\) and \(B, P\)"):
        kernel(torch.ones(3, 1), torch.ones(3, 2))
    with pytest.raises(UserError, match="2 values for 1 proxies"):
        KERNELS["gaussian"](bandwidth=[5.0, 5.0])(torch.ones(3, 1), torch.ones(3, 1))
    with pytest.raises(UserError, match="otherwise=2"):
        KERNELS["same"](otherwise=2)
