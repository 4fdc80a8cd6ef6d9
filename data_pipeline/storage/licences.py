"""The licences of a manifest's data sets, as the data sets or their users state them. What nobody stated is unknown.

The settings of the build, and of each append, hold ``licences``: name of a data set -> ``licence``, and the file it is
``stated_in``. Manifests of earlier versions have none. The standard library is enough, so that `shards info` starts fast.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

UNKNOWN = "unknown"


def licences_in(settings: Mapping[str, Any], datasets: Iterable[str]) -> dict[str, list[str]]:
    """Return the licences of some data sets by the settings of a manifest: name -> texts; empty where it is unknown.

    A data set has several licences if scans were appended to it under another one. What is stated for a part of a data set
    holds for all of it.
    """
    parts = [part.get("licences", {}) for part in (settings, *settings.get("appended", []))]
    return {
        name: list(dict.fromkeys(str(part[name]["licence"]) for part in parts if name in part))
        for name in sorted(set(datasets))
    }


def with_licences(settings: Mapping[str, Any], stated: Mapping[str, str], where: str) -> dict[str, Any]:
    """Return the settings with the licences ``stated`` (name of a data set -> text) in place of those it has.

    ``where`` says who stated them.
    """
    kept = {name: entry for name, entry in settings.get("licences", {}).items() if name not in stated}
    new = {name: {"licence": text, "stated_in": where} for name, text in stated.items()}
    result = {**settings, "licences": {**kept, **new}}
    if "appended" in settings:
        result["appended"] = [_without(part, stated) for part in settings["appended"]]
    return result


def _without(part: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The record of an append without the licences of some data sets."""
    left = {name: entry for name, entry in part.get("licences", {}).items() if name not in names}
    return {**{key: value for key, value in part.items() if key != "licences"}, **({"licences": left} if left else {})}


def in_words(licences: Mapping[str, Iterable[str]]) -> str:
    """Return licences as text: ``ixi: CC BY-SA 3.0; clinic: unknown``."""
    return "; ".join(f"{name}: {' and '.join(texts) or UNKNOWN}" for name, texts in licences.items())
