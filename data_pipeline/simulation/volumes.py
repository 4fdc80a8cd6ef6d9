"""Simulated volumes: the grey-matter map or the T1-like image of one participant in one session.

Each volume depends only on the settings, the participant and the session, so any worker process can make any volume.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from data_pipeline.simulation.atlas import SmoothField, Template, load_template
from data_pipeline.simulation.one_brain import one_person
from data_pipeline.simulation.people import Person, Site, change_with_age, site_of
from data_pipeline.simulation.settings import Simulation
from data_pipeline.volume.grid import Grid
from infra import random_streams

GREY_MATTER_ML = 790.0  # at age 20, for the mean head size
VENTRICLE_ML = 14.0  # at age 20, for the mean head size
VENTRICLE_REACH = 12.0  # mm over which the displacement around growing ventricles decays to 1/e
STEEPEST = 0.4  # bound on the norm of the deformation's gradient: its Jacobian stays above (1 - 0.4)³ = 0.21
DISPLACEMENT = 1.2  # mm, standard deviation of each component of the deformation
FOLDS = 0.09  # standard deviation of the individual pattern of folds, in log units of grey matter


def make_volume(
    settings: Simulation, person: Person, *, session: int, age: float, modality: str
) -> tuple[NDArray[np.float32], Grid]:
    """Simulate one scan.

    Args:
        settings: spacing, seed, disease and site effects.
        person: the participant.
        session: from 1; each session has its own noise and bias field.
        age: at the session, in years.
        modality: ``vbm`` (modulated grey matter; 1 is a voxel full of grey matter) or ``t1w`` (T1-like intensities).

    Returns:
        The volume, (D, H, W) float32 in RAS, and its grid.
    """
    anatomy = anatomy_at(settings.spacing)
    of_session, of_person = (
        random_streams.generator(settings.seed, random_streams.SIMULATED_VOLUME, (0, 0, person.number, number))
        for number in (session, 0)
    )
    regions, whole, ventricle = change_with_age(person, age, settings)
    site = site_of(person.site, settings.seed, settings.site_effects)
    change = np.float32(whole) + regions.astype(np.float32) @ anatomy.template.regions
    change += np.float32(FOLDS * settings.individuality) * anatomy.in_brain(anatomy.gyri, anatomy.gyri.draw(of_person))
    deformation = anatomy.draw_deformation(of_person)
    if modality == "vbm":
        volume = _grey_matter(
            anatomy, change, deformation, ventricle=ventricle, log_tiv=person.log_tiv, site=site, generator=of_session
        )
    else:
        volume = _t1(anatomy, change, deformation, ventricle=ventricle, site=site, generator=of_session)
    if settings.misregistration > 0:
        volume = anatomy.misregister(volume, settings, person.number, session)
    return volume, anatomy.template.grid


def true_grey_matter(settings: Simulation, person: Person, *, age: float) -> float:
    """Return the grey matter in ml that a scanner without gain, bias field and noise would show at an age."""
    perfect = replace(settings, site_effects=0.0, misregistration=0.0)
    volume, _ = make_volume(perfect, person, session=1, age=age, modality="vbm")
    return float(volume.sum(dtype=np.float64)) * anatomy_at(settings.spacing).template.voxel_ml


def _grey_matter(
    anatomy: Anatomy,
    change: NDArray[np.float32],
    deformation: list[NDArray[np.float32]],
    *,
    ventricle: float,
    log_tiv: float,
    site: Site,
    generator: np.random.Generator,
) -> NDArray[np.float32]:
    """Modulated, normalised grey matter like CAT12's mwp1: tissue per voxel of the template, times head size and gain."""
    template, mask = anatomy.template, anatomy.template.mask
    displacement = np.stack([anatomy.in_brain(anatomy.coarse, control) for control in deformation])
    source = anatomy.brain_index + displacement / anatomy.spacing
    grey = ndimage.map_coordinates(template.gm, source, order=1, mode="constant")
    # Spatial normalisation leaves a rim of misplaced tissue around ventricles larger than the template's.
    squeeze = anatomy.near_ventricles * np.float32(-0.12 * ventricle)
    bias = np.float32(site.bias) * anatomy.in_brain(anatomy.bias, anatomy.bias.draw(generator))
    noise = np.float32(site.noise) * anatomy.in_brain(anatomy.noise, anatomy.noise.draw(generator))
    scale = np.float32(anatomy.calibration * np.exp(log_tiv) * site.gain)
    values = grey * np.exp(change + squeeze + bias) * scale + noise * grey
    volume = np.zeros(template.grid.shape, dtype=np.float32)
    volume[mask] = np.maximum(values, 0.0)
    return volume


