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
    "PatientAge", "PatientSex", "StudyDate", "ImageType", "MRAcquisitionType", "SliceThickness", "InversionTime", "EchoTime",
    "NumberOfFrames", "ScanningSequence", "ContrastBolusAgent", "ContrastBolusAgentSequence",
]  # fmt: skip
NAME_TAGS = ("SeriesDescription", "ProtocolName")  # the description first: GE's protocol names the examination
LEAST_SLICES = 60
THICKEST = 4.0  # mm
LONGEST_ECHO = 15.0  # ms; longer ones weigh T2
INVERSION = (300.0, 1500.0)  # ms; inversion times of T1-weighted scans: about 450 (GE), 1000 (Siemens, Philips)
# In the names that scanners give their series: words of T1-weighted 3D sequences, and of other images.
VIEW = r"(?<![a-z0-9])(?:[23]d|ax(?:ial)?|sag|cor|tra|ir)*"  # 3DT1, SagT2; Philips writes sT1W, eT2W, dPDW
T1_NAMES = re.compile(
    rf"{VIEW}(?:t1|[sedv]t1w)(?![0-9])|{VIEW}tfe(?!pi)|mp[2n]?[ _-]?rage|spgr|mdeft|(?<![a-z])(?:bravo|mpr)(?![a-z])"
    r"|flash[ _-]?3d|3d[ _-]?flash",
    re.IGNORECASE,
)
OTHER_NAMES = re.compile(
    rf"{VIEW}(?:t2|[sedv]t2w|r2s)(?![0-9])|{VIEW}(?:pd(?:w|fs|wfs|flash3d)?|[sed]pdw)(?![a-z])|proton|flair"
    r"|(?<![a-z0-9])mt(?:w|c|r|on|off|flash3d)?(?![a-z])|magneti[sz]ation"
    r"|t1w?[ _-]?map|t1[ _-]?rho|mp2rage.*t1[ _-]images|(?<![a-z])inv[ _-]?[12](?![0-9])|sa2rage"
    r"|(?<![a-z0-9])t?b[01](?![0-9]| ?_?corr)|field[ _-]?map|(?<![a-z])(?:fmap|cal|calib\w*)(?![a-z])|ref[ _-]?scan"
    r"|lo[ck]ali[sz]|pl(?:ane)?loc|(?<![a-z])loc(?:al)?(?![a-z])|scout|survey"
    r"|fmri|ep[23]d|(?<![a-z])(?:dmri|dwi|dti|diff|diffusion|adc|bold|qsm|swip?|swan|(?:p|pc|v)?asl|perf(?:usion)?)(?![a-z])"
    r"|(?<![a-z])(?:[23]d)?(?:tof|asl|pc)(?![a-z])|(?<![a-z])(?:angio|mra(?![a-z])|mrv(?![a-z]))|phase[ _-]?contrast"
    r"|balanced|(?<![a-z])(?:b[ _-]?[tf]fe|fiesta|ciss|b?ssfp|stir)(?![a-z])",
    re.IGNORECASE,
)
# Names of scans after a contrast agent; a match without the first group says that there is none ("pre contrast").
CONTRAST_NAMES = re.compile(
    r"(?:(?<![a-z])(?:pre|non?|without|wo|w/o|ohne)[ _-]*(?:gd|gad[a-z]*|con|contrast|km)(?![a-z]))"
    r"|((?<![a-z])(?:post(?:gd|gad[a-z]*|con|contrast|km)?|gd|gad[a-z]*|contrast|km)(?![a-z]| ?_?-?(?:op|fossa))"
    r"|\+ ?c(?![a-z])|(?<![a-z])c\+|(?<![a-z])t1w?(?:c|ce|gd)(?![a-z]))",
    re.IGNORECASE,
)
NO_AGENT = re.compile(r"(?:(?:no|none|non|n/?a|nil|without|w/?o|0|-)(?:[ _-]*contrast.*)?)?", re.IGNORECASE)


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
    """Why a series is no T1-weighted 3D scan without contrast agent; empty if it is one."""
    kind, name = _kind(header)
    slices = int(_number(header.get("NumberOfFrames")) or count)
    thickness, echo = (_number(header.get(tag)) for tag in ("SliceThickness", "EchoTime"))
    kinds, agent, lacking = _values(header, "ImageType"), _contrast_agent(header), _lacking(header)
    acquired = str(header.get("MRAcquisitionType") or "")
    if not header.get("Modality"):
        return "unreadable"
    checks = [
        (header["Modality"] != "MR", f"modality {header['Modality']}"),
        (bool(kinds & {"DERIVED", "SECONDARY"}), "derived images"),
        (slices < LEAST_SLICES, f"{slices} slices, fewer than {LEAST_SLICES}"),
        (acquired not in ("", "3D"), f"acquired in {acquired}"),
        (thickness is not None and thickness > THICKEST, f"slices of {thickness} mm"),
        (kind == "other", f"its name is of another kind of image: {name}"),
        (echo is not None and echo > LONGEST_ECHO, f"echo time of {echo} ms, not T1-weighted"),
        (bool(agent), f"contrast agent: {agent}"),
        (
            kind != "T1" and bool(lacking),
            f"neither name nor tags say T1-weighted: {name or 'no name'}; the header lacks {', '.join(lacking)}",
        ),
    ]
    return next((reason for wrong, reason in checks if wrong), "")


