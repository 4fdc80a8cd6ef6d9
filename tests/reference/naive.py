"""Naive twins: every loss as the loops of its formula, pair by pair, in float64 scalars that autograd follows.

They share nothing with the package but the contract. Slow on purpose: a handful of scans only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

PairWeight = Callable[[Sequence[float], Sequence[float]], float]


def _distance(a: Sequence[float], b: Sequence[float], bandwidth: float) -> float:
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True))) / bandwidth


def pair_weight(name: str, bandwidth: float = 1.0) -> PairWeight:
    """The weight of two different scans, from the formula of its kernel."""
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
            return float(tuple(a) == tuple(b))
        if name == "different":
            return float(tuple(a) != tuple(b))
        return 0.0 if bandwidth == 0 else formulas[name](_distance(a, b, bandwidth))

    return weight


def unit(vector: Tensor) -> Tensor:
    return vector / torch.sqrt(sum(x * x for x in vector))


def view_table(
    views: Tensor, proxies: Tensor, weight: PairWeight, temperature: float
) -> tuple[list[list[Tensor]], list[list[float]], list[int]]:
    """Similarities / τ and weights of all pairs of the 2N views, and the scan of each view."""
    count = views.shape[1]
    z = [unit(views[view, scan]) for view in (0, 1) for scan in range(count)]
    scan_of = [scan for _ in (0, 1) for scan in range(count)]
    rows = proxies.tolist()
    similarity = [[(z_i * z_j).sum() / temperature for z_j in z] for z_i in z]
    weights = [[1.0 if a == b else weight(rows[a], rows[b]) for b in scan_of] for a in scan_of]
    return similarity, weights, scan_of


def y_aware(
    views: Tensor, proxies: Tensor, weight: PairWeight, temperature: float = 0.1, normalization: str = "row"
) -> Tensor:
    """-(1/2N) Σ_i Σ_{j≠i} w_ij / Σ_{k≠i} w_ik log p(j|i); column: -(1/N) Σ_i Σ_{j≠i} w_ij / Σ_{k≠j} w_kj log p(j|i)."""
    s, w, scan_of = view_table(views, proxies, weight, temperature)
    everyone = range(len(scan_of))
    total = views.new_zeros(())
    for i in everyone:
        log_sum = torch.stack([s[i][k] for k in everyone if k != i]).logsumexp(0)
        for j in everyone:
            if j == i:
                continue
            if normalization == "row":
                share = w[i][j] / sum(w[i][k] for k in everyone if k != i)
            else:
                share = w[i][j] / sum(w[k][j] for k in everyone if k != j)
            total = total - share * (s[i][j] - log_sum)
    return total / (len(scan_of) if normalization == "row" else len(scan_of) / 2)
