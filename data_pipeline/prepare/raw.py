"""Open a raw scan, and refuse what is not a whole head in three dimensions: series, label maps, empty volumes, localisers."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.analyze import AnalyzeHeader
from numpy.typing import NDArray
from scipy.io import whosmat

from data_pipeline.volume.errors import BadScan
from data_pipeline.volume.load import open_image
from infra.files import regular_file

LEAST_EXTENT = 100.0  # mm along each axis; the smallest adult brains are 130 mm long, wide and high
MOST_NONFINITE = 0.05  # share of voxels that may be NaN or infinite, as some converters write outside the head
LABELS_ALIKE = (
    0.75  # share of equal neighbours above which whole numbers are labels: 0.99 in atlases, below 0.3 in images
)
SMOOTHEST = 4000  # more different values are no labels


@dataclass(frozen=True)
class RawScan:
    """A raw scan: (D, H, W) float32 in RAS, its affine, and how many of its voxels were NaN or infinite and became 0."""

    voxels: NDArray[np.float32]
    affine: NDArray[np.float64]
    nonfinite: int


def read_raw(path: Path, orientation: str = "", *, most_voxel: float = 4.0) -> RawScan:
    """Read a raw scan in canonical orientation.

    Args:
        path: any format that nibabel reads.
        orientation: of an .npy array, see ``open_image``.
        most_voxel: the longest edge of a voxel in mm.

    Raises:
        BadScan: it is not one whole head in 3D, or its header states no orientation or two.
    """
    check_header(path)
    try:
        image = open_image(path, orientation)
    except BadScan as error:  # quarantine.tsv and the quality page name the rule beside the reason
        reason = str(error).removeprefix(f"{error.rule}: ")
        raise BadScan(reason, error.rule, error.measured, error.threshold) from None
    lengths = np.linalg.norm(np.asarray(image.affine)[:3, :3], axis=0)
    extent = np.array(image.shape) * lengths
    if extent.min() < LEAST_EXTENT:
        shown = " x ".join(f"{length:.0f}" for length in extent)
        raise BadScan(
            f"covers {shown} mm, not a whole head: a localiser, a slab or another species", "extent",
            float(extent.min()), LEAST_EXTENT,
        )  # fmt: skip
    if lengths.max() > most_voxel:
        raise BadScan(
            f"slices are {lengths.max():.3g} mm apart: a 2D series, not a 3D scan",
            "voxel",
            float(lengths.max()),
            most_voxel,
        )
    try:
        voxels = np.array(image.dataobj, dtype=np.float32, order="C")
    except Exception as error:  # a truncated gzip stream raises only here
        raise BadScan(f"{type(error).__name__}: {' '.join(str(error).split())[:80]}") from None
    wrong = ~np.isfinite(voxels)
    count = int(wrong.sum())
    if count > MOST_NONFINITE * voxels.size:
        raise BadScan(f"{count} voxels are NaN or infinite", "nonfinite", count, int(MOST_NONFINITE * voxels.size))
    voxels[wrong] = 0.0
    if voxels.min() == voxels.max():
        raise BadScan(f"every voxel is {voxels.min():g}", "constant", float(voxels.min()))
    _refuse_labels(voxels)
    return RawScan(voxels, np.asarray(image.affine, dtype=np.float64), count)


def check_header(path: Path) -> None:
    """Raise BadScan if a NIfTI or Analyze file does not say which side is left, or says two different things."""
    if path.suffix.lower() == ".npy":
        return
    try:
        image: Any = nibabel.load(regular_file(path))
    except Exception:  # `open_image` says what is wrong with the file
        return
    if isinstance(image.header, nibabel.Nifti1Header):  # in nibabel it is an AnalyzeHeader too
        _check_nifti(image.header)
    elif isinstance(image.header, AnalyzeHeader) and not _has_spm_matrix(image):
        raise BadScan(
            "its Analyze header states no orientation, so that left and right are unknown; NIfTI and MGH files state it, or "
            "SPM's .mat file with `mat` beside the scan: convert the original DICOM files to NIfTI",
            "header",
        )


def _has_spm_matrix(image: Any) -> bool:
    """Whether SPM's .mat file states the orientation: its ``mat`` does, but the sides of an older ``M`` depend on a setting."""
    if "mat" not in image.file_map:
        return False
    try:
        with image.file_map["mat"].get_prepare_fileobj() as stream:
            contents: Any = BytesIO(stream.read())
            return any(name == "mat" for name, *_ in whosmat(contents))
    except Exception:  # there is no such file, or it is empty; `nibabel.load` has refused a damaged one
        return False


def _check_nifti(header: Any) -> None:
    """Raise BadScan if a NIfTI header states no orientation, or left and right of its two orientations differ."""
    (sform, scode), (qform, qcode) = header.get_sform(coded=True), header.get_qform(coded=True)
    if sform is None and qform is None:
        raise BadScan(
            "its header states no orientation (qform and sform codes are 0), so that left and right are unknown",
            "header",
        )
    if sform is None or qform is None:
        return
    if np.linalg.det(sform[:3, :3]) * np.linalg.det(qform[:3, :3]) < 0:
        sides = ["".join(nibabel.aff2axcodes(matrix)) for matrix in (sform, qform)]
        raise BadScan(
            f"left and right are swapped between its two headers: sform says {sides[0]}, qform {sides[1]}", "left-right",
            float(scode), float(qcode),
        )  # fmt: skip


def _refuse_labels(voxels: NDArray[np.float32]) -> None:
    """Raise BadScan for a label map or a mask: few whole numbers, and neighbours that are nearly always equal."""
    cut = tuple(slice(length // 6, length - length // 6) for length in voxels.shape)
    centre = voxels[cut]
    if not np.array_equal(centre, np.rint(centre)) or len(np.unique(centre)) > SMOOTHEST:
        return
    inside = (centre[1:] != 0) & (centre[:-1] != 0)
    alike = float((centre[1:] == centre[:-1])[inside].mean()) if inside.any() else 1.0
    if alike > LABELS_ALIKE:
        raise BadScan(
            f"is a label map or a mask: {alike:.0%} of its neighbouring voxels are equal", "labels", alike, LABELS_ALIKE
        )
