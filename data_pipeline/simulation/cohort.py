"""A simulated cohort on disk: a BIDS folder of grey-matter and T1-like NIfTI volumes, with the truth beside it.

Every volume is a pure function of (settings, seed, participant, session): any worker may make any of them.
"""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from scipy import ndimage

from data_pipeline.simulation.atlas import REGIONS, SmoothField, Template, load_template
from data_pipeline.simulation.people import MEAN_TIV, Person, draw_people, log_change, site_of
from data_pipeline.volume.load import Grid
from infra.errors import UserError
from infra.files import atomic_write, write_json
from infra.progress import Progress
from infra.random_streams import SIMULATED_TIV, SIMULATED_VOLUME, generator

Array = np.ndarray[Any, np.dtype[np.float32]]
SHARES = {"AD": 0.085, "MCI": 0.05, "SCZ": 0.1, "BD": 0.06}
GREY_MATTER_ML = 790.0  # of a mean head at 20
STEEPEST = 0.4  # bound on the norm of the deformation's gradient: its Jacobian stays above (1 - 0.4)³ = 0.21
VENTRICLE_ML, VENTRICLE_REACH = 14.0, 12.0  # of a mean head at 20; mm over which their growth fades out


@dataclass(frozen=True)
class Simulation:
    """What a cohort is made from; recorded in simulation.json."""

    participants: int = 1200
    spacing: float = 6.0
    modality: str = "vbm"
    seed: int = 0
    effect: float = 1.0
    acceleration: float = 1.0
    heterogeneity: float = 0.0
    site_effects: float = 1.0
    shares: tuple[tuple[str, float], ...] = tuple(SHARES.items())


def simulate_cohort(out: str | Path, settings: Simulation, workers: int | None = None) -> Path:
    """Write the cohort to ``out``. A folder that holds part of the same cohort is completed, another is refused."""
    folder = Path(out)
    _check(settings)
    record = {**asdict(settings), "shares": dict(settings.shares)}
    claim(folder, record)
    people = draw_people(settings.participants, dict(settings.shares), settings.seed)
    load_template(Grid.vbm(settings.spacing))  # made once here, read from the cache by the workers
    tasks = [(str(folder), settings, person) for person in people]
    rows: list[list[dict[str, Any]]] = []
    if workers is not None and workers < 1:
        raise UserError(f"--workers={workers} must be at least 1")
    count = workers or len(os.sched_getaffinity(0))
    with Progress(len(people), "participants", "simulating") as progress:
        if count == 1:
            for task in tasks:
                with _one_thread():  # as in the workers: BLAS sums in another order with more threads
                    rows.append(write_person(task))
                progress.advance()
        else:
            with multiprocessing.get_context("spawn").Pool(count, initializer=_one_thread) as pool:
                for row in pool.imap(write_person, tasks, chunksize=8):
                    rows.append(row)
                    progress.advance()
    _write_tables(folder, people, rows)
    return folder


def write_person(task: tuple[str, Simulation, Person]) -> list[dict[str, Any]]:
    """Write every volume of one participant that is not there yet; their rows of truth.tsv."""
    root, settings, person = task
    rows = []
    for session, years in enumerate((0.0, *person.later), start=1):
        name = f"sub-{person.number:05d}"
        folder = Path(root) / name / f"ses-{session}" / "anat"
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{name}_ses-{session}"
        wanted = {"vbm": f"{stem}_space-MNI152_desc-mwp1_probseg.nii.gz", "t1w": f"{stem}_T1w.nii.gz"}
        for modality, file in wanted.items():
            if settings.modality in (modality, "both") and not (folder / file).is_file():
                volume, grid = make_volume(settings, person, session, person.age + years, modality)
                _write_nifti(folder / file, volume, grid)
        rows.append(_truth(settings, person, session, person.age + years))
    return rows


