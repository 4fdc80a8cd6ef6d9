"""Whether a scan looks like an encoder's training scans: a raw head is not a grey-matter map, though both fill the grid.

Scans are compared as coarse volumes (blocks of about 8 mm): r is Pearson's correlation with the mean of some training scans,
which does not depend on the unit of the voxels. The unit is compared by the mean voxel. Between templates of MNI space r is
0.83 for a brain without skull and its grey matter, 0.40 for grey and white matter.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.quality.rules import coarse_volume
from data_pipeline.storage.manifest import Manifest
from data_pipeline.volume.grid import Grid
from data_pipeline.volume.intensity import as_float32
from infra.errors import UserError

SCANS = 32  # training scans that are read
FEWEST = 2
# A scan is unlike the training scans if its r is below their median by more than LEAST_DROP and FACTOR times the distance
# of their lowest. In a simulated cohort maps have r = 0.99 and more, T1 images 0.87.
LEAST_DROP, FACTOR = 0.1, 3.0
FEW, LEAST_DROP_OF_FEW = 8, 0.3  # fewer training scans than FEW do not show how much scans differ
UNIT = 5.0  # the mean voxel may be this many times above the training scans' greatest, or below their smallest
# Grey-matter maps hold shares of tissue, times the change of volume: 0 to about 2. Raw heads reach hundreds.
GREATEST_GREY_MATTER = 10.0


def measure(manifest: Manifest, rows: NDArray[np.integer[Any]]) -> dict[str, Any] | None:
    """Return what the scans ``rows`` look like, as preprocessing.json records it; None if too few can be read.

    Up to ``SCANS`` of them are read, spread evenly over the rows.

    Returns:
        ``volume``: the mean of the scans' standardised coarse volumes, (V,) float16 in base64; ``median`` and ``lowest`` of
        each scan's correlation with the mean of the others; ``means``: the smallest and the greatest mean voxel; ``scans``:
        their number.
    """
    grid, volumes, means = Grid.from_dict(manifest.grid), [], []
    for position in np.unique(np.linspace(0, len(rows) - 1, min(SCANS, len(rows))).astype(int)) if len(rows) else ():
        try:
            voxels = manifest.read_volume(int(rows[position])).astype(np.float32)
        except (OSError, ValueError):  # the loader reports and counts damaged scans
            continue
        volume = _standardised(coarse_volume(voxels, grid))
        if volume is not None:
            volumes.append(volume)
            means.append(_mean(voxels))
    if len(volumes) < FEWEST:
        return None
    total = np.sum(volumes, axis=0)
    correlations = [_correlation(volume, total - volume) for volume in volumes]
    mean = (total / len(volumes)).astype("<f2")
    return {
        "volume": base64.b64encode(mean.tobytes()).decode(), "scans": len(volumes),
        "median": round(float(np.median(correlations)), 4), "lowest": round(min(correlations), 4),
        "means": [float(f"{value:.4g}") for value in (min(means), max(means))],
    }  # fmt: skip


class Likeness:
    """Tells which scans do not look like the training scans.

    Args:
        preprocessing: the encoder's; without the measure ``likeness``, only the range of grey-matter maps is checked.
    """

    def __init__(self, preprocessing: Mapping[str, Any]) -> None:
        self._grid = Grid.from_dict(preprocessing["grid"])
        self._modality, self._measure = preprocessing.get("modality"), preprocessing.get("likeness")
        if self._measure:
            self._volume = np.frombuffer(base64.b64decode(self._measure["volume"]), "<f2").astype(np.float64)
            median, lowest = float(self._measure["median"]), float(self._measure["lowest"])
            least = LEAST_DROP if self._measure["scans"] >= FEW else LEAST_DROP_OF_FEW
            self._limit = median - max(least, FACTOR * (median - lowest))

    def fault(self, stored: NDArray[np.float16]) -> str:
        """Return how voxels (D, H, W), as shards store them, differ from the training scans; empty if they do not.

        Raises UserError if the stored mean scan has another number of values than a scan on its grid.
        """
        voxels = as_float32(stored)
        if not self._measure:
            peak = float(voxels.max())
            too_bright = self._modality == "vbm" and peak > GREATEST_GREY_MATTER
            return f"its brightest voxel is {peak:.4g}; grey-matter maps have 0 to about 2" if too_bright else ""
        volume, (smallest, greatest) = _standardised(coarse_volume(voxels, self._grid)), self._measure["means"]
        if volume is not None and len(volume) != len(self._volume):
            raise UserError(
                f"preprocessing.json: likeness.volume has {len(self._volume)} values, a scan on its grid {len(volume)}; "
                "export the encoder again"
            )
        r, mean = 0.0 if volume is None else _correlation(volume, self._volume), _mean(voxels)
        if not r >= self._limit:  # also where r is NaN
            lowest = f"{self._measure['lowest']:.2f}"
            return f"its correlation with the mean training scan is {r:.2f}, that of training scans {lowest} or more"
        if not smallest / UNIT <= mean <= greatest * UNIT:
            return f"its mean voxel is {mean:.3g}, that of training scans {smallest:.3g} to {greatest:.3g}"
        return ""


def _mean(voxels: NDArray[np.float32]) -> float:
    """The mean size of a volume's voxels."""
    return float(np.abs(voxels).mean(dtype=np.float64))


def _standardised(volume: NDArray[np.float32]) -> NDArray[np.float64] | None:
    """A coarse volume with mean 0 and standard deviation 1; None if it is constant."""
    wide = volume.astype(np.float64)
    deviation = float(wide.std())
    return None if not np.isfinite(deviation) or deviation == 0 else (wide - wide.mean()) / deviation


def _correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    return float(np.corrcoef(first, second)[0, 1])
