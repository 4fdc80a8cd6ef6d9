"""What a batch's views show: where each place of the scan lies in a view, what cutout hid, and what is masked.

Everything is drawn again from the counters (seed, epoch, scan, view), as in the reader process, so it needs no image and does
not depend on ranks, workers or the reader. Places are shares of the sides: (0, 0, 0) is the volume's low corner, (1, 1, 1)
its high corner. B = scans of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.loading.augment import Augmentation, View, draw_view
from data_pipeline.loading.augmentations.warp import warp_matrix
from infra.random_streams import MASKED_PATCHES, generator

PATCHES = (
    8  # per side of a volume; a patch of a VBM map of 121 x 145 x 121 voxels of 1.5 mm has sides of 23, 27 and 23 mm
)


@dataclass(frozen=True)
class ViewDetails:
    """Returns the details of the views of a batch, as arrays that the loader adds to it.

    Attributes:
        augmentation: the settings from which the views are drawn.
        shape: (D, H, W) of the scans.
        seed: the run's seed.
        masked: share of a view's patches to mask, 0 to 1.
    """

    augmentation: Augmentation
    shape: tuple[int, int, int]
    seed: int
    masked: float = 0.0

    def __call__(self, scans: NDArray[np.int64], shown: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Return the arrays of a batch.

        Args:
            scans: (B,) row numbers.
            shown: (B,) how often each scan was shown before.

        Returns:
            ``placement`` (2, B, 3, 4) float32: an affine map from a place in the scan to its place in the view;
            ``cutout`` (2, B, 2, 3) float32: low and high corner of the box that cutout hides, equal if there is none;
            ``masked`` (2, B, PATCHES, PATCHES, PATCHES) bool: which patches of the view are masked.
        """
        views = [[self._draw(*scan, number) for scan in self._scans(scans, shown)] for number in range(2)]
        return {
            "placement": np.stack([[placement(view, self.shape) for view in of_scans] for of_scans in views]),
            "cutout": np.stack([[cutout_box(view) for view in of_scans] for of_scans in views]),
            "masked": np.stack(
                [[self._mask(*scan, number) for scan in self._scans(scans, shown)] for number in range(2)]
            ),
        }

    @staticmethod
    def _scans(scans: NDArray[np.int64], shown: NDArray[np.int64]) -> list[tuple[int, int]]:
        return list(zip(scans.tolist(), shown.tolist(), strict=True))

    def _draw(self, scan: int, epoch: int, number: int) -> View:
        return draw_view(self.augmentation, self.shape, seed=self.seed, epoch=epoch, scan=scan, view=number)

    def _mask(self, scan: int, epoch: int, number: int) -> NDArray[np.bool_]:
        order = generator(self.seed, MASKED_PATCHES, (0, epoch, scan, number)).permutation(PATCHES**3)
        masked: NDArray[np.bool_] = order < masked_patches(self.masked)
        return masked.reshape(PATCHES, PATCHES, PATCHES)


def masked_patches(share: float) -> int:
    """Return the number of patches that are masked in every view, for a share of them."""
    return round(share * PATCHES**3)


def placement(view: View, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return the (3, 4) affine map from a place in the scan to its place in the view, both as shares of the sides."""
    matrix = warp_matrix(shape, view["crop"], view["affine"], view["flip"]).astype(
        np.float64
    )  # view to scan, in voxels
    sides = np.asarray(shape, np.float64)
    linear = np.linalg.inv(matrix[:, :3])
    in_shares = linear * sides[None, :] / sides[:, None]
    return np.concatenate([in_shares, -(linear @ matrix[:, 3])[:, None] / sides[:, None]], axis=1).astype(np.float32)


def cutout_box(view: View) -> NDArray[np.float32]:
    """Return the low and the high corner (2, 3) of the view's cutout, as shares of the sides; equal if there is none."""
    box = view["cutout"]
    if box is None:
        return np.zeros((2, 3), np.float32)
    return np.stack([box.corner, box.corner + np.float32(box.side)])
