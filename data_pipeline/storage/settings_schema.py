"""What ``settings`` of a manifest.json may hold, by key, with the standard library alone; see ``manifest_schema``.

A key that an earlier version did not write may be missing; one that is there must have a possible value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

MAX_ROWS = 2**27
MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1
MAX_ENTRIES = 1000  # of a list or an object
CODECS = ("zst", "npy", "npy.gz", "nii.gz", "nii", "mixed", "none")
# The words of data_pipeline.volume.preparation and data_pipeline.quality.rules, which import numpy.
SCALINGS, CROPS, INTENSITIES = ("none", "tiv"), ("world", "brain"), ("none", "robust")
RULES = {
    "nonfinite": ("refuse", "zero"), "constant": ("refuse", "keep"), "grid": ("resample", "refuse"),
    "duplicate": ("refuse", "keep"),
}  # fmt: skip

Check = tuple[Callable[[Any], bool], str]  # whether a value is allowed, and what is allowed in words


def whole_number(low: int, high: int) -> Check:
    """Return the check of a whole number within limits."""
    return (lambda value: type(value) is int and low <= value <= high), f"a whole number from {low} to {high}"


def one_of(words: tuple[str, ...]) -> Check:
    """Return the check of one of some words."""
    return (lambda value: isinstance(value, str) and value in words), f"one of {', '.join(words)}"


def is_word(value: Any) -> bool:
    """Return whether a value is a text of 1 to 4096 letters that can be printed."""
    return isinstance(value, str) and 0 < len(value) <= 4096 and value.isprintable()


def is_number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    """Return whether a value is a finite number within limits."""
    return type(value) in (int, float) and math.isfinite(value) and low <= value <= high


def _is_list_of(value: Any, allowed: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(allowed(entry) for entry in value)


def _are_shares(value: Any) -> bool:
    if not isinstance(value, dict) or not 0 < len(value) <= MAX_ENTRIES:
        return False
    return all(is_word(name) and is_number(share, 0, 1) for name, share in value.items())


def _is_orientation(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"([RLAPSI]{3})?", value) is not None


def _are_orientations(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= MAX_ENTRIES
        and all(is_word(name) and _is_orientation(axes) for name, axes in value.items())
    )


def _is_annotation(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _is_list_of(value.get("columns"), is_word)
        and isinstance(value.get("table"), str)
        and len(value["table"]) <= 4096
    )


def _has_only(value: Any, **allowed: Callable[[Any], bool]) -> bool:
    """Return whether a value is an object of some of the allowed keys, each with an allowed value."""
    return isinstance(value, dict) and all(key in allowed and allowed[key](entry) for key, entry in value.items())


def _is_bool(value: Any) -> bool:
    return type(value) is bool


def _is_limit(value: Any) -> bool:
    known = _has_only(value, min=_is_bound, max=_is_bound)
    bounds = [value.get(name) for name in ("min", "max")] if known else []
    given = [bound for bound in bounds if bound is not None]
    return bool(given) and given == sorted(given)


def _is_bound(value: Any) -> bool:
    # Infinity is a limit that no value violates.
    return value is None or (type(value) in (int, float) and not math.isnan(value))


def _is_outlier(value: Any) -> bool:
    return _has_only(
        value, use=_is_bool, robust_z=lambda z: type(z) in (int, float) and z < 0,
        least_drop=lambda drop: is_number(drop, 0, 2),
        least_scans=lambda scans: type(scans) is int and 3 <= scans <= MAX_ROWS,
    )  # fmt: skip


def _is_cat12(value: Any) -> bool:
    return _has_only(value, use=_is_bool, column=is_word, worst=lambda rating: is_number(rating, 0.5, 10.5))


def _are_limits(value: Any) -> bool:
    return isinstance(value, dict) and all(is_word(name) and _is_limit(limit) for name, limit in value.items())


def _are_preparations(value: Any) -> bool:
    if not isinstance(value, dict) or len(value) > MAX_ENTRIES:
        return False
    return all(
        is_word(name)
        and _has_only(stated, recipe=lambda recipe: isinstance(recipe, dict), libraries=_are_versions)
        and len(stated) == 2
        for name, stated in value.items()
    )


def _are_licences(value: Any) -> bool:
    if not isinstance(value, dict) or len(value) > MAX_ENTRIES:
        return False
    return all(
        is_word(name) and _has_only(stated, licence=is_word, stated_in=is_word) and len(stated) == 2
        for name, stated in value.items()
    )


def _are_versions(value: Any) -> bool:
    known = isinstance(value, dict) and len(value) <= MAX_ENTRIES
    return known and all(is_word(name) and (version == "" or is_word(version)) for name, version in value.items())


WORD: Check = (is_word, "a word of 1 to 4096 letters")
BOOL: Check = (_is_bool, "true or false")
NEEDED: dict[str, Check] = {
    "dataset": WORD, "modality": WORD, "scaling": one_of(SCALINGS), "codec": one_of(CODECS),
}  # fmt: skip
PART: dict[str, Check] = {  # of the build, and of each append
    "quarantined": whole_number(0, MAX_ROWS),
    "scans_found": whole_number(0, MAX_ROWS),
    "simulated": BOOL,
    "array_orientations": (_are_orientations, "the orientation of each data set's arrays, such as LAS"),
    "preparations": (_are_preparations, "the recipe and the libraries of each data set"),
    "licences": (_are_licences, "the licence of each data set, and the file it is stated_in"),
}
POSSIBLE: dict[str, Check] = {
    **PART,
    "seed": whole_number(MIN_SEED, MAX_SEED),
    "scans_per_shard": whole_number(1, MAX_ROWS),
    "splits": (_are_shares, "the share of each split, 0 to 1"),
    "crop": one_of(CROPS),
    "intensity": one_of(INTENSITIES),
    "indexed": BOOL,
    "arrays": BOOL,
    "pseudonymised": BOOL,
    "pseudonym_key": WORD,
    "orientation": (_is_orientation, "three axes, such as LAS"),
    "annotated": (lambda value: _is_list_of(value, _is_annotation), "a list of objects with columns and table"),
}
QUALITY: dict[str, Check] = {
    **{name: one_of(words) for name, words in RULES.items()},
    "outlier": (_is_outlier, "an object with use, robust_z, least_drop, least_scans"),
    "cat12": (_is_cat12, "an object with use, column, worst"),
    "limits": (_are_limits, "an object of names, each with min, max or both"),
}
APPENDED: dict[str, Check] = {"dataset": WORD, "scans": whole_number(0, MAX_ROWS)}


def unknown_rule(quality: Mapping[str, Any]) -> str | None:
    """Return a key of ``quality`` that is no rule; None if there is none."""
    return next((str(name) for name in quality if name not in QUALITY), None)
