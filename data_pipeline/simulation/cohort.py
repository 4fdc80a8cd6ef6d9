"""Write a simulated cohort: a BIDS folder of grey-matter and T1-like NIfTI volumes, and the hidden causes in truth.tsv."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from data_pipeline.simulation.atlas import REGIONS, load_template
from data_pipeline.simulation.people import MEAN_TIV, Person, change_with_age, draw_people
from data_pipeline.simulation.settings import SHARES, Simulation
from data_pipeline.simulation.visits import Visit, send_travelling, visits_of
from data_pipeline.simulation.volumes import VENTRICLE_ML, make_volume, true_grey_matter
from data_pipeline.volume.grid import Grid
from infra import random_streams
from infra.errors import NUMBER, OPTIONAL_WHOLE, PATH, WHOLE, Kind, UserError, check_arguments
from infra.files import atomic_write, read_text, write_json
from infra.processes.allowance import usable_cores
from infra.processes.pool import map_in_processes
from infra.progress import Progress

RECORD = "simulation.json"
PARTICIPANTS = "participants.tsv"  # written last: a folder that has it holds the whole cohort


def simulate_cohort(
    out: str | Path,
    *,
    participants: int = 1200,
    spacing: float = 6.0,
    modality: str = "vbm",
    seed: int = 0,
    effect: float = 1.0,
    acceleration: float = 1.0,
    heterogeneity: float = 0.0,
    site_effects: float = 1.0,
    sites: int = 12,
    misregistration: float = 0.0,
    individuality: float = 1.0,
    subtypes: int = 1,
    travelling: int = 0,
    scanners: int = 8,
    repeats: int = 2,
    shares: Mapping[str, float] | None = None,
    workers: int | None = None,
) -> Path:
    """Write a simulated cohort as a BIDS folder.

    The same arguments give the same bytes, whatever ``workers`` is. A killed simulation continues when the call is
    repeated; a complete cohort is left unchanged.

    Args:
        out: the folder to write.
        participants: number of participants; about 15 % of them have two or three sessions.
        spacing: edge of a voxel in mm, 1 to 12.
        modality: ``vbm`` (modulated grey-matter maps), ``t1w`` (T1-like images) or ``both``.
        seed: another seed gives other participants and other sites.
        effect: scale of every disease's effect; 0 makes patients healthy.
        acceleration: 0: disease is a pattern of regions; 2: accelerated ageing; 1: half of each.
        heterogeneity: 0: a disease is the same in every patient; 1: each patient has their own foci. The mean over
            patients does not change.
        site_effects: scale of the sites' gain, bias field and noise.
        sites: number of sites.
        misregistration: mm by which registration misses, in each direction (standard deviation), another error for every scan.
        individuality: scale of the pattern of folds that is a participant's own.
        subtypes: number of subtypes of each disease, with different weights of the regions; the mean over them is the disease.
        travelling: so many healthy participants are scanned on several scanners at one age, instead of at their site. Their
            true grey matter is then the same in all their scans; truth.tsv has it as ``grey_matter_ml``.
        scanners: the scanners on which travelling participants are scanned: those of the first so many sites.
        repeats: scans of a travelling participant on each scanner.
        shares: the share of each patient group (AD, MCI, SCZ, BD) among the participants; the others are healthy.
            Default ``SHARES``; ``{}`` for none.
        workers: processes; default: every core.

    Returns:
        The folder as a path.

    Raises:
        UserError: a setting is outside its limits, or the folder holds another cohort or other files.
    """
    check_arguments(PATH, out=out)
    check_arguments(WHOLE, participants=participants, seed=seed, sites=sites, subtypes=subtypes, travelling=travelling,
                    scanners=scanners, repeats=repeats)  # fmt: skip
    check_arguments(NUMBER, spacing=spacing, effect=effect, acceleration=acceleration, heterogeneity=heterogeneity,
                    site_effects=site_effects, misregistration=misregistration, individuality=individuality)  # fmt: skip
    check_arguments(OPTIONAL_WHOLE, workers=workers)
    check_arguments(Kind((Mapping, type(None)), "a mapping of groups to shares, or None"), shares=shares)
    if workers is not None and workers < 1:
        raise UserError(f"workers={workers} must be at least 1")
    settings = Simulation(
        participants=participants, spacing=spacing, modality=modality, seed=seed, effect=effect,
        acceleration=acceleration, heterogeneity=heterogeneity, site_effects=site_effects, sites=sites,
        misregistration=misregistration, individuality=individuality, subtypes=subtypes,
        travelling=travelling, scanners=scanners, repeats=repeats,
        shares=tuple((SHARES if shares is None else shares).items()),
    )  # fmt: skip
    settings.check()
    folder = Path(out)
    people = draw_people(
        settings.participants, dict(settings.shares), settings.seed, sites=settings.sites, subtypes=settings.subtypes
    )
    people = send_travelling(people, settings)
    _claim(folder, settings)
    if is_complete(folder):
        return folder
    load_template(Grid.vbm(settings.spacing))  # made once here; the workers read it from the cache
    truths = _write_people(folder, settings, people, workers or usable_cores())
    _write_tables(folder, people, truths)
    return folder


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a whole simulated cohort (or any other data set with participants.tsv)."""
    return (folder / PARTICIPANTS).is_file()


