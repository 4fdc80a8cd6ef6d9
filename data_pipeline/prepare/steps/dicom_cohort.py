"""A folder of DICOM files as a BIDS folder of raw scans: participants, sessions and runs from the headers."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.cohort.pseudonyms import pseudonym
from data_pipeline.cohort.scan import safe_name
from data_pipeline.prepare.steps.dicom import Series, age_of, convert
from data_pipeline.volume.errors import BadScan
from infra.errors import UserError
from infra.files import atomic_write, read_bytes, read_text, sha256_of, write_json
from infra.processes.allowance import usable_cores
from infra.processes.scratch import scratch_folder
from infra.progress import Progress

SEXES = ("F", "M", "O")


@dataclass(frozen=True)
class Place:
    """Where a series goes: participant (without ``sub-``), session, and run (empty if there is only one); or why nowhere."""

    series: Series
    participant: str
    session: str
    run: str
    reason: str

    @property
    def stem(self) -> str:
        """The path of its scan in the BIDS folder, without ending."""
        name, run = f"sub-{self.participant}", f"_run-{self.run}" if self.run else ""
        return f"{name}/ses-{self.session}/anat/{name}_ses-{self.session}{run}_T1w"


def write_dicom_cohort(
    series: Sequence[Series], root: Path, folder: Path, listing: Path, *, dataset: str, key: bytes | None = None
) -> None:
    """Convert the T1-weighted series of a folder to a BIDS folder; what was converted before is kept.

    Args:
        series: see ``find_series``.
        root: the folder of the DICOM files.
        folder: the BIDS folder to write.
        listing: a table to write: every series, and why it was left out.
        dataset: name of the data set, for pseudonyms.
        key: replaces participants' ids by keyed hashes; None to keep them.

    Raises:
        UserError: no series is a T1-weighted 3D scan, two patients' ids become one participant, or a library is missing.
    """
    places = place_series(series, root, dataset, key)
    with (
        ThreadPoolExecutor(usable_cores()) as pool,
        Progress(len(places), "series", "converting") as shown,
    ):
        done = []
        for place in pool.map(lambda place: _convert(place, folder), places):
            done.append(place)
            shown.advance()
    _write_listing(done, listing)
    taken = [place for place in done if not place.reason]
    if not taken:
        raise UserError(
            f"{root} has no T1-weighted 3D scan among {len(series)} DICOM series; the reasons are in {listing}"
        )
    rows = {}
    for place in taken:
        age, sex = age_of(place.series.header), str(place.series.header.get("PatientSex", ""))
        rows[place.participant, place.session] = [
            f"sub-{place.participant}", f"ses-{place.session}", "n/a" if age is None else f"{age:g}",
            sex if sex in SEXES else "n/a",
        ]  # fmt: skip
    with atomic_write(folder / "participants.tsv", "w") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerows([["participant_id", "session_id", "age", "sex"], *(row for _, row in sorted(rows.items()))])


def place_series(series: Sequence[Series], root: Path, dataset: str, key: bytes | None = None) -> list[Place]:
    """Return the place of each series. Sessions are a participant's studies in order of date, runs the scans of a session.

    A header without a patient's id takes the name of the folder below ``root``.

    Raises UserError if two patients' ids become one participant.
    """
    studies: dict[str, list[str]] = defaultdict(list)
    named = []
    identities: dict[str, str] = {}
    for one in series:
        folders = one.files[0].relative_to(root).parts[:-1]
        identity = str(one.header.get("PatientID") or (folders[0] if folders else root.name)).strip()
        name = pseudonym(key, dataset, identity) if key is not None else safe_name(identity)
        study = str(one.header.get("StudyInstanceUID") or one.files[0].parent)
        named.append((one, name, study))
        other = identity if one.reason else identities.setdefault(name, identity)
        if other != identity:
            raise UserError(
                f"DICOM folder {root}: the patients {other!r} and {identity!r} both become sub-{name}, where letters other "
                "than A-Z, 0-9, _ and - are replaced; change the PatientID of one of them, or use --pseudonymise KEYFILE"
            )
        if not one.reason and study not in studies[name]:
            studies[name].append(study)
    count: dict[tuple[str, str], int] = defaultdict(int)
    for one, name, study in named:
        count[name, study] += not one.reason
    numbers: dict[tuple[str, str], int] = defaultdict(int)
    places = []
    for one, name, study in named:
        numbers[name, study] += not one.reason
        session = str(studies[name].index(study) + 1) if study in studies[name] else ""
        run = str(numbers[name, study]) if count[name, study] > 1 and not one.reason else ""
        places.append(Place(one, name, session, run, one.reason))
    return places


def _convert(place: Place, folder: Path) -> Place:
    """Convert a series to its place unless it is there from the same files; return the place, with the reason of a failure."""
    if place.reason:
        return place
    image, record = (folder / f"{place.stem}{ending}" for ending in (".nii.gz", ".json"))
    mark = hashlib.sha256("".join(sha256_of(path) for path in place.series.files).encode()).hexdigest()
    try:
        if json.loads(read_text(record))["Series"] == mark and image.is_file():
            return place
    except (OSError, ValueError, KeyError):
        pass
    try:
        with scratch_folder("dicom") as temporary:
            content = read_bytes(convert(place.series, temporary))
    except BadScan as error:
        return Place(place.series, place.participant, place.session, place.run, str(error))
    with atomic_write(image) as stream:
        stream.write(gzip.compress(content, compresslevel=1, mtime=0))
    write_json(record, {"Series": mark, "SeriesDescription": place.series.description})
    return place


def _write_listing(places: Sequence[Place], path: Path) -> None:
    with atomic_write(path, "w") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerow(["participant_id", "session_id", "series", "description", "files", "taken", "reason"])
        for place in places:
            header = place.series.header
            writer.writerow([
                f"sub-{place.participant}", f"ses-{place.session}" if place.session else "n/a",
                header.get("SeriesNumber", "n/a"), " ".join(place.series.description.split()) or "n/a",
                len(place.series.files), "no" if place.reason else Path(place.stem).name, place.reason or "n/a",
            ])  # fmt: skip
