"""Which scans a build leaves out: the rules with their thresholds, and what is measured of each scan.

Rules that look at one scan act while it is loaded; those that compare scans (duplicate, outlier) act when all have been
seen, on a digest of the voxels and on a coarse volume of each, see ``data_pipeline.quality.outliers``.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from data_pipeline.cohort.scan import Scan
from data_pipeline.volume.load import (
    DEFAULT_CHECKS,
    Array,
    BadScan,
    Grid,
    Preparation,
    as_float16,
    read_voxels,
    scale_factor,
    scaled,
    to_float16,
)
from infra.errors import UserError, nearest
from infra.files import atomic_write
from infra.settings import load_settings

FIGURES = (
    "quality_mean",
    "quality_std",
    "quality_zeros",
)  # share of zero voxels; mean and SD before rounding to float16
NEGATIVE_ZERO = 0x8000
COLUMNS = ("voxels_sha256", *FIGURES, "quality_correlation")  # what quality adds to scans.parquet
COARSE_MM, COARSE_SIDE = 8.0, 20  # the coarse volume: blocks of about 8 mm, at most 20 along an axis
WORST_MARK = 10.5  # CAT12's marks go from 0.5 (excellent) to 10.5
_strict = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_strict)
class Outlier:
    """Refuses scans whose correlation with the cohort's median scan has a robust z below ``robust_z`` and lies ``least_drop``
    or more below the cohort's median correlation.

    z alone would refuse the very old and the ill: a cohort of well aligned scans varies little, and a thinned cortex stands
    out among them (five simulated patients and children of 1,455 scans had z below -5, at 0.979 against 0.989).
    z = (r - median r) / (1.4826 x median absolute deviation of r); only low correlations are refused. A cohort of fewer
    than ``least_scans`` is not judged. It finds noise, shifts, turned or cut heads; left and right that have changed places
    alter the correlation too little to be found for sure.
    """

    use: bool = True
    robust_z: float = Field(default=-5.0, lt=0.0)
    least_drop: float = Field(default=0.05, ge=0.0, le=2.0)
    least_scans: int = Field(default=20, ge=3)


@dataclass(frozen=True, config=_strict)
class Cat12:
    """Refuses scans whose CAT12 image quality rating is above ``worst``: 1 excellent, 2 good, 3 satisfactory, 4 sufficient.

    Off where the participants' tables have no column ``column``; a scan without a value stays.
    """

    use: bool = True
    column: str = "cat12_iqr"
    worst: float = Field(default=3.5, ge=0.5, le=WORST_MARK)


@dataclass(frozen=True, config=_strict)
class Limits:
    """The lowest and highest value that may stay; a scan without a value stays."""

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
    """The rules of a build. What cannot be read, is empty or is not one 3D volume is always left out.

    ``nonfinite: zero`` keeps scans with NaN or infinite voxels (some programs write NaN outside the brain) and sets these
    to 0. ``limits`` bounds numeric columns of the participants' tables, ``age``, or a figure: ``quality_mean``,
    ``quality_std``, ``quality_zeros``.
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
        """The rules that ``volume.read_voxels`` applies."""
        return frozenset(name for name in (*DEFAULT_CHECKS, "grid") if getattr(self, name) == "refuse")


@dataclasses.dataclass(frozen=True)
class Removal:
    """A row of quarantine.tsv: a removed scan, the rule, the measured value and the threshold it violates, and the reason."""

    key: str
    path: str
    rule: str
    figure: float | None
    threshold: float | None
    reason: str

    @classmethod
    def of(cls, scan: Scan, error: BadScan) -> Removal:
        """The removal of a scan that raised ``error``."""
        return cls(scan.key, scan.place, error.rule, error.figure, error.threshold, str(error))

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Removal:
        """The inverse of ``to_dict``; also takes the texts of a row of quarantine.tsv."""
        figure, threshold = (_number(fields.get(name)) for name in ("figure", "threshold"))
        return cls(fields["key"], fields["path"], fields.get("rule") or "", figure, threshold, fields["reason"])


def _number(cell: float | str | None) -> float | None:
    """A cell of quarantine.tsv as a number; None if it is empty."""
    if isinstance(cell, str):
        return float(cell) if cell else None
    return cell


@dataclass(frozen=True, config=_strict)
class _Recipe:
    quality: Quality = field(default_factory=Quality)


def load_quality(recipe: Path | None, overrides: Sequence[str] = ()) -> Quality:
    """The section ``quality:`` of a YAML file, changed by ``--quality.key=value`` overrides. UserError for what is wrong."""
    return load_settings(_Recipe, recipe, overrides).quality


def check_quality(quality: Quality, scans: Iterable[Scan]) -> None:
    """UserError where a rule names a column that the cohort has not, or one that does not hold what it must."""
    numeric: set[str] = {"age", *FIGURES}
    for scan in scans:
        numeric.update(name for name, value in scan.extra.items() if isinstance(value, int | float))
        mark = scan.extra.get(quality.cat12.column)
        if not quality.cat12.use or mark is None:
            continue
        if not isinstance(mark, int | float) or not 0 < mark <= WORST_MARK:
            raise UserError(
                f"{quality.cat12.column}={mark!r} of {scan.key} is not a CAT12 mark of 0.5..{WORST_MARK} (1 is best); "
                f"correct the column, or set --quality.cat12.use=false and bound it by --quality.limits"
            )
    for name in quality.limits:
        if name not in numeric:
            raise UserError(
                f"quality.limits.{name}: the cohort has no numeric column {name!r}{nearest(name, numeric)}; "
                f"there: {', '.join(sorted(numeric))}"
            )