def make_volume(settings: Simulation, person: Person, session: int, age: float, modality: str) -> tuple[Array, Grid]:
    """One scan (D, H, W) float32 and its grid: modulated grey matter (1 = a voxel full of it) or a T1-like image."""
    world = _world(settings.spacing)
    draws = generator(settings.seed, SIMULATED_VOLUME, (0, 0, person.number, session))
    lasting = generator(settings.seed, SIMULATED_VOLUME, (0, 0, person.number, 0))
    extra, general, ventricle = _log_change(settings, person, age)
    site = site_of(person.site, settings.seed, settings.site_effects)
    change = np.float32(general) + extra.astype(np.float32) @ world.template.regions
    change += np.float32(0.09) * world.at_brain(world.gyri, world.gyri.draw(lasting))
    control = world.deformation(lasting)
    make = _grey_matter if modality == "vbm" else _t1
    return make(world, change, control, ventricle, person, site, draws), world.template.grid


def _grey_matter(
    world: _World, change: Array, control: list[Array], ventricle: float, person: Person, site: dict[str, Any],
    generator: np.random.Generator,
) -> Array:  # fmt: skip
    """Modulated, normalised grey matter, as CAT12's mwp1: tissue per voxel of the template, times head size and gain."""
    template, mask = world.template, world.template.mask
    where = world.brain_index + np.stack([world.at_brain(world.coarse, part) for part in control]) / world.spacing
    grey = ndimage.map_coordinates(template.gm, where, order=1, mode="constant")
    # Normalisation leaves a rim of misplaced tissue where ventricles are larger than the template's.
    squeeze = world.near_ventricles * np.float32(-0.12 * ventricle)
    bias = np.float32(site["bias"]) * world.at_brain(world.bias, world.bias.draw(generator))
    noise = np.float32(site["noise"]) * world.at_brain(world.noise, world.noise.draw(generator))
    scale = np.float32(world.calibration * np.exp(person.log_tiv) * site["gain"])
    values = grey * np.exp(change + squeeze + bias) * scale + noise * grey
    out = np.zeros(template.grid.shape, dtype=np.float32)
    out[mask] = np.maximum(values, 0.0)
    return out


def _t1(
    world: _World, change: Array, control: list[Array], ventricle: float, person: Person, site: dict[str, Any],
    generator: np.random.Generator,
) -> Array:  # fmt: skip
    """A T1-like image: tissue mixture with the site's contrast, larger ventricles, bias field, blur, Rician noise."""
    template = world.template
    where = world.index + np.stack([world.coarse.evaluate(part) for part in control]) / world.spacing
    # Pull from nearer the ventricles: what lies beyond moves outward, and their volume grows.
    reach = template.ventricle_distance
    push = np.float32(world.ventricle_push(VENTRICLE_ML * np.exp(ventricle)) / world.spacing)
    # Never from deeper than 2 mm inside: the ventricles are narrow, and beyond their middle lies the other wall.
    moved = np.minimum(
        push * np.exp(-np.maximum(reach, 0) / np.float32(VENTRICLE_REACH)), np.maximum(reach + 2, 0) / world.spacing
    )
    where = where - world.outward * moved
    grey, white, fluid, residual = (
        ndimage.map_coordinates(values, where, order=1, mode="nearest")
        for values in (template.gm, template.wm, template.csf, template.residual)
    )
    full = np.zeros(template.grid.shape, dtype=np.float32)
    full[template.mask] = change - np.float32(world.mean_change)
    kept = grey * np.exp(np.clip(full, -0.6, 0.25))
    fluid = fluid + np.maximum(grey - kept, 0.0)
    contrast = np.float32(0.35 * site["contrast"])
    image = 0.62 * kept + (0.62 + contrast) * white + 0.25 * fluid + contrast * 0.6 * residual * (grey + white)
    image *= np.exp(np.float32(site["t1_bias"]) * world.bias.evaluate(world.bias.draw(generator)))
    image = ndimage.gaussian_filter(image, site["blur"] / world.spacing)
    real, imaginary = (
        np.float32(site["noise"]) * generator.standard_normal(image.shape, dtype=np.float32) for _ in range(2)
    )
    out: Array = np.hypot(image + real, imaginary).astype(np.float32) * np.float32(700.0 * site["gain"])
    return out


