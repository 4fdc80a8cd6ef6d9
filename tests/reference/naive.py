"""Naive versions of the losses: loops over the pairs of each formula, in float64 scalars with autograd.

They share no code with the package. They are slow and meant for a few scans.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PairWeight = Callable[[Sequence[float], Sequence[float]], float]


def _distance(a: Sequence[float], b: Sequence[float], bandwidth: float) -> float:
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True))) / bandwidth


def pair_weight(name: str, bandwidth: float = 1.0, otherwise: float = 0.0, same: float = 0.0) -> PairWeight:
    """Return the function that gives the weight of two different scans by the formula of the kernel ``name``."""
    formulas: dict[str, Callable[[float], float]] = {
        "gaussian": lambda d: math.exp(-(d**2) / 2),
        "epanechnikov": lambda d: 1 - d**2 if d < 1 else 0.0,
        "exponential": lambda d: math.exp(-d),
        "cauchy": lambda d: 1 / (1 + d**2),
        "linear": lambda d: 1 - d if d < 1 else 0.0,
        "cosine": lambda d: math.cos(math.pi * d / 2) if d < 1 else 0.0,
    }

    def weight(a: Sequence[float], b: Sequence[float]) -> float:
        if any(math.isnan(value) for value in (*a, *b)):
            return 0.0
        if name == "same":
            return 1.0 if tuple(a) == tuple(b) else otherwise
        if name == "different":
            return 1.0 if tuple(a) != tuple(b) else same
        return 0.0 if bandwidth == 0 else formulas[name](_distance(a, b, bandwidth))

    return weight


@dataclass
class Table:
    """All 2N views against each other: s_ij (divided by τ), w_ij, and ``others``, the columns j compared with anchor i."""

    s: list[list[Tensor]]
    w: list[list[float]]
    others: list[list[int]]

    @property
    def anchors(self) -> range:
        return range(len(self.s))


def unit(vector: Tensor) -> Tensor:
    return vector / torch.sqrt(sum(x * x for x in vector))


def table(
    views: Tensor,
    proxies: Tensor,
    weight: PairWeight,
    temperature: float = 0.1,
    subjects: Sequence[int] | None = None,
    cross_view: bool = False,
    sites: Sequence[int] | None = None,
    people: Sequence[int] | None = None,
) -> Table:
    count = views.shape[1]
    positions = [(view, scan) for view in (0, 1) for scan in range(count)]
    z = [unit(views[view, scan]) for view, scan in positions]
    ages = proxies.tolist()
    others = []
    for view, scan in positions:
        compared = []
        for j, (other_view, other_scan) in enumerate(positions):
            is_anchor = (view, scan) == (other_view, other_scan)
            same_subject = subjects is not None and scan != other_scan and subjects[scan] == subjects[other_scan]
            other_site = sites is not None and sites[scan] != sites[other_scan]
            if not is_anchor and not same_subject and not other_site and not (cross_view and view == other_view):
                compared.append(j)
        others.append(compared)
    return Table(
        s=[[(z_i * z_j).sum() / temperature for z_j in z] for z_i in z],
        w=[
            [1.0 if a == b or (people and people[a] == people[b]) else weight(ages[a], ages[b]) for _, b in positions]
            for _, a in positions
        ],
        others=others,
    )


def log_sum(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(terms)).logsumexp(0)


def y_aware(
    views: Tensor, proxies: Tensor, weight: PairWeight, *, normalization: str = "row", **options: object
) -> Tensor:
    """-(1/2N) Σ_i Σ_j w_ij / Σ_k w_ik log p(j|i); column: -(1/N) Σ_i Σ_j w_ij / Σ_k w_kj log p(j|i)."""
    t = table(views, proxies, weight, **options)
    total = views.new_zeros(())
    for i in t.anchors:
        denominator = log_sum(t.s[i][k] for k in t.others[i])
        for j in t.others[i]:
            if normalization == "row":
                weight_ij = t.w[i][j] / sum(t.w[i][k] for k in t.others[i])
            else:
                weight_ij = t.w[i][j] / sum(t.w[k][j] for k in t.anchors if j in t.others[k])
            total = total - weight_ij * (t.s[i][j] - denominator)
    return total / (len(t.s) if normalization == "row" else len(t.s) / 2)


def threshold(views: Tensor, proxies: Tensor, weight: PairWeight, **options: object) -> Tensor:
    """-(1/2N) Σ_i Σ_k w_ik / Σ_t w_it log( exp(s_ik) / Σ_{t: w_it < w_ik} exp(s_it) )"""
    t = table(views, proxies, weight, **options)
    total = views.new_zeros(())
    for i in t.anchors:
        row_sum = sum(t.w[i][k] for k in t.others[i])
        for k in t.others[i]:
            less = [t.s[i][j] for j in t.others[i] if t.w[i][j] < t.w[i][k]]
            if less:
                total = total - t.w[i][k] / row_sum * (t.s[i][k] - log_sum(less))
    return total / len(t.s)


def exp(views: Tensor, proxies: Tensor, weight: PairWeight, **options: object) -> Tensor:
    """-(1/2N) Σ_i Σ_k w_ik / Σ_t w_it log( exp(s_ik) / Σ_t exp(s_it (1 - w_it)) )"""
    t = table(views, proxies, weight, **options)
    total = views.new_zeros(())
    for i in t.anchors:
        row_sum = sum(t.w[i][k] for k in t.others[i])
        denominator = log_sum(t.s[i][j] * (1 - t.w[i][j]) for j in t.others[i])
        for k in t.others[i]:
            total = total - t.w[i][k] / row_sum * (t.s[i][k] - denominator)
    return total / len(t.s)


def rank_n_contrast(views: Tensor, proxies: Tensor, weight: PairWeight, **options: object) -> Tensor:
    """-(1/2N) Σ_i 1/|J_i| Σ_{j in J_i} log( exp(s_ij) / Σ_{k: w_ik <= w_ij} exp(s_ik) ), J_i = {j: w_ij > 0}"""
    t = table(views, proxies, weight, **options)
    total = views.new_zeros(())
    for i in t.anchors:
        ranked = [j for j in t.others[i] if t.w[i][j] > 0]
        for j in ranked:
            farther = [t.s[i][k] for k in t.others[i] if t.w[i][k] <= t.w[i][j]]
            total = total - (t.s[i][j] - log_sum(farther)) / len(ranked)
    return total / len(t.s)


def decoupled_uniformity(
    views: Tensor,
    proxies: Tensor,
    weight: PairWeight,
    *,
    scale: float = 2.0,
    ridge: float | None = None,
    subjects: Sequence[int] | None = None,
) -> Tensor:
    """log( 1/(N(N-1)) Σ_{a≠b} exp(-t |μ_a - μ_b|²) ), μ = (K + λI)⁻¹ K z̄"""
    count = views.shape[1]
    ages = proxies.tolist()
    mean = torch.stack([(unit(views[0, a]) + unit(views[1, a])) / 2 for a in range(count)])
    rows = [[1.0 if a == b else weight(ages[a], ages[b]) for b in range(count)] for a in range(count)]
    k = torch.tensor(rows, dtype=views.dtype)
    penalty = 1 / math.sqrt(count) if ridge is None else ridge
    centroids = torch.linalg.inv(k + penalty * torch.eye(count, dtype=views.dtype)) @ k @ mean
    total = views.new_zeros(())
    for a in range(count):
        for b in range(count):
            if a != b and (subjects is None or subjects[a] != subjects[b]):
                total = total + torch.exp(-scale * ((centroids[a] - centroids[b]) ** 2).sum())
    return (total / (count * (count - 1))).log()


TWINS: dict[str, Callable[..., Tensor]] = {
    "y-aware": y_aware,
    "threshold": threshold,
    "exp": exp,
    "rank-n-contrast": rank_n_contrast,
    "decoupled-uniformity": decoupled_uniformity,
}
