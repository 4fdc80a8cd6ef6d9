"""Settings that several rows share; a preset of augmentations as plain values, for processes without our packages."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from data_pipeline.loading.augment import AUGMENTATIONS, PRESETS

# Options of the recipe `paper-bhb10k` with the layout that is faster on a CPU.
CHANNELS_LAST = ("--encoder.options={norm: batch, pooling: mean, channels_last: true}",)


def operators(preset: str) -> dict[str, dict[str, Any]]:
    """Return the settings of every operator of a preset, by name."""
    return {name: asdict(PRESETS[preset][name]) for name in AUGMENTATIONS}