def _t1(
    anatomy: Anatomy,
    change: NDArray[np.float32],
    deformation: list[NDArray[np.float32]],
    *,
    ventricle: float,
    site: Site,
    generator: np.random.Generator,
) -> NDArray[np.float32]:
    """A T1-like image: tissue mixture with the site's contrast, larger ventricles, bias field, blur, Rician noise."""
    template = anatomy.template
    source = anatomy.index + np.stack([anatomy.coarse.evaluate(control) for control in deformation]) / anatomy.spacing
    # Each voxel takes its intensity from a point nearer the ventricles: tissue moves outward, and the ventricles grow.
    distance = template.ventricle_distance
    push = np.float32(anatomy.ventricle_push(VENTRICLE_ML * np.exp(ventricle)) / anatomy.spacing)
    # At most 2 mm inside the ventricles: they are narrow, and the opposite wall is close.
    moved = np.minimum(
        push * np.exp(-np.maximum(distance, 0) / np.float32(VENTRICLE_REACH)),
        np.maximum(distance + 2, 0) / anatomy.spacing,
    )
    source = source - anatomy.outward * moved
    grey, white, fluid, residual = (
        ndimage.map_coordinates(values, source, order=1, mode="nearest")
        for values in (template.gm, template.wm, template.csf, template.residual)
    )
    whole_change = np.zeros(template.grid.shape, dtype=np.float32)
    whole_change[template.mask] = change - np.float32(anatomy.mean_change)
    asked = grey * np.exp(np.clip(whole_change, -0.6, 0.25))
    grey, white, fluid = one_person(grey, white, fluid, asked, float(anatomy.spacing))
    contrast = np.float32(0.35 * site.contrast)
    image = 0.62 * grey + (0.62 + contrast) * white + 0.25 * fluid + contrast * 0.6 * residual * (grey + white)
    image *= np.exp(np.float32(site.t1_bias) * anatomy.bias.evaluate(anatomy.bias.draw(generator)))
    image = ndimage.gaussian_filter(image, site.blur / anatomy.spacing)
    real, imaginary = (
        np.float32(site.noise) * generator.standard_normal(image.shape, dtype=np.float32) for _ in range(2)
    )
    volume: NDArray[np.float32] = np.hypot(image + real, imaginary).astype(np.float32) * np.float32(700.0 * site.gain)
    return volume


