"""y-Aware InfoNCE: naive loops, closed forms, and numerics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from infra.errors import UserError
from pretrain.kernels import KERNELS
from pretrain.losses.contrastive import LOSSES, global_loss, y_aware_infonce
from tests.reference import naive

GAUSSIAN = KERNELS["gaussian"](bandwidth=5.0)
KERNEL_CASES = {
    "gaussian": ("gaussian", {"bandwidth": 5.0}),
    "wide": ("gaussian", {"bandwidth": 50.0}),
    "simclr": ("gaussian", {"bandwidth": 0.0}),
    "epanechnikov": ("epanechnikov", {"bandwidth": 20.0}),
    "exponential": ("exponential", {"bandwidth": 5.0}),
    "cauchy": ("cauchy", {"bandwidth": 5.0}),
    "linear": ("linear", {"bandwidth": 20.0}),
    "cosine": ("cosine", {"bandwidth": 20.0}),
    "same": ("same", {}),
    "different": ("different", {}),
}


def batch(scans: int, depth: int = 6, seed: int = 0, missing: bool = False) -> tuple[Tensor, Tensor]:
    """Embeddings (2, B, D) with different norms, and ages (B, 1) with ties."""
    rng = np.random.default_rng(seed)
    views = torch.from_numpy(rng.standard_normal((2, scans, depth)) * rng.uniform(0.1, 10.0, (2, scans, 1)))
    ages = torch.from_numpy(np.round(rng.uniform(6.0, 88.0, (scans, 1)), 1))
    ages[: scans // 3] = float(ages[0])
    if missing:
        ages[scans // 2] = math.nan
    return views, ages


@pytest.mark.parametrize("case", KERNEL_CASES)
@pytest.mark.parametrize("normalization", ["row", "column"])
def test_the_value_and_the_gradient_equal_the_naive_loops_with_every_kernel(case: str, normalization: str) -> None:
    name, options = KERNEL_CASES[case]
    views, ages = batch(7, missing=True)
    views.requires_grad_()
    found = y_aware_infonce(views, ages, kernel=KERNELS[name](**options), normalization=normalization)
    expected = naive.y_aware(views, ages, naive.pair_weight(name, **options), normalization=normalization)
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)
    (found_gradient,), (gradient,) = (torch.autograd.grad(value, views) for value in (found, expected))
    torch.testing.assert_close(found_gradient, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scans", [1, 2, 5])
@pytest.mark.parametrize("depth", [2, 9])
@pytest.mark.parametrize("temperature", [0.02, 0.1, 1.0])
@pytest.mark.parametrize("bandwidth", [0.0, 2.0, 30.0])
def test_the_value_equals_the_naive_loops_for_all_sizes(
    scans: int, depth: int, temperature: float, bandwidth: float
) -> None:
    views, ages = batch(scans, depth, seed=scans)
    found = y_aware_infonce(views, ages, kernel=KERNELS["gaussian"](bandwidth=bandwidth), temperature=temperature)
    expected = naive.y_aware(views, ages, naive.pair_weight("gaussian", bandwidth), temperature=temperature)
    assert found.item() == pytest.approx(expected.item(), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("normalization", ["row", "column"])
def test_the_gradient_in_the_embeddings_passes_gradcheck(normalization: str) -> None:
    views, ages = batch(4, missing=True)
    views.requires_grad_()
    options = {"kernel": GAUSSIAN, "temperature": 0.3, "normalization": normalization}
    assert torch.autograd.gradcheck(lambda z: y_aware_infonce(z, ages, **options), views)


def test_the_gradient_in_the_temperature_passes_gradcheck() -> None:
    views, ages = batch(4)
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    loss = lambda tau: y_aware_infonce(views, ages, kernel=GAUSSIAN, temperature=tau)  # noqa: E731
    assert torch.autograd.gradcheck(loss, temperature)


@pytest.mark.parametrize("scans", [1, 2, 8])
@pytest.mark.parametrize("bandwidth", [0.0, 5.0])
def test_identical_embeddings_give_the_log_of_the_number_of_candidates(scans: int, bandwidth: float) -> None:
    _, ages = batch(scans)
    views = torch.ones(2, scans, 4, requires_grad=True)
    loss = y_aware_infonce(views, ages, kernel=KERNELS["gaussian"](bandwidth=bandwidth))
    assert loss.item() == pytest.approx(math.log(2 * scans - 1), rel=1e-6, abs=1e-6)
    loss.backward()
    assert torch.isfinite(views.grad).all()


def test_equal_ages_make_every_pair_positive() -> None:
    views, _ = batch(5)
    ages = torch.full((5, 1), 40.0)
    found = y_aware_infonce(views, ages, kernel=GAUSSIAN)
    z = torch.nn.functional.normalize(views.flatten(0, 1), dim=1)
    off_diagonal = ~torch.eye(10, dtype=torch.bool)
    log_p = (z @ z.T / 0.1).masked_fill(~off_diagonal, -math.inf).log_softmax(dim=1)
    assert found.item() == pytest.approx(-log_p[off_diagonal].mean().item(), rel=1e-12)


def test_missing_ages_give_simclr() -> None:
    views, ages = batch(5)
    all_missing = y_aware_infonce(views, torch.full_like(ages, math.nan), kernel=GAUSSIAN)
    simclr = y_aware_infonce(views, ages, kernel=KERNELS["gaussian"](bandwidth=0.0))
    assert all_missing.item() == simclr.item()


@pytest.mark.parametrize("normalization", ["row", "column"])
def test_zero_vectors_are_finite_and_get_no_gradient(normalization: str) -> None:
    views, ages = batch(4)
    views[0, 1] = 0.0
    views = views.float().requires_grad_()
    y_aware_infonce(views, ages, kernel=GAUSSIAN, normalization=normalization).backward()
    assert torch.isfinite(views.grad).all()
    assert (views.grad[0, 1] == 0).all()
    assert (views.grad[0, 0] != 0).any()
    nothing = y_aware_infonce(torch.zeros(2, 4, 3), ages, kernel=GAUSSIAN)
    assert nothing.item() == pytest.approx(math.log(7), rel=1e-6)


@pytest.mark.parametrize("scale", [1e-25, 1e-6, 1e25])
def test_the_length_of_an_embedding_does_not_matter(scale: float) -> None:
    views, ages = batch(6)
    expected = y_aware_infonce(views, ages, kernel=GAUSSIAN).item()
    assert y_aware_infonce((views * scale).float(), ages, kernel=GAUSSIAN).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [1e-4, 1e-2, 1e3])
def test_huge_and_tiny_logits_are_finite(temperature: float) -> None:
    views, ages = batch(6)
    expected = y_aware_infonce(views, ages, kernel=GAUSSIAN, temperature=temperature).item()
    single = views.float().requires_grad_()
    loss = y_aware_infonce(single, ages, kernel=GAUSSIAN, temperature=temperature)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert torch.isfinite(single.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_embeddings_are_compared_in_float32(dtype: torch.dtype) -> None:
    views, ages = batch(6)
    half = views.to(dtype)
    loss = y_aware_infonce(half, ages, kernel=GAUSSIAN)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(y_aware_infonce(half.double(), ages, kernel=GAUSSIAN).item(), rel=1e-5)


def test_autocast_does_not_lower_the_precision() -> None:
    views, ages = batch(6)
    expected = y_aware_infonce(views.float(), ages, kernel=GAUSSIAN).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = y_aware_infonce(views.float(), ages, kernel=GAUSSIAN)
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_the_order_of_scans_and_of_views_does_not_matter() -> None:
    views, ages = batch(6)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    expected = y_aware_infonce(views, ages, kernel=GAUSSIAN).item()
    assert y_aware_infonce(views[:, order], ages[order], kernel=GAUSSIAN).item() == pytest.approx(expected, rel=1e-12)
    assert y_aware_infonce(views.flip(0), ages, kernel=GAUSSIAN).item() == pytest.approx(expected, rel=1e-12)


def test_column_normalisation_is_twice_row_normalisation_if_the_sums_are_equal() -> None:
    views, ages = batch(5)
    simclr = KERNELS["gaussian"](bandwidth=0.0)
    row = y_aware_infonce(views, ages, kernel=simclr)
    column = y_aware_infonce(views, ages, kernel=simclr, normalization="column")
    assert column.item() == pytest.approx(2 * row.item(), rel=1e-12)


def test_embeddings_with_nan_give_nan() -> None:
    views, ages = batch(4)
    views[0, 0, 0] = math.nan
    assert y_aware_infonce(views, ages, kernel=GAUSSIAN).isnan()


def test_the_global_loss_of_a_single_process_is_its_loss() -> None:
    views, ages = batch(4)
    loss = y_aware_infonce(views.requires_grad_(), ages, kernel=GAUSSIAN)
    assert global_loss(loss).item() == loss.item()
    assert not global_loss(loss).requires_grad


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"views": torch.ones(4, 3)}, r"views has shape \(4, 3\)"),
        ({"views": torch.ones(2, 4, 3, dtype=torch.int64)}, "views has shape .* type torch.int64"),
        ({"proxies": torch.ones(4)}, r"proxies has shape \(4,\) for 4 scans"),
        ({"proxies": torch.ones(3, 1)}, r"proxies has shape \(3, 1\) for 4 scans"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"normalization": "rows"}, "normalization='rows'"),
        ({"views": torch.ones(2, 0, 3), "proxies": torch.ones(0, 1)}, "no scan on any rank"),
    ],
)
def test_wrong_input_is_refused(change: dict[str, object], text: str) -> None:
    arguments = {"views": torch.ones(2, 4, 3), "proxies": torch.ones(4, 1), "kernel": GAUSSIAN, **change}
    with pytest.raises(UserError, match=text):
        LOSSES["y-aware"](arguments.pop("views"), arguments.pop("proxies"), **arguments)
