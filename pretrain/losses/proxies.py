"""Build the kernel that a recipe's ``loss.proxies`` section describes.

proxies: {age: {kernel: gaussian, bandwidth: 5.0}}                                         # the paper
proxies: {age: {kernel: gaussian, bandwidth: scott}, sex: {kernel: same}}                  # age x sex, bandwidth by rule
proxies: {age: {kernel: gaussian, bandwidth: 5.0}, site: {kernel: different, same: 0.5}}   # same site: half the weight
proxies: {age: {kernel: gaussian, bandwidth: 5.0}, tiv: {kernel: gaussian, bandwidth: 100.0, missing: 1.0}}  # where known
proxies: {age+tiv: {kernel: multivariate-gaussian, covariance: silverman}}                 # one kernel of two columns
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from infra.errors import UserError, nearest
from pretrain.kernels import KERNELS, Kernel, ProductKernel, with_missing

JOINT = "+"
RULES = ("scott", "silverman")


def proxy_columns(proxies: Mapping[str, Any]) -> list[str]:
    """Return the columns to load, in the order of the kernel's columns; ``age+tiv`` names two."""
    return [column for name in proxies for column in name.split(JOINT)]


def rule_factor(rule: str, scans: int, proxies: int = 1) -> float:
    """Return the bandwidth of a rule as a fraction of the standard deviation, for n scans and P proxies.

    "scott" is n^(-1/(P + 4)) and "silverman" is (n (P + 2) / 4)^(-1/(P + 4)). Both are rules of density estimation; see
    docs/loss.md on choosing a bandwidth for a contrastive loss. Raises UserError if the rule is unknown.
    """
    if rule not in RULES:
        raise UserError(
            f"bandwidth rule {rule!r} is not known{nearest(rule, RULES)}; give a number, scott or silverman"
        )
    count = scans if rule == "scott" else scans * (proxies + 2) / 4
    return float(count ** (-1 / (proxies + 4)))


def bandwidth_by_rule(rule: str, values: Tensor) -> float:
    """Return the bandwidth, in the proxy's unit, for values (N,): standard deviation x `rule_factor`. NaN is ignored."""
    known = _known_values(rule, values.reshape(-1, 1))
    return float(known.std()) * rule_factor(rule, len(known))


def covariance_by_rule(rule: str, values: Tensor) -> list[list[float]]:
    """Return the covariance (P, P) of values (N, P) x `rule_factor` squared. Scans with NaN are ignored."""
    known = _known_values(rule, values)
    scale = rule_factor(rule, len(known), known.shape[1]) ** 2
    covariance: list[list[float]] = (torch.cov(known.T).reshape(known.shape[1], -1) * scale).tolist()
    return covariance


def _known_values(rule: str, values: Tensor) -> Tensor:
    """Return the rows (N, P) without NaN in float64; raises UserError unless every column has different values."""
    known = values.double()[~values.isnan().any(dim=1)]
    if len(known) < 2 or bool((known.std(dim=0) == 0).any()):
        raise UserError(
            f"bandwidth={rule!r} needs scans with different values of the proxy; {len(known)} scans have a value"
        )
    return known


def build_kernel(
    proxies: Mapping[str, Mapping[str, Any]], values: Mapping[str, Sequence[float] | Tensor] | None = None
) -> Kernel:
    """Build the kernel of a recipe's ``proxies`` section, over the columns of `proxy_columns`.

    Args:
        proxies: name -> {"kernel": a key of KERNELS, options of that kernel, and perhaps "missing": the weight of a pair of
            which the proxy is missing}.
        values: column -> its values in the manifest; needed only for the bandwidth rules "scott" and "silverman".

    Raises:
        UserError: if the section is empty, or a kernel, an option or a rule is not possible.
    """
    if not proxies:
        raise UserError("proxies is empty; name at least one, as in {age: {kernel: gaussian, bandwidth: 5.0}}")
    factors, column = [], 0
    for name, settings in proxies.items():
        width = len(name.split(JOINT))
        factors.append((_build_factor(name, settings, values or {}), tuple(range(column, column + width))))
        column += width
    return factors[0][0] if len(factors) == 1 else ProductKernel(tuple(factors))


def _build_factor(name: str, settings: Mapping[str, Any], values: Mapping[str, Sequence[float] | Tensor]) -> Kernel:
    options = dict(settings)
    kind, missing = str(options.pop("kernel", None)), options.pop("missing", None)
    if kind not in KERNELS:
        allowed = ", ".join(KERNELS)
        raise UserError(f"proxies.{name}.kernel={kind!r} is not known{nearest(kind, KERNELS)}; allowed: {allowed}")
    for option, by_rule in (("bandwidth", _bandwidths_by_rule), ("covariance", covariance_by_rule)):
        if isinstance(options.get(option), str):
            options[option] = by_rule(options[option], _columns_of(name, options[option], values))
    try:
        kernel = KERNELS[kind](**options)
    except TypeError as error:
        raise UserError(f"proxies.{name}: kernel {kind!r}: {error}") from None
    return kernel if missing is None else with_missing(kernel, missing)


def _bandwidths_by_rule(rule: str, values: Tensor) -> list[float] | float:
    """Return one bandwidth per column of (N, P), each from the column's own standard deviation."""
    widths = [bandwidth_by_rule(rule, column) for column in values.T]
    return widths[0] if len(widths) == 1 else widths


def _columns_of(name: str, rule: str, values: Mapping[str, Sequence[float] | Tensor]) -> Tensor:
    """Return the values (N, P) of the columns that a proxy's name joins."""
    columns = name.split(JOINT)
    missing = [column for column in columns if column not in values]
    if missing:
        raise UserError(f"proxies.{name}: {rule!r} needs the values of {', '.join(missing)}; give a number instead")
    return torch.stack([torch.as_tensor(values[column], dtype=torch.float64) for column in columns], dim=1)


def with_equal_subjects(kernel: Kernel) -> Kernel:
    """Return a kernel over the proxies and one more column, a participant's number: 1 for two scans of one participant.

    All others have the weight of ``kernel`` between the columns before. Numbers must be below 2^24, so that float32 has them.
    """

    def weigh(proxies_a: Tensor, proxies_b: Tensor) -> Tensor:
        """Return the weights (A, B) of proxies and participants (A, P + 1), (B, P + 1)."""
        weights = kernel(proxies_a[:, :-1], proxies_b[:, :-1])
        return weights.masked_fill(proxies_a[:, -1:] == proxies_b[:, -1], 1.0)

    return weigh
