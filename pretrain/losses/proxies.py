"""From a recipe's ``proxies`` section to a kernel: names, bandwidth rules, one column per proxy.

proxies: {age: {kernel: gaussian, bandwidth: 5.0}}                             # the paper
proxies: {age: {kernel: gaussian, bandwidth: scott}, sex: {kernel: same}}      # age x sex, bandwidth by rule
proxies: {age: {kernel: gaussian, bandwidth: 5.0}, site: {kernel: different, same: 0.5}}   # own site counts half
proxies: {age+tiv: {kernel: multivariate-gaussian, covariance: silverman}}     # two columns judged jointly
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from infra.errors import UserError, nearest
from pretrain.kernels import KERNELS, Kernel, ProductKernel

JOINT = "+"
RULES = ("scott", "silverman")


def proxy_columns(proxies: Mapping[str, Any]) -> list[str]:
    """The proxies to load, in the order of the kernel's columns; ``age+tiv`` names two."""
    return [column for name in proxies for column in name.split(JOINT)]


def rule_factor(rule: str, scans: int, proxies: int = 1) -> float:
    """The share of the standard deviation that a rule takes as bandwidth, for n scans and P proxies.

    "scott" n^(-1/(P + 4)), "silverman" (n (P + 2) / 4)^(-1/(P + 4)). Both were made for density estimation; see
    docs/loss.md on choosing a bandwidth for contrast.
    """
    if rule not in RULES:
        raise UserError(
            f"bandwidth rule {rule!r} is not known{nearest(rule, RULES)}; give a number, scott or silverman"
        )
    count = scans if rule == "scott" else scans * (proxies + 2) / 4
    return float(count ** (-1 / (proxies + 4)))


def bandwidth_by_rule(rule: str, values: Tensor) -> float:
    """A bandwidth in the proxy's unit from its values (N,), NaN left out: standard deviation x `rule_factor`."""
    known = _known(rule, values.reshape(-1, 1))
    return float(known.std()) * rule_factor(rule, len(known))


def covariance_by_rule(rule: str, values: Tensor) -> list[list[float]]:
    """A covariance from the values (N, P), scans with NaN left out: their covariance x `rule_factor` squared."""
    known = _known(rule, values)
    scale = rule_factor(rule, len(known), known.shape[1]) ** 2
    covariance: list[list[float]] = (torch.cov(known.T).reshape(known.shape[1], -1) * scale).tolist()
    return covariance


def _known(rule: str, values: Tensor) -> Tensor:
    known = values.double()[~values.isnan().any(dim=1)]
    if len(known) < 2 or bool((known.std(dim=0) == 0).any()):
        raise UserError(f"bandwidth={rule!r} needs scans with different values of the proxy; {len(known)} have any")
    return known


def build_kernel(
    proxies: Mapping[str, Mapping[str, Any]], known: Mapping[str, Sequence[float] | Tensor] | None = None
) -> Kernel:
    """The kernel that a recipe's ``proxies`` section describes, over the columns of `proxy_columns`.

    ``proxies``: name -> {"kernel": a key of KERNELS, and that kernel's options}. ``known``: column -> its values in
    the manifest, needed for the rules "scott" and "silverman" alone.
    """
    if not proxies:
        raise UserError("proxies is empty; name at least one, as in {age: {kernel: gaussian, bandwidth: 5.0}}")
    factors, column = [], 0
    for name, settings in proxies.items():
        width = len(name.split(JOINT))
        factors.append((_build_one(name, settings, known or {}), tuple(range(column, column + width))))
        column += width
    return factors[0][0] if len(factors) == 1 else ProductKernel(tuple(factors))


def _build_one(name: str, settings: Mapping[str, Any], known: Mapping[str, Sequence[float] | Tensor]) -> Kernel:
    options = dict(settings)
    kind = str(options.pop("kernel", None))
    if kind not in KERNELS:
        allowed = ", ".join(KERNELS)
        raise UserError(f"proxies.{name}.kernel={kind!r} is not known{nearest(kind, KERNELS)}; allowed: {allowed}")
    for option, by_rule in (("bandwidth", _bandwidth_of), ("covariance", covariance_by_rule)):
        if isinstance(options.get(option), str):
            options[option] = by_rule(options[option], _values(name, options[option], known))
    try:
        return KERNELS[kind](**options)
    except TypeError as error:
        raise UserError(f"proxies.{name}: kernel {kind!r}: {error}") from None


def _bandwidth_of(rule: str, values: Tensor) -> list[float] | float:
    """One bandwidth per column, each by its own spread."""
    widths = [bandwidth_by_rule(rule, column) for column in values.T]
    return widths[0] if len(widths) == 1 else widths


def _values(name: str, rule: str, known: Mapping[str, Sequence[float] | Tensor]) -> Tensor:
    columns = name.split(JOINT)
    missing = [column for column in columns if column not in known]
    if missing:
        raise UserError(f"proxies.{name}: {rule!r} needs the values of {', '.join(missing)}; give a number instead")
    return torch.stack([torch.as_tensor(known[column], dtype=torch.float64) for column in columns], dim=1)
