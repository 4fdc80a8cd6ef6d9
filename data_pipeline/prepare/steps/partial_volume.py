"""Partial volumes: the share of each tissue in a voxel, from its intensity and a segmentation.

A segmentation gives a voxel at a border to one tissue or the other. A cortex of 2 to 4 mm is nearly all border on voxels of
1 mm, so its volume depends on how its borders are divided.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Volume = NDArray[np.float32]  # (D, H, W)

SURE = 0.9  # probability from which a voxel counts for a tissue's intensity
NEAR = 0.5  # probability that a tissue has in one of the 27 voxels around, if the voxel may hold some of it
STEPS = 40  # mixtures of two tissues that are told apart
PURE = 0.5  # share of voxels that hold one tissue
NOISE = 0.02  # of the difference of neighbouring tissues: the least noise that is assumed
LEVELS = 1024  # intensities at which the shares are computed; between them they are interpolated


def tissue_shares(voxels: Volume, mask: NDArray[np.bool_], probabilities: Sequence[Volume]) -> list[Volume]:
    """Return the expected share (D, H, W) of fluid, grey and white matter in each voxel; they sum to 1 inside the mask.

    A voxel holds one tissue, or two neighbours of the order fluid, grey matter, white matter in any proportion; its intensity
    is the mixture of theirs, with Gaussian noise. It holds no tissue that the segmentation did not find near it: bright vessels
    in fluid do not become white matter.

    Args:
        voxels: (D, H, W) intensities without bias field, in which fluid is darkest and white matter brightest.
        mask: the brain.
        probabilities: of fluid, grey and white matter (D, H, W), by a segmentation.

    Returns:
        Three volumes (D, H, W) float32. They are ``probabilities`` themselves where a tissue has no sure voxel, or where the
        tissues' intensities are not in that order.
    """
    sure = [(tissue > SURE) & mask for tissue in probabilities]
    if not all(tissue.any() for tissue in sure):
        return list(probabilities)
    means = np.array([np.median(voxels[_inner(tissue)]) for tissue in sure], dtype=np.float64)
    if not (means[0] < means[1] < means[2]):
        return list(probabilities)
    noise = max(_noise(voxels, sure[2]), NOISE * float(np.diff(means).min()))
    shares = _expected(voxels[mask], means, noise)  # (3, M)
    near = np.stack([ndimage.maximum_filter(tissue, size=3)[mask] > NEAR for tissue in probabilities])
    shares *= near
    total = shares.sum(axis=0)
    own = np.stack([tissue[mask] for tissue in probabilities])
    shares = np.where(total > 1e-3, shares / np.maximum(total, 1e-3), own / np.maximum(own.sum(axis=0), 1e-6))
    found = np.zeros((len(shares), *voxels.shape), np.float32)
    found[:, mask] = shares
    return list(found)


def _inner(tissue: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(D, H, W) the voxels of a tissue whose six neighbours are of it too, or all if there are none."""
    inner = ndimage.binary_erosion(tissue)
    return inner if inner.any() else tissue


def _noise(voxels: Volume, white: NDArray[np.bool_]) -> float:
    """The standard deviation of the noise: that of white matter away from its borders, by the median deviation."""
    values = voxels[_inner(_inner(white))]
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))


def _expected(values: Volume, means: NDArray[np.float64], noise: float) -> NDArray[Any]:
    """(3, M) expected shares of the tissues for intensities (M,): the mean over all mixtures, by their probability."""
    position = np.linspace(0.0, 2.0, 2 * STEPS + 1)  # 0: fluid; 1: grey matter; 2: white matter
    prior = np.full(len(position), (1.0 - PURE) / (len(position) - 3))
    prior[[0, STEPS, 2 * STEPS]] = PURE / 3.0
    intensity = np.interp(position, [0.0, 1.0, 2.0], means)
    levels = np.linspace(means[0] - 4.0 * noise, means[2] + 4.0 * noise, LEVELS)
    logs = np.log(prior) - 0.5 * ((levels[:, None] - intensity) / noise) ** 2
    weights = np.exp(logs - logs.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    of_tissue = np.stack([np.maximum(1.0 - np.abs(position - tissue), 0.0) for tissue in range(3)])
    return np.stack([np.interp(values, levels, weights @ shares) for shares in of_tissue])
