"""Kernels: how related two scans are, computed from their proxies.

A kernel maps ``(proxies_a (A, P), proxies_b (B, P))`` to weights (A, B) in [0, 1]. The weights are symmetric, 1 for equal
proxies, decrease with the distance of the proxies, and are 0 if a proxy of either scan is missing (NaN), unless `with_missing`
gives such pairs another weight. A kernel compares *different* scans. The losses (`pretrain.losses.contrastive`) give the two
views of one scan weight 1; a scan with a missing proxy therefore has its own other view as its only positive.

A, B = scans, P = proxies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infra.errors import UserError

Kernel = Callable[[Tensor, Tensor], Tensor]


def _check_proxies(proxies_a: Tensor, proxies_b: Tensor) -> None:
    shapes = tuple(proxies_a.shape), tuple(proxies_b.shape)
    if proxies_a.ndim != 2 or proxies_b.ndim != 2 or shapes[0][1] != shapes[1][1] or shapes[0][1] == 0:
        raise UserError(
            f"proxies have the shapes {shapes[0]} and {shapes[1]}; a kernel takes (A, P) and (B, P) with P >= 1: "
            "give one column per proxy, proxies[:, None] for a single proxy"
        )


def _all_present(proxies_a: Tensor, proxies_b: Tensor) -> Tensor:
    """Return (A, B) bool: whether no proxy of either scan is missing."""
    return ~proxies_a.isnan().any(dim=1)[:, None] & ~proxies_b.isnan().any(dim=1)[None, :]


# A profile takes squared distances in units of the bandwidth, infinite for a missing proxy. It works in place, since a loss
# spends as much time on passes over the kernel matrix as on the exponential.
def _gaussian(square: Tensor) -> Tensor:
    return square.mul_(-0.5).exp_()


def _epanechnikov(square: Tensor) -> Tensor:
    return (1.0 - square).clamp_(min=0.0)


def _exponential(square: Tensor) -> Tensor:
    return square.sqrt_().neg_().exp_()


def _cauchy(square: Tensor) -> Tensor:
    return square.add_(1.0).reciprocal_()


def _linear(square: Tensor) -> Tensor:
    return (1.0 - square.sqrt_()).clamp_(min=0.0)


def _cosine(square: Tensor) -> Tensor:
    # cos(π/2) is 6e-17, not 0, and losses that rank weights would still rank pairs beyond the bandwidth.
    beyond = square >= 1.0
    return square.sqrt_().mul_(0.5 * math.pi).cos_().masked_fill_(beyond, 0.0)


@dataclass(frozen=True)
class DistanceKernel:
    """w = profile(d²) with d the Euclidean length of (a - b) / bandwidth. The functions below give the formulas.

    Attributes:
        profile: squared distances (A, B) -> weights (A, B), in place.
        bandwidth: one number in the proxies' unit, or one per proxy; 0 gives weight 0 to every pair of scans.

    Raises:
        UserError: when called, if the shapes are wrong or there is not one bandwidth per proxy.
    """

    profile: Callable[[Tensor], Tensor]
    bandwidth: float | tuple[float, ...]

    def __call__(self, proxies_a: Tensor, proxies_b: Tensor) -> Tensor:
        _check_proxies(proxies_a, proxies_b)
        shape = len(proxies_a), len(proxies_b)
        if self.bandwidth == 0.0:
            return proxies_a.new_zeros(shape)
        widths = self.bandwidth if isinstance(self.bandwidth, tuple) else (self.bandwidth,) * proxies_a.shape[1]
        if len(widths) != proxies_a.shape[1]:
            raise UserError(
                f"bandwidth has {len(widths)} values for {proxies_a.shape[1]} proxies; give one number, or one per proxy"
            )
        # One proxy at a time avoids an (A, B, P) tensor of differences. The differences are taken before the division, so
        # that close proxies lose no digits.
        square: Tensor | None = None
        for column, width in enumerate(widths):
            a, b = proxies_a[:, column], proxies_b[:, column]
            # A missing proxy is infinitely far from all others, so that its weights are 0 without a further pass.
            a, b = a.masked_fill(~a.isfinite(), math.inf), b.masked_fill(~b.isfinite(), -math.inf)
            term = (a[:, None] - b[None, :]).square_().mul_(width**-2)
            square = term if square is None else square.add_(term)
        assert square is not None
        return self.profile(square)


def _distance_kernel(profile: Callable[[Tensor], Tensor], bandwidth: float | Sequence[float]) -> DistanceKernel:
    if isinstance(bandwidth, list | tuple):
        widths = tuple(float(width) for width in bandwidth)
        if not widths or not all(math.isfinite(width) and width > 0.0 for width in widths):
            raise UserError(f"bandwidth={list(bandwidth)!r}: one finite number above 0 per proxy is needed")
        return DistanceKernel(profile, widths)
    if not isinstance(bandwidth, int | float) or not math.isfinite(bandwidth) or bandwidth < 0.0:
        raise UserError(
            f"bandwidth={bandwidth!r} is not allowed; give a finite number >= 0 in the proxy's unit "
            "(0: a scan's only positive is its own other view)"
        )
    return DistanceKernel(profile, float(bandwidth))


def gaussian(bandwidth: float | Sequence[float]) -> DistanceKernel:
    """Gaussian kernel of the paper (Eq. 3 of arXiv:2106.08808): w = exp(-d²/2), d = |a - b| / bandwidth.

    The bandwidth is the standard deviation σ in the proxy's unit (5.0 years in the paper), not its square. Raises UserError
    if the bandwidth is not a finite number of at least 0, or one above 0 per proxy; so do the kernels below.
    """
    return _distance_kernel(_gaussian, bandwidth)


def epanechnikov(bandwidth: float | Sequence[float]) -> DistanceKernel:
    """Epanechnikov kernel: w = max(0, 1 - d²), d = |a - b| / bandwidth; 0 beyond one bandwidth."""
    return _distance_kernel(_epanechnikov, bandwidth)


def exponential(bandwidth: float | Sequence[float]) -> DistanceKernel:
    """Exponential kernel: w = exp(-d), d = |a - b| / bandwidth."""
    return _distance_kernel(_exponential, bandwidth)


def cauchy(bandwidth: float | Sequence[float]) -> DistanceKernel:
    """Cauchy kernel: w = 1 / (1 + d²), d = |a - b| / bandwidth; never 0, so it ranks scans at any distance."""
    return _distance_kernel(_cauchy, bandwidth)


def linear(bandwidth: float | Sequence[float]) -> DistanceKernel:
    """Linear (triangular) kernel: w = max(0, 1 - d), d = |a - b| / bandwidth."""
    return _distance_kernel(_linear, bandwidth)


def cosine(bandwidth: float | Sequence[float]) -> DistanceKernel:
    """Cosine kernel: w = cos(π d / 2) for d < 1, else 0, d = |a - b| / bandwidth."""
    return _distance_kernel(_cosine, bandwidth)


@dataclass(frozen=True)
class CategoryKernel:
    """w = ``same`` if all proxies of two scans are equal, else ``different``."""

    same: float
    different: float

    def __call__(self, proxies_a: Tensor, proxies_b: Tensor) -> Tensor:
        _check_proxies(proxies_a, proxies_b)
        equal = torch.ones(len(proxies_a), len(proxies_b), dtype=torch.bool, device=proxies_a.device)
        for column in range(proxies_a.shape[1]):
            equal &= proxies_a[:, column, None] == proxies_b[None, :, column]
        weights = torch.where(equal, proxies_a.new_tensor(self.same), proxies_a.new_tensor(self.different))
        return weights.masked_fill(~_all_present(proxies_a, proxies_b), 0.0)


def _check_weight(name: str, value: float) -> float:
    if not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise UserError(f"{name}={value!r} is not allowed; give a weight from 0 to 1")
    return float(value)


def same(otherwise: float = 0.0) -> CategoryKernel:
    """Kernel of categories: w = 1 if all proxies are equal, else ``otherwise``.

    ``otherwise`` = 0 gives supervised contrastive learning (arXiv:2004.11362). Raises UserError if it is not in [0, 1].
    """
    return CategoryKernel(same=1.0, different=_check_weight("otherwise", otherwise))


def different(same: float = 0.0) -> CategoryKernel:
    """Penalty for equal categories: w = 1 if a proxy differs, else ``same``, such as 0.5 for positives of the same site.

    Raises UserError if ``same`` is not in [0, 1].
    """
    return CategoryKernel(same=_check_weight("same", same), different=1.0)


@dataclass(frozen=True)
class WhitenedKernel:
    """``kernel`` of proxies that are multiplied by ``matrix`` (P, P), so that it uses the Mahalanobis distance."""

    kernel: Kernel
    matrix: tuple[tuple[float, ...], ...]

    def __call__(self, proxies_a: Tensor, proxies_b: Tensor) -> Tensor:
        _check_proxies(proxies_a, proxies_b)
        if len(self.matrix) != proxies_a.shape[1]:
            raise UserError(
                f"covariance has {len(self.matrix)} rows for {proxies_a.shape[1]} proxies; give one row per proxy"
            )
        whitening = torch.tensor(self.matrix, dtype=proxies_a.dtype, device=proxies_a.device)
        # A missing proxy makes the whole row of its scan NaN, so that its weights are 0.
        return self.kernel(proxies_a @ whitening.T, proxies_b @ whitening.T)


def multivariate_gaussian(covariance: Sequence[Sequence[float]]) -> WhitenedKernel:
    """Gaussian kernel of all P proxies together: w = exp(-(a - b)ᵀ Σ⁻¹ (a - b) / 2).

    ``covariance`` is Σ (P, P), in products of the proxies' units. Raises UserError if it is not symmetric positive definite.
    """
    sigma = torch.as_tensor(covariance, dtype=torch.float64)
    square = sigma.ndim == 2 and sigma.shape[0] == sigma.shape[1] and len(sigma) > 0
    # Estimated covariances are symmetric up to rounding.
    symmetric = square and torch.allclose(sigma, sigma.T, rtol=1e-9)
    factor, failed = torch.linalg.cholesky_ex(sigma) if symmetric else (sigma, torch.ones(()))
    if failed:
        raise UserError(f"covariance={covariance!r} is not allowed; give a symmetric positive definite matrix")
    inverse = torch.linalg.solve_triangular(factor, torch.eye(len(sigma), dtype=torch.float64), upper=False)
    return WhitenedKernel(DistanceKernel(_gaussian, 1.0), tuple(tuple(row) for row in inverse.tolist()))


@dataclass(frozen=True)
class MissingKernel:
    """``kernel``, with the weight ``weight`` for a pair of scans of which a proxy is missing, instead of 0."""

    kernel: Kernel
    weight: float

    def __call__(self, proxies_a: Tensor, proxies_b: Tensor) -> Tensor:
        weights = self.kernel(proxies_a, proxies_b)
        return weights.masked_fill(~_all_present(proxies_a, proxies_b), self.weight)


def with_missing(kernel: Kernel, weight: float) -> MissingKernel:
    """Give pairs with a missing proxy a weight of their own; 1 leaves the proxy out of a product for these pairs.

    Raises UserError if the weight is not in [0, 1].
    """
    return MissingKernel(kernel, _check_weight("missing", weight))


@dataclass(frozen=True)
class ProductKernel:
    """w = Π_f k_f(a_f, b_f): each factor is a kernel and the columns of the proxies that it compares.

    If any proxy is missing, w = 0, except where a factor is a `MissingKernel`. Raises UserError, when called, if the factors do
    not cover each column exactly once.
    """

    factors: tuple[tuple[Kernel, tuple[int, ...]], ...]

    def __call__(self, proxies_a: Tensor, proxies_b: Tensor) -> Tensor:
        _check_proxies(proxies_a, proxies_b)
        compared = sorted(column for _, columns in self.factors for column in columns)
        if compared != list(range(proxies_a.shape[1])):
            raise UserError(
                f"the kernels compare the proxy columns {compared}, the scans have {proxies_a.shape[1]} columns; give one "
                "kernel per column"
            )
        weights = proxies_a.new_ones(len(proxies_a), len(proxies_b))
        for kernel, columns in self.factors:
            weights *= kernel(proxies_a[:, list(columns)], proxies_b[:, list(columns)])
        return weights


def product(kernels: Sequence[Kernel]) -> ProductKernel:
    """Multiply kernels, one per proxy column, such as age x sex, or age x a penalty for the same site."""
    return ProductKernel(tuple((kernel, (column,)) for column, kernel in enumerate(kernels)))


KERNELS: dict[str, Callable[..., Kernel]] = {
    "gaussian": gaussian,
    "epanechnikov": epanechnikov,
    "exponential": exponential,
    "cauchy": cauchy,
    "linear": linear,
    "cosine": cosine,
    "same": same,
    "different": different,
    "multivariate-gaussian": multivariate_gaussian,
}
