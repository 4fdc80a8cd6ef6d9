"""Kernels over proxies: how related two scans are, judged by their meta-data.

A kernel maps ``(proxies_a (A, P), proxies_b (B, P))`` to weights (A, B) in [0, 1]: 1 for equal proxies, falling with
their distance, symmetric, and 0 for any pair in which a proxy is missing (NaN). It judges *different* scans; the two
views of one scan are always positives of each other with weight 1, which the losses see to
(`pretrain.losses.contrastive`). A scan with a missing proxy therefore keeps its own other view as its one positive.

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
            "give a column per proxy, proxies[:, None] for a single one"
        )


def _present(proxies_a: Tensor, proxies_b: Tensor) -> Tensor:
    """(A, B) bool: no proxy of either scan is missing."""
    return ~proxies_a.isnan().any(dim=1)[:, None] & ~proxies_b.isnan().any(dim=1)[None, :]


# Profiles take squared distances in bandwidths, infinite for a missing proxy, and may overwrite them: a loss spends
# as long on passes over its kernel as on exp itself.
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
    # cos(π/2) is 6e-17, not 0: pairs beyond the bandwidth would still be ranked.
    beyond = square >= 1.0
    return square.sqrt_().mul_(0.5 * math.pi).cos_().masked_fill_(beyond, 0.0)


@dataclass(frozen=True)
class DistanceKernel:
    """w = profile(d²), d = Euclidean length of (a - b) / bandwidth; see the functions that make one for the formulas.

    ``bandwidth``: one number in the proxies' unit, or one per proxy. 0 relates no two scans.
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
                f"bandwidth has {len(widths)} values, the proxies {proxies_a.shape[1]}; give one number, or one each"
            )
        # One proxy after the other: the (A, B, P) tensor of all differences is never held. Differences come before
        # the division, so that equal and close proxies lose no digits.
        square: Tensor | None = None
        for column, width in enumerate(widths):
            a, b = proxies_a[:, column], proxies_b[:, column]
            # Infinitely far from everything, each other included: the weight is 0 with no further pass.
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
    """w = exp(-d²/2), d = |a - b| / bandwidth: the paper's kernel (Eq. 3 of arXiv:2106.08808), bandwidth = σ.

    The bandwidth is the standard deviation in the proxy's unit (5.0 years in the paper), not its square.
    """
    return _distance_kernel(_gaussian, bandwidth)


def epanechnikov(bandwidth: float | Sequence[float]) -> DistanceKernel:
    """w = max(0, 1 - d²), d = |a - b| / bandwidth: no weight beyond one bandwidth."""
    return _distance_kernel(_epanechnikov, bandwidth)


def exponential(bandwidth: float | Sequence[float]) -> DistanceKernel:
    """w = exp(-d), d = |a - b| / bandwidth."""
    return _distance_kernel(_exponential, bandwidth)


def cauchy(bandwidth: float | Sequence[float]) -> DistanceKernel:
    """w = 1 / (1 + d²), d = |a - b| / bandwidth: heavy tails; never 0, so it ranks scans at any distance."""
    return _distance_kernel(_cauchy, bandwidth)


def linear(bandwidth: float | Sequence[float]) -> DistanceKernel:
    """w = max(0, 1 - d), d = |a - b| / bandwidth (the triangular kernel of density estimation)."""
    return _distance_kernel(_linear, bandwidth)


def cosine(bandwidth: float | Sequence[float]) -> DistanceKernel:
    """w = cos(π d / 2) for d < 1, else 0, d = |a - b| / bandwidth."""
    return _distance_kernel(_cosine, bandwidth)


@dataclass(frozen=True)
class CategoryKernel:
    """w = ``same`` where every proxy is equal, ``different`` elsewhere."""

    same: float
    different: float

    def __call__(self, proxies_a: Tensor, proxies_b: Tensor) -> Tensor:
        _check_proxies(proxies_a, proxies_b)
        equal = torch.ones(len(proxies_a), len(proxies_b), dtype=torch.bool, device=proxies_a.device)
        for column in range(proxies_a.shape[1]):
            equal &= proxies_a[:, column, None] == proxies_b[None, :, column]
        weights = torch.where(equal, self.same, self.different).to(proxies_a.dtype)
        return weights.masked_fill(~_present(proxies_a, proxies_b), 0.0)


