"""The picture of a prepared scan: three slices with the contours of the brain's mask and of the template's white matter."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from data_pipeline.prepare.prepared import Picture
from data_pipeline.prepare.template import load_template

MASK, TISSUE = "#E69F00", "#56B4E9"  # from Okabe and Ito (2008)
CUTS = (4.0, -20.0, 8.0)  # mm in the template: the sagittal, coronal and axial slice


def draw(picture: Picture) -> bytes:
    """Draw a picture as a PNG.

    Left is on the left, superior or anterior at the top. A correct registration has the blue contours (white matter of the
    template) on the edges of the scan's white matter, and the orange one around the brain.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tissue = load_template(picture.grid).white
    inside = picture.voxels[picture.mask]
    peak = float(np.percentile(inside, 99.5)) if inside.size else 1.0
    origin, spacing = np.array(picture.grid.affine)[:3, 3], picture.grid.spacing
    slices = []
    for plane, millimetres in enumerate(CUTS):
        index = round((millimetres - origin[plane]) / spacing[plane])
        slices.append([np.take(part, index, axis=plane).T[::-1] for part in (picture.voxels, picture.mask, tissue)])
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # other pages change the defaults, and a scan has one picture
        widths = [image.shape[1] / image.shape[0] for image, _, _ in slices]
        figure, axes = plt.subplots(
            1, 3, figsize=(2.0 * sum(widths), 2.0), facecolor="black",
            gridspec_kw={"width_ratios": widths, "wspace": 0.02, "left": 0, "right": 1, "top": 1, "bottom": 0},
        )  # fmt: skip
        for axis, (image, mask, white) in zip(axes, slices, strict=True):
            axis.imshow(image, cmap="gray", vmin=0.0, vmax=1.1 * peak, interpolation="bilinear")
            _contour(axis, mask, MASK)
            _contour(axis, white, TISSUE)
            axis.axis("off")
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=110, metadata={"Software": None})
        plt.close(figure)
    return stream.getvalue()


def _contour(axis: Any, values: Any, colour: str) -> None:
    """A contour at one half, if there is one."""
    values = np.asarray(values, dtype=np.float32)
    if values.min() < 0.5 < values.max():
        axis.contour(values, [0.5], colors=colour, linewidths=0.7)