def read_scan(scan: Scan, preparation: Preparation, quality: Quality) -> tuple[Array, dict[str, Any], Array]:
    """Load a scan once: its voxels as shards hold them, its figures, and its coarse volume (see ``coarse_volume``).

    BadScan where a rule that looks at one scan refuses it.
    """
    # What the tables already tell spares the reading.
    known = {"age": scan.age, **scan.extra}
    _refuse_by_columns(known, quality)
    factor, grid = scale_factor(preparation.scaling, scan.extra), preparation.grid
    raw = read_voxels(
        scan.path, grid, quality.checks, crop=preparation.crop, intensity=preparation.intensity,
        orientation=scan.orientation,
    )  # fmt: skip
    # The same scan under two ids may have two head sizes: the digest is taken before scaling.
    digest = None if factor == 1.0 else digest_of(to_float16(raw.copy()))
    wide = scaled(raw, factor)
    voxels = as_float16(wide)
    figures = {"voxels_sha256": digest or digest_of(voxels), **_figures(wide, voxels)}
    _refuse_by_limits(figures, quality, FIGURES)
    return voxels, figures, coarse_volume(wide, grid)


def digest_of(voxels: Array) -> str:
    """Hexadecimal SHA-256 of (D, H, W) float16 voxels in C order."""
    return hashlib.sha256(np.ascontiguousarray(voxels).data).hexdigest()


def _figures(wide: Array, stored: Array) -> dict[str, float]:
    # Float32 within a row, float64 over rows: as exact as the six digits kept, and a fifth of the time of float64.
    rows = _c_order(wide)
    mean = float(np.einsum("ijk->ij", rows).sum(dtype=np.float64)) / wide.size
    squares = float(np.einsum("ijk,ijk->ij", rows, rows).sum(dtype=np.float64)) / wide.size
    bits = stored.view(np.uint16)  # numpy compares float16 one by one
    zeros = bits.size - np.count_nonzero(bits) + np.count_nonzero(bits == NEGATIVE_ZERO)
    figures = (mean, max(squares - mean * mean, 0.0) ** 0.5, zeros / bits.size)
    return {name: float(f"{value:.6g}") for name, value in zip(FIGURES, figures, strict=True)}


def coarse_volume(wide: Array, grid: Grid) -> Array:
    """Means of blocks of about 8 mm, larger where an axis would have more than 20 of them: (V,) float32, at most 8,000."""
    blocks = [
        max(1, round(COARSE_MM / spacing), -(-length // COARSE_SIDE))
        for length, spacing in zip(grid.shape, grid.spacing, strict=True)
    ]
    rows = _c_order(wide)
    turned = rows is not wide
    blocks = blocks[::-1] if turned else blocks
    firsts = [np.arange(0, length, block) for length, block in zip(rows.shape, blocks, strict=True)]
    # Whole slabs first: adding planes runs at the speed of memory, and leaves little for the other axes.
    sums = np.stack([rows[first : first + blocks[0]].sum(axis=0) for first in firsts[0]])
    sums = np.add.reduceat(np.add.reduceat(sums, firsts[1], axis=1), firsts[2], axis=2)
    counts = [np.diff([*first, length]) for first, length in zip(firsts, rows.shape, strict=True)]
    means = sums / np.multiply.outer(np.multiply.outer(*counts[:2]), counts[2]).astype(np.float32)
    return (means.T if turned else means).ravel()


def _c_order(wide: Array) -> Array:
    """The same voxels with the axes in the order of memory: NIfTI's first axis runs fastest."""
    return wide.T if wide.flags.f_contiguous and not wide.flags.c_contiguous else wide


def _refuse_by_columns(known: Mapping[str, Any], quality: Quality) -> None:
    mark = known.get(quality.cat12.column)
    if quality.cat12.use and mark is not None and mark > quality.cat12.worst:
        raise BadScan(
            f"CAT12 rates it {mark:g}, worse than {quality.cat12.worst:g}", "cat12", float(mark), quality.cat12.worst
        )
    _refuse_by_limits(known, quality, tuple(name for name in quality.limits if name not in FIGURES))


def _refuse_by_limits(known: Mapping[str, Any], quality: Quality, names: Iterable[str]) -> None:
    for name in names:
        limits, value = quality.limits.get(name), known.get(name)
        if limits is None or value is None or value != value:
            continue
        if limits.min is not None and value < limits.min:
            raise BadScan(f"{name}={value:g} is below {limits.min:g}", f"limits.{name}", float(value), limits.min)
        if limits.max is not None and value > limits.max:
            raise BadScan(f"{name}={value:g} is above {limits.max:g}", f"limits.{name}", float(value), limits.max)


def unlisted_removals(scans: Iterable[Scan]) -> list[Removal]:
    """The removals of scans whose participant no table lists."""
    return [Removal.of(scan, BadScan("participant is not in participants.tsv", "participant")) for scan in scans]


def write_quarantine(path: Path, removals: Iterable[Removal]) -> None:
    """Write quarantine.tsv, a row for each scan and reason, in the order of the keys."""
    unique = {(removal.key, removal.path, removal.rule, removal.reason): removal for removal in removals}
    columns = [column.name for column in dataclasses.fields(Removal)]
    with atomic_write(path, "w") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerow(columns)
        for _, removal in sorted(unique.items()):
            values = (getattr(removal, column) for column in columns)
            writer.writerow(f"{v:.6g}" if isinstance(v, float) else "" if v is None else v for v in values)


def read_quarantine(path: Path) -> list[Removal]:
    """The rows of a quarantine.tsv; none if the file does not exist."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as stream:
        return [Removal.from_dict(row) for row in csv.DictReader(stream, delimiter="\t")]
