"""The anatomy of one brain from the mean of many: sharp borders, and a given amount of grey matter."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Map = NDArray[np.float32]  # (D, H, W)
SHARPNESS = 8.0  # mm; over the voxel size it is the exponent that sharpens the borders of the mean of many brains
THINNED_OVER = 12.0  # mm, edge of the cube over which the cortex gets thinner by the asked amount
NEWTON_STEPS = 4
TINY = np.float32(1e-3)


def one_person(grey: Map, white: Map, fluid: Map, asked: Map, spacing: float) -> tuple[Map, Map, Map]:
    """Turn the shares of tissue in the mean of many brains into those of one brain with a given amount of grey matter.

    In the mean most voxels of the cortex hold some fluid; in one brain a voxel of 1 mm mostly holds one tissue. And a cortex
    that loses tissue gets thinner; it does not turn darker everywhere. So the border between grey matter and fluid is where a
    smooth threshold on their shares is crossed. The threshold is solved for (Newton's method) so that the mean of grey matter
    over a cube of ``THINNED_OVER`` mm is what is asked for.

    Args:
        grey, white, fluid: (D, H, W) mean shares.
        asked: (D, H, W) amount of grey matter; it is met as a local mean, and at most as far as there is room beside white
            matter.
        spacing: voxel size in mm. The larger a voxel is, the more of them hold several tissues.

    Returns:
        Grey matter, white matter and fluid, (D, H, W) each. Their sum is as it was.
    """
    sharpness = np.float32(max(SHARPNESS / spacing, 1.0))
    total, most = grey + white + fluid, np.maximum(grey, fluid)
    rest = total / (1 + (np.maximum(white, TINY) / np.maximum(most, TINY)) ** sharpness)  # all but white matter
    level = np.log(np.maximum(grey, TINY) / np.maximum(fluid, TINY))
    level = np.clip(level, np.float32(-5), np.float32(5))
    mean = partial(ndimage.uniform_filter, size=2 * round(THINNED_OVER / spacing / 2) + 1, mode="constant")
    aim, threshold = mean(asked), np.zeros_like(grey)
    for _ in range(NEWTON_STEPS):
        share = 1 / (1 + np.exp(sharpness * (threshold - level)))
        slope = sharpness * mean(rest * share * (1 - share))
        step = (mean(rest * share) - aim) / np.maximum(slope, np.float32(1e-3))
        threshold += np.clip(step, np.float32(-1), np.float32(1))  # longer steps go too far
    new = rest / (1 + np.exp(sharpness * (threshold - level)))
    return new, total - rest, rest - new
