"""The voxel grid that a cohort's scans share."""

from __future__ import annotations

from collections.abc import Sequence

from data_pipeline.cohort.scan import Scan
from data_pipeline.volume.load import BadScan, Grid, open_image


def common_grid(scans: Sequence[Scan], sample: int = 5) -> Grid:
    """Return the grid that the first ``sample`` scans share, without the unreadable ones; else the 1.5 mm VBM grid."""
    grids = set()
    for scan in scans[:sample]:
        try:
            image = open_image(scan.path, scan.orientation)
        except BadScan:
            continue
        grids.add(Grid.of(image.shape, image.affine))
    shared = grids.pop() if len(grids) == 1 else None
    return shared if shared is not None and shared.upright else Grid.vbm(1.5)