class _World:
    """A grid's template and fields, made once in each process."""

    def __init__(self, spacing: float) -> None:
        self.template: Template = load_template(Grid.vbm(spacing))
        grid = self.template.grid
        self.spacing = np.float32(spacing)
        self.coarse, self.gyri = SmoothField(grid, 30.0), SmoothField(grid, 9.0)
        self.bias, self.noise = SmoothField(grid, 60.0), SmoothField(grid, 5.0)
        self.lattice = SmoothField(Grid.vbm(10.0), 30.0)  # fine enough for a field of 30 mm to show its slopes
        mask = self.template.mask
        d, h, w = (slice(int(edge.min()), int(edge.max()) + 1) for edge in np.nonzero(mask))
        self.box, self.mask_in_box = (d, h, w), mask[d, h, w]
        self.brain_index = np.stack(np.nonzero(mask)).astype(np.float32)
        self.near_ventricles = np.exp(-np.maximum(self.template.ventricle_distance[mask], 0) / np.float32(6.0))
        # Mean log change of an adult of 20, which the template's own amount of grey matter is to stand for.
        self.mean_change = 0.16 / (1.0 + np.exp((20.0 - 16.0) / 5.0))
        total = float(self.template.gm[self.template.mask].sum()) * self.template.voxel_ml
        self.calibration = GREY_MATTER_ML / total / np.exp(self.mean_change)

    @cached_property
    def index(self) -> Array:
        """(3, D, H, W) voxel numbers."""
        shape = self.template.grid.shape
        index: Array = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float32) for n in shape), indexing="ij"))
        return index

    @cached_property
    def outward(self) -> Array:
        """(3, D, H, W) unit vectors away from the ventricles."""
        gradient = np.stack(list(np.gradient(self.template.ventricle_distance)))
        lengths = np.maximum(np.linalg.norm(gradient, axis=0), 1e-3)
        return np.asarray(gradient / lengths, dtype=np.float32)

    def at_brain(self, field: SmoothField, control: Array) -> Array:
        """A field's values at the M voxels of the mask; only the box around them is worked out."""
        values: Array = field.evaluate(control, self.box)[self.mask_in_box]
        return values

    def deformation(self, generator: np.random.Generator) -> list[Array]:
        """Control points of a displacement (x, y, z) in mm, about 1.2 mm each, that never folds."""
        control = [np.float32(1.2) * self.coarse.draw(generator) for _ in range(3)]
        gradient = np.stack([np.stack(list(np.gradient(self.lattice.evaluate(part), 10.0))) for part in control])
        steepest = float(np.sqrt((gradient**2).sum(axis=(0, 1)).max()))
        return [part * np.float32(min(1.0, STEEPEST / steepest)) for part in control]

    def ventricle_push(self, ml: float) -> float:
        """Millimetres by which the ventricles' wall moves outward for a volume of ``ml``."""
        volumes, pushes = _ventricle_table()
        return float(np.interp(ml, volumes, pushes))


@lru_cache(maxsize=2)
def _world(spacing: float) -> _World:
    return _World(spacing)


@lru_cache(maxsize=1)
def _ventricle_table() -> tuple[Any, Any]:
    """Ventricle volume (ml) over the push of their wall (mm), measured once on a 2 mm grid whatever the output grid is."""
    reach = load_template(Grid.vbm(2.0)).ventricle_distance
    pushes = np.linspace(0.0, 9.0, 19)
    # A voxel becomes ventricle where the point it is pulled from is: reach - push exp(-reach / 12) <= 0.
    inside = [float((reach <= push * np.exp(-np.maximum(reach, 0) / VENTRICLE_REACH)).sum()) * 0.008 for push in pushes]
    return np.array(inside) * VENTRICLE_ML / inside[0], pushes


def _log_change(settings: Simulation, person: Person, age: float) -> tuple[Any, float, float]:
    return log_change(person, age, settings.effect, settings.acceleration, settings.heterogeneity)


