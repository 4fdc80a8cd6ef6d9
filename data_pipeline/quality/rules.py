"""The quality rules of a build with their thresholds, and the statistics that are measured of each scan.

Rules for single scans apply while the scan is loaded. Rules that compare scans (duplicate, outlier) apply after all scans
are loaded, to a digest of the voxels and a coarse volume of each scan; see ``data_pipeline.quality.outliers``.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from data_pipeline.cohort.scan import Scan
from data_pipeline.volume.errors import BadScan
from data_pipeline.volume.grid import Grid
from data_pipeline.volume.intensity import as_float16, scale_for_float16, to_float16
from data_pipeline.volume.load import DEFAULT_CHECKS, read_voxels
from data_pipeline.volume.preparation import Preparation, scale_factor
from infra.errors import UserError, nearest
from infra.files import atomic_write, open_file
from infra.settings import load_settings

# Mean and standard deviation before rounding to float16, and the share of zero voxels.
STATISTICS = ("quality_mean", "quality_std", "quality_zeros")
COLUMNS = ("voxels_sha256", *STATISTICS, "quality_correlation")  # the columns of scans.parquet that this room adds
NEGATIVE_ZERO = 0x8000  # as float16 bits
COARSE_MM, COARSE_BLOCKS = 8.0, 20  # a coarse volume has blocks of about 8 mm, at most 20 along an axis
WORST_RATING = 10.5  # CAT12's ratings range from 0.5 (excellent) to 10.5
_strict = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_strict)
class Outlier:
    """Exclude scans whose correlation with the cohort's median scan is low.

    A scan is excluded if the robust z of its correlation r is below ``robust_z`` and r is at least ``least_drop`` below the
    cohort's median correlation: z = (r - median r) / (1.4826 x median absolute deviation of r). Cohorts of fewer than
    ``least_scans`` scans are not judged.

    z alone would exclude the very old and the ill, because correlations vary little in a well aligned cohort: of 1,455
    simulated scans, five of patients and children had z below -5, at r = 0.979 against a median of 0.989.
    The rule finds noise and shifted, rotated or cropped heads. It does not reliably find scans whose left and right are
    swapped, because that changes the correlation too little.
    """

    use: bool = True
    robust_z: float = Field(default=-5.0, lt=0.0)
    least_drop: float = Field(default=0.05, ge=0.0, le=2.0)
    least_scans: int = Field(default=20, ge=3)


@dataclass(frozen=True, config=_strict)
class Cat12:
    """Exclude scans whose CAT12 image quality rating is above ``worst``: 1 excellent, 2 good, 3 satisfactory, 4 sufficient.

    The rule does nothing if the participants' tables have no column ``column``; scans without a value stay.
    """

    use: bool = True
    column: str = "cat12_iqr"
    worst: float = Field(default=3.5, ge=0.5, le=WORST_RATING)


@dataclass(frozen=True, config=_strict)
class Limits:
    """The lowest and highest allowed value; scans without a value stay."""

    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _in_order(self) -> Limits:
        if self.min is None and self.max is None:
            raise ValueError("give min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}")
        return self


@dataclass(frozen=True, config=_strict)
class Quality:
    """The quality rules of a build. Scans that are unreadable, empty or not one 3D volume are always excluded.

    ``nonfinite: zero`` keeps scans with NaN or infinite voxels (some programs write NaN outside the brain) and sets these
    voxels to 0. ``grid: refuse`` excludes scans on another grid instead of resampling them. ``limits`` bounds ``age``,
    numeric columns of the participants' tables, or a statistic: ``quality_mean``, ``quality_std``, ``quality_zeros``.
    """

    nonfinite: Literal["refuse", "zero"] = "refuse"
    constant: Literal["refuse", "keep"] = "refuse"
    grid: Literal["resample", "refuse"] = "resample"
    duplicate: Literal["refuse", "keep"] = "refuse"
    outlier: Outlier = field(default_factory=Outlier)
    cat12: Cat12 = field(default_factory=Cat12)
    limits: dict[str, Limits] = field(default_factory=dict)

    @property
    def checks(self) -> frozenset[str]:
        """The rules that ``volume.load.read_voxels`` applies."""
        return frozenset(name for name in (*DEFAULT_CHECKS, "grid") if getattr(self, name) == "refuse")


@dataclasses.dataclass(frozen=True)
class Removal:
    """A row of quarantine.tsv: an excluded scan, the rule, the measured value and the threshold it violates, and the reason."""

    key: str
    path: str
    rule: str
    measured: float | None
    threshold: float | None
    reason: str

    @classmethod
    def of(cls, scan: Scan, error: BadScan) -> Removal:
        """The removal of a scan that raised ``error``."""
        return cls(scan.key, scan.reported_path, error.rule, error.measured, error.threshold, str(error))

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Removal:
        """The inverse of ``to_dict``; also takes the texts of a row of quarantine.tsv.

        Older files call the measured value ``figure``.
        """
        measured, threshold = _number(fields.get("measured", fields.get("figure"))), _number(fields.get("threshold"))
        return cls(fields["key"], fields["path"], fields.get("rule") or "", measured, threshold, fields["reason"])


def _number(cell: float | str | None) -> float | None:
    """A cell of quarantine.tsv as a number; None if it is empty."""
    if isinstance(cell, str):
        return float(cell) if cell else None
    return cell


@dataclass(frozen=True, config=_strict)
class _Recipe:
    quality: Quality = field(default_factory=Quality)


def load_quality(recipe: Path | None, overrides: Sequence[str] = ()) -> Quality:
    """Load the quality rules from a file and the command line.

    Args:
        recipe: a YAML file with a section ``quality:``; None for the defaults.
        overrides: changes of single rules, each ``--quality.key=value``.

    Raises:
        UserError: a key is unknown or a value is not allowed.
    """
    return load_settings(_Recipe, recipe, overrides).quality


def check_quality(quality: Quality, scans: Iterable[Scan], built: str = "") -> None:
    """Check the rules against the columns of a cohort; ``built`` names the shards whose rules they are, if they exist.

    Raises:
        UserError: a limit names a column that does not exist or is not numeric, or the CAT12 column holds another value
            than a CAT12 rating.
    """
    numeric: set[str] = {"age", *STATISTICS}
    for scan in scans:
        numeric.update(name for name, value in scan.extra.items() if isinstance(value, int | float))
        rating = scan.extra.get(quality.cat12.column)
        if not quality.cat12.use or rating is None:
            continue
        if not isinstance(rating, int | float) or not 0 < rating <= WORST_RATING:
            raise UserError(
                f"{quality.cat12.column}={rating!r} of {scan.key} is not a CAT12 rating of 0.5..{WORST_RATING} (1 is best); "
                + (
                    f"correct the column; the rules are those of {built}"
                    if built
                    else "correct the column, or set --quality.cat12.use=false and use --quality.limits for this column"
                )
            )
    for name in quality.limits:
        if name not in numeric:
            raise UserError(
                f"quality.limits.{name}: the cohort has no numeric column {name!r}{nearest(name, numeric)}; "
                f"found: {', '.join(sorted(numeric))}"
            )


def read_scan(
    scan: Scan, preparation: Preparation, quality: Quality
) -> tuple[NDArray[np.float16], dict[str, Any], NDArray[np.float32]]:
    """Load a scan and apply the rules for single scans.

    Returns:
        The voxels as stored in a shard, (D, H, W) float16; ``voxels_sha256`` and the statistics by name; and the coarse
        volume (see ``coarse_volume``).

    Raises:
        BadScan: the scan is unusable, or a rule excludes it.
    """
    columns = {"age": scan.age, **scan.extra}
    _check_columns(columns, quality)  # first, because it does not need the voxels
    factor, grid = scale_factor(preparation.scaling, scan.extra), preparation.grid
    unscaled = read_voxels(
        scan.path, grid, quality.checks, crop=preparation.crop, intensity=preparation.intensity,
        orientation=scan.orientation,
    )  # fmt: skip
    # The digest is taken before scaling, so that one scan under two ids with two head sizes is found as a duplicate.
    digest = None if factor == 1.0 else voxels_digest(to_float16(unscaled.copy()))
    exact = scale_for_float16(unscaled, factor)
    stored = as_float16(exact)
    statistics = _statistics(exact, stored)
    _check_limits(statistics, quality, STATISTICS)
    return stored, {"voxels_sha256": digest or voxels_digest(stored), **statistics}, coarse_volume(exact, grid)


def voxels_digest(voxels: NDArray[np.float16]) -> str:
    """Hexadecimal SHA-256 of (D, H, W) float16 voxels in C order."""
    return hashlib.sha256(np.ascontiguousarray(voxels).data).hexdigest()


def _statistics(exact: NDArray[np.float32], stored: NDArray[np.float16]) -> dict[str, float]:
    """``STATISTICS`` by name, from the voxels before and after rounding to float16, to six digits."""
    # Sums in float32 along a row, in float64 over rows: exact to six digits, in a fifth of the time of float64.
    rows = _memory_order(exact)
    mean = float(np.einsum("ijk->ij", rows).sum(dtype=np.float64)) / exact.size
    squares = float(np.einsum("ijk,ijk->ij", rows, rows).sum(dtype=np.float64)) / exact.size
    bits = stored.view(np.uint16)  # numpy compares float16 slowly, one by one
    zeros = bits.size - np.count_nonzero(bits) + np.count_nonzero(bits == NEGATIVE_ZERO)
    values = (mean, max(squares - mean * mean, 0.0) ** 0.5, zeros / bits.size)
    return {name: float(f"{value:.6g}") for name, value in zip(STATISTICS, values, strict=True)}


def coarse_volume(voxels: NDArray[np.float32], grid: Grid) -> NDArray[np.float32]:
    """Average a volume (D, H, W) over blocks.

    Blocks have edges of about 8 mm, or longer if an axis would have more than 20 blocks.

    Returns:
        (V,) float32, V at most 8,000, in C order of the blocks.
    """
    blocks = [
        max(1, round(COARSE_MM / spacing), -(-length // COARSE_BLOCKS))
        for length, spacing in zip(grid.shape, grid.spacing, strict=True)
    ]
    rows = _memory_order(voxels)
    transposed = rows is not voxels
    blocks = blocks[::-1] if transposed else blocks
    firsts = [np.arange(0, length, block) for length, block in zip(rows.shape, blocks, strict=True)]
    # The axis of whole planes first: adding planes is limited only by memory speed and shrinks the work for the others.
    sums = np.stack([rows[first : first + blocks[0]].sum(axis=0) for first in firsts[0]])
    sums = np.add.reduceat(np.add.reduceat(sums, firsts[1], axis=1), firsts[2], axis=2)
    counts = [np.diff([*first, length]) for first, length in zip(firsts, rows.shape, strict=True)]
    means = sums / np.multiply.outer(np.multiply.outer(*counts[:2]), counts[2]).astype(np.float32)
    return np.asarray((means.T if transposed else means).ravel(), dtype=np.float32)


def _memory_order(voxels: NDArray[np.float32]) -> NDArray[np.float32]:
    """The voxels with their axes in the order of memory: transposed if the array is in Fortran order, as NIfTI files are."""
    return voxels.T if voxels.flags.f_contiguous and not voxels.flags.c_contiguous else voxels


def _check_columns(columns: Mapping[str, Any], quality: Quality) -> None:
    """Apply the rules for columns of the tables; raises BadScan if one excludes the scan."""
    rating, worst = columns.get(quality.cat12.column), quality.cat12.worst
    if quality.cat12.use and rating is not None and rating > worst:
        raise BadScan(f"CAT12 rates it {rating:g}, worse than {worst:g}", "cat12", float(rating), worst)
    _check_limits(columns, quality, tuple(name for name in quality.limits if name not in STATISTICS))


def _check_limits(values: Mapping[str, Any], quality: Quality, names: Iterable[str]) -> None:
    """Apply the limits of some values; raises BadScan if one is violated."""
    for name in names:
        limits, value = quality.limits.get(name), values.get(name)
        if limits is None or value is None or value != value:
            continue
        if limits.min is not None and value < limits.min:
            raise BadScan(f"{name}={value:g} is below {limits.min:g}", f"limits.{name}", float(value), limits.min)
        if limits.max is not None and value > limits.max:
            raise BadScan(f"{name}={value:g} is above {limits.max:g}", f"limits.{name}", float(value), limits.max)


def unlisted_removals(scans: Iterable[Scan]) -> list[Removal]:
    """The removals of scans that no table lists."""
    return [
        Removal.of(scan, BadScan(scan.unlisted, "session"))
        if scan.unlisted
        else Removal.of(scan, BadScan("participant is not in participants.tsv", "participant"))
        for scan in scans
    ]


def write_quarantine(path: Path, removals: Iterable[Removal]) -> None:
    """Write quarantine.tsv: one row per scan, rule and reason, sorted by key."""
    unique = {(removal.key, removal.path, removal.rule, removal.reason): removal for removal in removals}
    columns = [column.name for column in dataclasses.fields(Removal)]
    with atomic_write(path, "w") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerow(columns)
        for _, removal in sorted(unique.items()):
            values = (getattr(removal, column) for column in columns)
            writer.writerow(f"{v:.6g}" if isinstance(v, float) else "" if v is None else v for v in values)


def read_quarantine(path: Path) -> list[Removal]:
    """Read the rows of a quarantine.tsv; none if the file does not exist."""
    if not path.exists():
        return []
    with io.TextIOWrapper(open_file(path), encoding="utf-8", newline="") as stream:
        return [Removal.from_dict(row) for row in csv.DictReader(stream, delimiter="\t")]