def _write_people(
    folder: Path, settings: Simulation, people: list[Person], processes: int
) -> list[list[dict[str, Any]]]:
    """Write the volumes of all participants; return each participant's rows of truth.tsv."""
    tasks = [(str(folder), settings, person) for person in people]
    truths: list[list[dict[str, Any]]] = []
    with Progress(len(people), "participants", "simulating") as progress:
        for rows in map(write_person, tasks) if processes == 1 else map_in_processes(write_person, tasks, processes):
            truths.append(rows)
            progress.advance()
    return truths


def write_person(task: tuple[str, Simulation, Person]) -> list[dict[str, Any]]:
    """Write the missing volumes of one participant (folder, settings, participant); return the rows of truth.tsv."""
    with threadpool_limits(1):  # with more threads BLAS sums in another order
        return _write_person(*task)


def _write_person(root: str, settings: Simulation, person: Person) -> list[dict[str, Any]]:
    rows = []
    for visit in visits_of(person, settings):
        name = f"sub-{person.number:05d}"
        folder = Path(root) / name / f"ses-{visit.label}" / "anat"
        folder.mkdir(parents=True, exist_ok=True)
        stem, scanned = f"{name}_ses-{visit.label}", replace(person, site=visit.site)
        files = {"vbm": f"{stem}_space-MNI152_desc-mwp1_probseg.nii.gz", "t1w": f"{stem}_T1w.nii.gz"}
        for modality, file in files.items():
            if settings.modality in (modality, "both") and not (folder / file).is_file():
                volume, grid = make_volume(settings, scanned, session=visit.number, age=visit.age, modality=modality)
                _write_nifti(folder / file, volume, grid)
        rows.append(_truth(settings, person, visit))
    return rows


def _truth(settings: Simulation, person: Person, visit: Visit) -> dict[str, Any]:
    """Return the row of truth.tsv of one session: what is measured, and the hidden causes."""
    regions, whole, ventricle = change_with_age(person, visit.age, settings)
    size = float(np.exp(person.log_tiv))
    hippocampus = [regions[REGIONS.index(f"hippocampus_{side}")] for side in ("left", "right")]
    noise = random_streams.generator(settings.seed, random_streams.SIMULATED_TIV, (0, 0, person.number, visit.number))
    row = {
        "participant_id": f"sub-{person.number:05d}", "session_id": f"ses-{visit.label}", "age": round(visit.age, 1),
        "tiv": round(MEAN_TIV * size * (1.0 + 0.02 * float(noise.standard_normal())), 1), "true_tiv": MEAN_TIV * size,
        "gap": person.gap, "severity": person.severity, "general": whole,
        "ventricle_ml": VENTRICLE_ML * float(np.exp(ventricle)) * size,
        "hippocampus": float(np.exp(whole + np.mean(hippocampus)) * size),
    }  # fmt: skip
    if settings.travelling:  # other cohorts keep their files as they are
        row |= {"site": site_name(visit.site), "grey_matter_ml": true_grey_matter(settings, person, age=visit.age)}
    return row


def _write_nifti(path: Path, volume: NDArray[np.float32], grid: Grid) -> None:
    image = nibabel.Nifti1Image(volume, np.array(grid.affine))
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = b"simulated by yaware"
    with atomic_write(path) as stream:
        stream.write(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def _write_tables(folder: Path, people: list[Person], truths: list[list[dict[str, Any]]]) -> None:
    """Write truth.tsv and the sessions tables first, participants.tsv last: it marks the cohort as complete."""
    _write_tsv(folder / "truth.tsv", [row for rows in truths for row in rows])
    participants = []
    for person, rows in zip(people, truths, strict=True):
        name = f"sub-{person.number:05d}"
        if len(rows) > 1:
            keys = ("session_id", "age", "tiv", *(("site",) if person.travels else ()))
            _write_tsv(folder / name / f"{name}_sessions.tsv", [{key: row[key] for key in keys} for row in rows])
        participants.append(
            {"participant_id": name, "age": person.age, "sex": person.sex, "site": site_name(person.site),
             "diagnosis": person.diagnosis, "tiv": rows[0]["tiv"]}
        )  # fmt: skip
    _write_tsv(folder / PARTICIPANTS, participants)


def site_name(site: int) -> str:
    """Name of a site in the tables."""
    return f"site{site:02d}"


def _write_tsv(path: Path, rows: list[dict[str, Any]]) -> None:
    with atomic_write(path, "w") as stream:
        stream.write("\t".join(rows[0]) + "\n")
        stream.writelines(
            "\t".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in row.values()) + "\n" for row in rows
        )


def _claim(folder: Path, settings: Simulation) -> None:
    """Record the settings in the folder; raises UserError if it holds another cohort or other files."""
    path, record = folder / RECORD, settings.to_dict()
    if path.exists():
        # A record from before a setting existed means that setting's default.
        defaults = {**asdict(Simulation()), **Simulation().to_dict()}
        old, record = ({**defaults, **found} for found in (json.loads(read_text(path)), record))
        changed = [key for key in record if old[key] != record[key]]
        if changed:
            key = changed[0]
            raise UserError(
                f"{folder} holds another simulation ({key} was {old[key]!r}, now {record[key]!r}); "
                "choose another folder, or remove that one"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and not a simulated cohort; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    description = {"Name": "Simulated brains (yaware)", "BIDSVersion": "1.9.0", "DatasetType": "raw", "Simulated": True}
    write_json(folder / "dataset_description.json", description)
    write_json(path, record)