def _truth(settings: Simulation, person: Person, session: int, age: float) -> dict[str, Any]:
    extra, general, ventricle = _log_change(settings, person, age)
    size = float(np.exp(person.log_tiv))
    hippocampus = [extra[REGIONS.index(f"hippocampus_{side}")] for side in ("left", "right")]
    noise = generator(settings.seed, SIMULATED_TIV, (0, 0, person.number, session))
    return {
        "participant_id": f"sub-{person.number:05d}", "session_id": f"ses-{session}", "age": round(age, 1),
        "tiv": round(MEAN_TIV * size * (1.0 + 0.02 * float(noise.standard_normal())), 1), "true_tiv": MEAN_TIV * size,
        "gap": person.gap, "severity": person.severity, "general": general,
        "ventricle_ml": VENTRICLE_ML * float(np.exp(ventricle)) * size,
        "hippocampus": float(np.exp(general + np.mean(hippocampus)) * size),
    }  # fmt: skip


def _write_nifti(path: Path, volume: Array, grid: Grid) -> None:
    image = nibabel.Nifti1Image(volume, np.array(grid.affine))
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = b"simulated by yaware"
    with atomic_write(path) as stream:
        stream.write(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def _write_tables(folder: Path, people: list[Person], rows: list[list[dict[str, Any]]]) -> None:
    """truth.tsv and sessions tables first, participants.tsv last: with it the cohort is complete."""
    truths = [row for person in rows for row in person]
    _write_tsv(folder / "truth.tsv", truths)
    table = []
    for person, its in zip(people, rows, strict=True):
        name = f"sub-{person.number:05d}"
        if len(its) > 1:
            keys = ("session_id", "age", "tiv")
            _write_tsv(folder / name / f"{name}_sessions.tsv", [{key: row[key] for key in keys} for row in its])
        table.append(
            {"participant_id": name, "age": person.age, "sex": person.sex, "site": f"site{person.site:02d}",
             "diagnosis": person.diagnosis, "tiv": its[0]["tiv"]}
        )  # fmt: skip
    _write_tsv(folder / "participants.tsv", table)


def _write_tsv(path: Path, rows: list[dict[str, Any]]) -> None:
    with atomic_write(path, "w") as stream:
        stream.write("\t".join(rows[0]) + "\n")
        stream.writelines(
            "\t".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in row.values()) + "\n" for row in rows
        )


def claim(folder: Path, record: dict[str, Any]) -> None:
    """Refuse a folder that holds something else; mark it as this simulation's."""
    path = folder / "simulation.json"
    if path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))
        # A cohort made before a key was there was made as by the key's default.
        old = {**asdict(Simulation()), **old}
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


def _check(settings: Simulation) -> None:
    if settings.participants < 1:
        raise UserError(f"--participants={settings.participants} must be at least 1")
    if not 1.0 <= settings.spacing <= 12.0:
        raise UserError(f"--spacing={settings.spacing} is not in 1..12 mm; the paper's grid is 1.5")
    if settings.modality not in ("vbm", "t1w", "both"):
        raise UserError(f"--modality={settings.modality!r} is not known; allowed: vbm, t1w, both")
    if not 0.0 <= settings.acceleration <= 2.0 or settings.effect < 0:
        raise UserError(
            f"--effect={settings.effect} --acceleration={settings.acceleration}: effect must be 0 or more, "
            "acceleration in 0 (pattern only) .. 2 (accelerated ageing only)"
        )
    if not 0.0 <= settings.heterogeneity <= 1.0 or settings.site_effects < 0:
        raise UserError(
            f"--heterogeneity={settings.heterogeneity} --site-effects={settings.site_effects}: heterogeneity must be in "
            "0 (every patient alike) .. 1 (foci of each patient's own), site-effects 0 or more"
        )
    unknown = [name for name, _ in settings.shares if name not in SHARES]
    if unknown or any(share < 0 for _, share in settings.shares) or sum(share for _, share in settings.shares) > 1:
        shown = ",".join(f"{name}={share:g}" for name, share in settings.shares)
        raise UserError(f"--shares={shown}: shares of {', '.join(SHARES)} must be 0 or more and sum to 1 at most")


def _one_thread() -> Any:
    """Linear algebra on one thread, until the end of a ``with`` or of the process."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1)
