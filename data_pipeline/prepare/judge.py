"""The limits of a recipe applied to the figures of a scan."""

from __future__ import annotations

from collections.abc import Mapping

from data_pipeline.prepare.settings import Limits
from data_pipeline.volume.errors import BadScan


def judge(figures: Mapping[str, float], limits: Limits) -> BadScan | None:
    """Return why a scan with these figures is refused, or None. The first rule that it violates counts."""
    for name, low, high, words in _rules(limits):
        value = figures.get(name)
        if value is None:
            continue
        if not low <= value <= high:  # NaN is outside too
            limit = high if value > high else low
            rule = name.partition("_")[0] if name.startswith("stretch") else name
            return BadScan(words.format(value=value, limit=limit), rule, value, limit)
    return None


def _rules(limits: Limits) -> list[tuple[str, float, float, str]]:
    """Each rule: the figure, its lowest and highest value, and what is wrong outside."""
    low, high = limits.brain_ml
    short, long = limits.stretch
    stretched = "registration changed lengths by a factor of {value:.2f}, beyond {limit:g}"
    return [
        ("contrast", limits.contrast, 2.0, "white matter is not brighter than grey matter (contrast {value:.2f}, at least "
         "{limit:g}): not T1-weighted, or registered wrongly"),
        ("brain_ml", low, high, "its brain has {value:.0f} ml, beyond {limit:g}: no whole human brain was found"),
        ("rotation", 0.0, limits.rotation, "the head is turned by {value:.0f} degrees against the axes of its header, more "
         "than {limit:g}: the header's axes may be wrong, and then left and right are unknown"),
        ("stretch_low", short, long, stretched),
        ("stretch_high", short, long, stretched),
        ("correlation", limits.correlation, 1.0, "its correlation with the template is {value:.3f}, below {limit:g}"),
        ("overlap", limits.overlap, 1.0, "its brain overlaps the template's by {value:.3f} (Dice), below {limit:g}"),
    ]  # fmt: skip
