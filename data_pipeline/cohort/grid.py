"""The grid that the scans of a cohort share."""

from __future__ import annotations

from collections.abc import Sequence

from data_pipeline.cohort.scan import Scan
from data_pipeline.volume.errors import BadScan
from data_pipeline.volume.grid import Grid
from data_pipeline.volume.load import open_image

SCANS_TO_OPEN = 5


def common_grid(scans: Sequence[Scan]) -> Grid:
    """Return the grid that the first readable scans share, or the VBM grid at 1.5 mm if they share no upright grid."""
    grids = set()
    for scan in scans[:SCANS_TO_OPEN]:
        try:
            image = open_image(scan.path, scan.orientation)
        except BadScan:
            continue
        grids.add(Grid.of(image.shape, image.affine))
    shared = grids.pop() if len(grids) == 1 else None
    return shared if shared is not None and shared.upright else Grid.vbm(1.5)
