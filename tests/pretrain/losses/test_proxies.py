"""A recipe's proxies section becomes a kernel: one kernel per proxy, products, and bandwidths by rule."""

from __future__ import annotations

import math

import pytest
import torch

from infra.errors import UserError
from pretrain.kernels import KERNELS, product
from pretrain.losses.proxies import bandwidth_by_rule, build_kernel, covariance_by_rule, proxy_columns


def scans() -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.rand(8, 3, generator=rng, dtype=torch.float64) * 40


def test_a_single_proxy_gives_its_own_kernel() -> None:
    ages = scans()[:, :1]
    kernel = build_kernel({"age": {"kernel": "gaussian", "bandwidth": 5.0}})
    assert torch.equal(kernel(ages, ages), KERNELS["gaussian"](bandwidth=5.0)(ages, ages))


def test_the_kernels_of_several_proxies_are_multiplied_in_the_order_of_the_recipe() -> None:
    both = scans()[:, :2].round(decimals=-1)
    recipe = {"age": {"kernel": "gaussian", "bandwidth": 5.0}, "site": {"kernel": "different", "same": 0.5}}
    expected = product([KERNELS["gaussian"](bandwidth=5.0), KERNELS["different"](same=0.5)])
    assert proxy_columns(recipe) == ["age", "site"]
    assert torch.equal(build_kernel(recipe)(both, both), expected(both, both))


def test_two_columns_joined_by_plus_share_a_covariance() -> None:
    values = scans()
    recipe = {
        "sex": {"kernel": "same", "otherwise": 0.5},
        "age+tiv": {"kernel": "multivariate-gaussian", "covariance": [[25.0, 5.0], [5.0, 100.0]]},
    }
    assert proxy_columns(recipe) == ["sex", "age", "tiv"]
    joint = KERNELS["multivariate-gaussian"](covariance=[[25.0, 5.0], [5.0, 100.0]])
    expected = KERNELS["same"](otherwise=0.5)(values[:, :1], values[:, :1]) * joint(values[:, 1:], values[:, 1:])
    torch.testing.assert_close(build_kernel(recipe)(values, values), expected)


@pytest.mark.parametrize(("rule", "factor"), [("scott", 1.0), ("silverman", 0.75)])
def test_the_bandwidth_rules_of_one_proxy_follow_their_formulas(rule: str, factor: float) -> None:
    ages = torch.tensor([20.0, 30.0, 45.0, 60.0, math.nan], dtype=torch.float64)
    expected = float(ages[:4].std()) * (4 * factor) ** (-1 / 5)
    assert bandwidth_by_rule(rule, ages) == pytest.approx(expected, rel=1e-12)
    kernel = build_kernel({"age": {"kernel": "gaussian", "bandwidth": rule}}, {"age": ages.tolist()})
    assert kernel == KERNELS["gaussian"](bandwidth=bandwidth_by_rule(rule, ages))


@pytest.mark.parametrize("rule", ["scott", "silverman"])
def test_the_bandwidth_rules_of_several_proxies_agree_with_scipy(rule: str) -> None:
    from scipy.stats import gaussian_kde

    values = scans()
    density = gaussian_kde(values.T.numpy(), bw_method=rule)
    torch.testing.assert_close(torch.tensor(covariance_by_rule(rule, values)), torch.tensor(density.covariance).float())
    columns = {"age": values[:, 0], "tiv": values[:, 1], "iqr": values[:, 2]}
    kernel = build_kernel({"age+tiv+iqr": {"kernel": "multivariate-gaussian", "covariance": rule}}, columns)
    assert kernel == KERNELS["multivariate-gaussian"](covariance=covariance_by_rule(rule, values))


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        ({}, "proxies is empty"),
        (
            {"age": {"kernel": "gausian", "bandwidth": 5.0}},
            r"age.kernel='gausian' is not known \(did you mean 'gaussian'",
        ),
        ({"age": {"bandwidth": 5.0}}, "age.kernel='None' is not known"),
        ({"age": {"kernel": "gaussian"}}, "proxies.age: kernel 'gaussian': .*bandwidth"),
        ({"age": {"kernel": "gaussian", "width": 5.0}}, "proxies.age: kernel 'gaussian': .*width"),
        ({"age": {"kernel": "gaussian", "bandwidth": "scott"}}, "'scott' needs the values of age"),
        ({"sex": {"kernel": "gaussian", "bandwidth": "scot"}}, "'scot' is not known .did you mean 'scott'"),
        ({"tiv": {"kernel": "gaussian", "bandwidth": "scott"}}, "needs scans with different values"),
    ],
)
def test_a_wrong_proxies_section_is_refused(recipe: dict[str, dict[str, object]], text: str) -> None:
    with pytest.raises(UserError, match=text):
        build_kernel(recipe, {"sex": [0.0, 1.0], "tiv": [1.4, 1.4]})