def _kind(header: dict[str, Any]) -> tuple[str, str]:
    """Return the kind of image (T1, other, or empty) and the name that says so; the description precedes the protocol."""
    names = [text for tag in NAME_TAGS if (text := " ".join(str(header.get(tag) or "").split()))]
    for name in names:
        for kind, pattern in (("other", OTHER_NAMES), ("T1", T1_NAMES)):
            if pattern.search(name):
                return kind, name
    return "", names[0] if names else ""


def _contrast_agent(header: dict[str, Any]) -> str:
    """Return the contrast agent of a header, or the name that mentions one; empty if there is none."""
    agents = [str(header.get("ContrastBolusAgent") or "")]
    for item in header.get("ContrastBolusAgentSequence") or ():  # files of many frames
        agents.append(str(item.get("CodeMeaning") or item.get("CodeValue") or "unnamed"))
    for agent in agents:
        if not NO_AGENT.fullmatch(agent.strip()):
            return " ".join(agent.split())
    name = next((str(header[tag]) for tag in NAME_TAGS if header.get(tag)), "")
    return f"in the name {name}" if any(match[1] for match in CONTRAST_NAMES.finditer(name)) else ""


def _lacking(header: dict[str, Any]) -> list[str]:
    """Return what a header lacks to be T1-weighted whatever its name: a 3D gradient echo after an inversion pulse.

    Maps of the field, of B1 and of susceptibility and scans weighted by proton density also have short echoes, but no
    inversion pulse.
    """
    sequence, inversion = _values(header, "ScanningSequence"), _number(header.get("InversionTime"))
    inverted = INVERSION[0] <= inversion <= INVERSION[1] if inversion else "IR" in sequence
    checks = [
        (header.get("MRAcquisitionType") == "3D", "acquisition type 3D"),
        (bool(_number(header.get("EchoTime"))), "an echo time"),
        ("GR" in sequence and not sequence & {"SE", "EP"}, "scanning sequence GR"),
        (inverted, f"an inversion time of {INVERSION[0]:g} to {INVERSION[1]:g} ms"),
    ]
    return [what for right, what in checks if not right]


def _values(header: dict[str, Any], tag: str) -> set[str]:
    """Return the values of a tag, which may have one, several or none, in capitals."""
    value = header.get(tag) or ()
    return {str(one).upper() for one in ([value] if isinstance(value, str) else value)}


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
