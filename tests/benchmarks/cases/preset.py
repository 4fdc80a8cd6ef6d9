"""A preset of augmentations as plain values, for processes that do not have this project's packages."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from data_pipeline.loading.augment import AUGMENTATIONS, PRESETS


def operators(preset: str) -> dict[str, dict[str, Any]]:
    """Return the settings of every operator of a preset, by name."""
    return {name: asdict(PRESETS[preset][name]) for name in AUGMENTATIONS}
