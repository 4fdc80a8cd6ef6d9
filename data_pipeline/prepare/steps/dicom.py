"""Folders of DICOM files: which series are T1-weighted 3D scans, and their conversion to NIfTI by dcm2niix.

The only module that imports pydicom and dcm2niix.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.cohort.scan import visible
from data_pipeline.volume.errors import BadScan
from infra.errors import UserError
from infra.files import open_file

TAGS = [
    "Modality", "SeriesInstanceUID", "StudyInstanceUID", "SeriesNumber", "SeriesDescription", "ProtocolName", "PatientID",
    "PatientAge", "PatientSex", "StudyDate", "ImageType", "MRAcquisitionType", "SliceThickness", "RepetitionTime", "EchoTime",
    "NumberOfFrames", "ScanningSequence", "ContrastBolusAgent",
]  # fmt: skip
LEAST_SLICES = 60
THICKEST = 4.0  # mm
LONGEST_ECHO = 15.0  # ms; longer ones weigh T2
# In the names that scanners give their series: words of T1-weighted 3D sequences, and of other images.
T1_NAMES = re.compile(
    r"(?<![a-z0-9])t1(?![0-9])|mp-?rage|mp2rage|spgr|bravo|flash3d|(?<![a-z])tfe|(?<![a-z])mpr(?![a-z])", re.IGNORECASE
)
OTHER_NAMES = re.compile(
    r"t2|flair|(?<![a-z])pd(?![a-z])|dwi|dti|bold|fmri|swi|asl|angio|tof|local|scout|survey|fieldmap", re.IGNORECASE
)


@dataclass(frozen=True)
class Series:
    """A series of DICOM files: its files in order of their names, the header of the first, and why it is left out, if it is."""

    files: tuple[Path, ...]
    header: dict[str, Any]
    reason: str

    @property
    def description(self) -> str:
        """The name that the scanner gave the series."""
        return str(self.header.get("SeriesDescription") or self.header.get("ProtocolName") or "")


def is_dicom(path: Path) -> bool:
    """Whether a file has the four letters of DICOM behind its preamble."""
    try:
        with open_file(path) as stream:
            return stream.read(132)[128:] == b"DICM"
    except (OSError, UserError):  # UserError: a pipe, a socket or a device
        return False


def first_dicom(folder: Path) -> Path | None:
    """Return a DICOM file below a folder, or None."""
    return next((path for path in _files(folder) if is_dicom(path)), None)


def find_series(folder: Path) -> list[Series]:
    """Return all series below a folder, sorted by participant, study and number, each with why it is left out.

    Raises UserError if pydicom is not installed.
    """
    pydicom = _pydicom()
    headers: dict[str, dict[str, Any]] = {}
    files: dict[str, list[Path]] = {}
    for path in sorted(_files(folder)):
        if not is_dicom(path):
            continue
        try:
            read = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=TAGS)
        except Exception:  # pydicom raises many types of error for a damaged file
            files.setdefault("", []).append(path)
            headers.setdefault("", {"SeriesDescription": "unreadable files"})
            continue
        uid = str(read.get("SeriesInstanceUID", path.parent))
        files.setdefault(uid, []).append(path)
        if uid not in headers:
            headers[uid] = {tag: read.get(tag) for tag in TAGS if read.get(tag) is not None}
    found = [Series(tuple(files[uid]), header, _reason(header, len(files[uid]))) for uid, header in headers.items()]
    return sorted(found, key=_order)


def _order(series: Series) -> tuple[str, str, str, int, str]:
    header = series.header
    number = _number(header.get("SeriesNumber"))
    return (
        str(header.get("PatientID", "")), str(header.get("StudyDate", "")), str(header.get("StudyInstanceUID", "")),
        int(number or 0), str(series.files[0]),
    )  # fmt: skip


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in visible(folder, folder.rglob("*")) if path.is_file())


def _reason(header: dict[str, Any], count: int) -> str:
    """Why a series is no T1-weighted 3D scan; empty if it is one."""
    names = " ".join(str(header.get(tag, "")) for tag in ("SeriesDescription", "ProtocolName"))
    slices = int(_number(header.get("NumberOfFrames")) or count)
    thickness, echo = (_number(header.get(tag)) for tag in ("SliceThickness", "EchoTime"))
    kinds = [str(kind).upper() for kind in header.get("ImageType") or ()]
    if not header.get("Modality"):
        return "unreadable"
    checks = [
        (header["Modality"] != "MR", f"modality {header['Modality']}"),
        ("DERIVED" in kinds or "SECONDARY" in kinds, "derived images"),
        (slices < LEAST_SLICES, f"{slices} slices, fewer than {LEAST_SLICES}"),
        (header.get("MRAcquisitionType", "3D") != "3D", "acquired in 2D"),
        (thickness is not None and thickness > THICKEST, f"slices of {thickness} mm"),
        (bool(OTHER_NAMES.search(names)), f"its name is of another kind of image: {names.strip()}"),
        (echo is not None and echo > LONGEST_ECHO, f"echo time of {echo} ms, not T1-weighted"),
        (not T1_NAMES.search(names) and echo is None, f"neither name nor echo time says T1-weighted: {names.strip()}"),
    ]
    return next((reason for wrong, reason in checks if wrong), "")


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def age_of(header: dict[str, Any]) -> float | None:
    """The age in years of a DICOM header (045Y, 018M, 030W, 400D), or None."""
    match = re.fullmatch(r"(\d{3})([YMWD])", str(header.get("PatientAge", "")).strip())
    if match is None:
        return None
    return round(int(match[1]) / {"Y": 1.0, "M": 12.0, "W": 365.25 / 7, "D": 365.25}[match[2]], 3)


def convert(series: Series, folder: Path) -> Path:
    """Convert a series to one NIfTI file in an empty folder; return its path.

    Raises BadScan if dcm2niix makes none or several of it, and UserError if dcm2niix is not installed.
    """
    try:
        import dcm2niix
    except ImportError:
        raise UserError(
            "dcm2niix is not installed, which converts DICOM; install it: pip install 'yaware[prepare]'"
        ) from None
    source = folder / "series"
    source.mkdir()
    for number, path in enumerate(series.files):  # a folder may hold several series
        (source / f"{number:06d}.dcm").symlink_to(path)
    command = [str(dcm2niix.bin), "-b", "n", "-z", "n", "-f", "scan", "-o", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    made = sorted(folder.glob("*.nii"))
    if len(made) != 1:
        last = " ".join((done.stderr or done.stdout).split())[-100:]
        raise BadScan(f"dcm2niix made {len(made)} volumes of {len(series.files)} files: {last}", "dicom", len(made), 1)
    return made[0]


def _pydicom() -> Any:
    try:
        import pydicom
    except ImportError:
        raise UserError(
            "pydicom is not installed, which reads DICOM; install it: pip install 'yaware[prepare]'"
        ) from None
    return pydicom