class Anatomy:
    """The template and the random fields on one grid; ``anatomy_at`` makes it once per process."""

    def __init__(self, spacing: float) -> None:
        self.template: Template = load_template(Grid.vbm(spacing))
        grid = self.template.grid
        self.spacing = np.float32(spacing)
        self.coarse, self.gyri = SmoothField(grid, 30.0), SmoothField(grid, 9.0)
        self.bias, self.noise = SmoothField(grid, 60.0), SmoothField(grid, 5.0)
        self.lattice = SmoothField(Grid.vbm(10.0), 30.0)  # fine enough to resolve the slopes of a 30 mm field
        mask = self.template.mask
        d, h, w = (slice(int(edge.min()), int(edge.max()) + 1) for edge in np.nonzero(mask))
        self.box, self.mask_in_box = (d, h, w), mask[d, h, w]
        self.brain_index = np.stack(np.nonzero(mask)).astype(np.float32)  # (3, M)
        self.near_ventricles = np.exp(-np.maximum(self.template.ventricle_distance[mask], 0) / np.float32(6.0))
        # The mean log change at age 20, the age whose amount of grey matter the template represents.
        self.mean_change = 0.16 / (1.0 + np.exp((20.0 - 16.0) / 5.0))
        total = float(self.template.gm[self.template.mask].sum()) * self.template.voxel_ml
        self.calibration = GREY_MATTER_ML / total / np.exp(self.mean_change)

    @cached_property
    def index(self) -> NDArray[np.float32]:
        """(3, D, H, W) indices of every voxel."""
        shape = self.template.grid.shape
        index: NDArray[np.float32] = np.stack(
            np.meshgrid(*(np.arange(n, dtype=np.float32) for n in shape), indexing="ij")
        )
        return index

    @cached_property
    def outward(self) -> NDArray[np.float32]:
        """(3, D, H, W) unit vectors away from the ventricles."""
        gradient = np.stack(list(np.gradient(self.template.ventricle_distance)))
        lengths = np.maximum(np.linalg.norm(gradient, axis=0), 1e-3)
        return np.asarray(gradient / lengths, dtype=np.float32)

    def in_brain(self, field: SmoothField, control: NDArray[np.float32]) -> NDArray[np.float32]:
        """(M,) values of a field at the voxels of the mask; only the mask's bounding box is evaluated."""
        values: NDArray[np.float32] = field.evaluate(control, self.box)[self.mask_in_box]
        return values

    def draw_deformation(self, generator: np.random.Generator) -> list[NDArray[np.float32]]:
        """Draw the control points of a displacement (x, y, z) in mm, about 1.2 mm each, that never folds."""
        control = [np.float32(DISPLACEMENT) * self.coarse.draw(generator) for _ in range(3)]
        return self._never_folding(control)

    def _never_folding(self, control: list[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """Scale the control points of a displacement (x, y, z) in mm down until its gradient nowhere exceeds STEEPEST."""
        gradient = np.stack([np.stack(list(np.gradient(self.lattice.evaluate(axis), 10.0))) for axis in control])
        steepest = float(np.sqrt((gradient**2).sum(axis=(0, 1)).max()))
        return [axis * np.float32(min(1.0, STEEPEST / steepest)) for axis in control]

    def misregister(
        self, volume: NDArray[np.float32], settings: Simulation, participant: int, session: int
    ) -> NDArray[np.float32]:
        """Return a volume (D, H, W) displaced by the error of its registration.

        The error is the sum of a shift of the whole brain and of a smooth displacement; each component of the sum has a
        standard deviation of ``settings.misregistration`` mm.
        """
        generator = random_streams.generator(
            settings.seed, random_streams.SIMULATED_MISREGISTRATION, (0, 0, participant, session)
        )
        size = np.float32(settings.misregistration / np.sqrt(2.0))
        shift = size * generator.standard_normal(3, dtype=np.float32)
        local = self._never_folding([size * self.coarse.draw(generator) for _ in range(3)])
        error = np.stack([self.coarse.evaluate(control) for control in local]) + shift[:, None, None, None]
        moved: NDArray[np.float32] = ndimage.map_coordinates(volume, self.index + error / self.spacing, order=1)
        return moved

    def ventricle_push(self, ml: float) -> float:
        """Return by how many mm the ventricles' wall moves outward for a ventricle volume of ``ml``."""
        volumes, pushes = _ventricle_table()
        return float(np.interp(ml, volumes, pushes))


@lru_cache(maxsize=2)
def anatomy_at(spacing: float) -> Anatomy:
    """The anatomy on the VBM box with voxels of ``spacing`` mm; cached."""
    return Anatomy(spacing)


@lru_cache(maxsize=1)
def _ventricle_table() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ventricle volumes (ml) and the displacements of their wall (mm) that produce them, measured on a 2 mm grid."""
    distance = load_template(Grid.vbm(2.0)).ventricle_distance
    pushes = np.linspace(0.0, 9.0, 19)
    # A voxel becomes ventricle if its source point is inside: distance - push exp(-distance / 12) <= 0.
    inside = [
        float((distance <= push * np.exp(-np.maximum(distance, 0) / VENTRICLE_REACH)).sum()) * 0.008 for push in pushes
    ]
    return np.array(inside) * VENTRICLE_ML / inside[0], pushes