def _share(name: str, value: float) -> float:
    if not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise UserError(f"{name}={value!r} is not allowed; a weight lies between 0 and 1")
    return float(value)


def same(otherwise: float = 0.0) -> CategoryKernel:
    """w = 1 where all proxies are equal, else ``otherwise`` (0: supervised contrastive learning, arXiv:2004.11362)."""
    return CategoryKernel(same=1.0, different=_share("otherwise", otherwise))


def different(same: float = 0.0) -> CategoryKernel:
    """w = 1 where a proxy differs, else ``same``: a penalty, such as 0.5 for positives of the anchor's own site."""
    return CategoryKernel(same=_share("same", same), different=1.0)


@dataclass(frozen=True)
class WhitenedKernel:
    """``kernel`` on proxies turned by ``matrix`` (P, P), so that Euclidean distance there is Mahalanobis' here."""

    kernel: Kernel
    matrix: tuple[tuple[float, ...], ...]

    def __call__(self, proxies_a: Tensor, proxies_b: Tensor) -> Tensor:
        _check_proxies(proxies_a, proxies_b)
        if len(self.matrix) != proxies_a.shape[1]:
            raise UserError(f"covariance is for {len(self.matrix)} proxies, the scans have {proxies_a.shape[1]}")
        turn = torch.tensor(self.matrix, dtype=proxies_a.dtype, device=proxies_a.device)
        # A missing proxy makes its scan's whole row NaN, as it should.
        return self.kernel(proxies_a @ turn.T, proxies_b @ turn.T)


def multivariate_gaussian(covariance: Sequence[Sequence[float]]) -> WhitenedKernel:
    """w = exp(-(a - b)ᵀ Σ⁻¹ (a - b) / 2) over all P proxies, ``covariance`` Σ (P, P) in the products of their units."""
    sigma = torch.as_tensor(covariance, dtype=torch.float64)
    square = sigma.ndim == 2 and sigma.shape[0] == sigma.shape[1] and len(sigma) > 0
    # Estimated covariances are symmetric but for rounding.
    symmetric = square and torch.allclose(sigma, sigma.T, rtol=1e-9)
    factor, failed = torch.linalg.cholesky_ex(sigma) if symmetric else (sigma, torch.ones(()))
    if failed:
        raise UserError(f"covariance={covariance!r} is not allowed; give a symmetric positive definite matrix")
    inverse = torch.linalg.solve_triangular(factor, torch.eye(len(sigma), dtype=torch.float64), upper=False)
    return WhitenedKernel(DistanceKernel(_gaussian, 1.0), tuple(tuple(row) for row in inverse.tolist()))


@dataclass(frozen=True)
class ProductKernel:
    """w = Π_f k_f(a_f, b_f): every factor judges its own ``columns`` of the proxies. One missing proxy, and w = 0."""

    factors: tuple[tuple[Kernel, tuple[int, ...]], ...]

    def __call__(self, proxies_a: Tensor, proxies_b: Tensor) -> Tensor:
        _check_proxies(proxies_a, proxies_b)
        judged = sorted(column for _, columns in self.factors for column in columns)
        if judged != list(range(proxies_a.shape[1])):
            raise UserError(f"the kernels judge the proxy columns {judged}, the scans have {proxies_a.shape[1]}")
        weights = proxies_a.new_ones(len(proxies_a), len(proxies_b))
        for kernel, columns in self.factors:
            weights *= kernel(proxies_a[:, list(columns)], proxies_b[:, list(columns)])
        return weights


def product(kernels: Sequence[Kernel]) -> ProductKernel:
    """One kernel per proxy column, multiplied: age x sex, or age x a penalty for the anchor's own site."""
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
