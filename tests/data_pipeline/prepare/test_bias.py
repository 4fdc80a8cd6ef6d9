"""The bias field of simulated heads whose true intensities are known."""

from __future__ import annotations

from dataclasses import replace

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from data_pipeline.prepare.align import without_bias
from data_pipeline.prepare.settings import Bias
from data_pipeline.simulation.atlas import SmoothField
from data_pipeline.simulation.people import draw_people
from data_pipeline.simulation.settings import Simulation
from data_pipeline.simulation.volumes import make_volume
from tests.data_pipeline.prepare.dressed import BELOW, BRAIN, MARGIN, with_skull_and_neck

SPACING = 2.0
STRENGTH = 0.15  # standard deviation of the logarithm of the field
FOREGROUND = 0.1  # of the brightest voxels: above it is no air
TISSUE = 0.45  # of white matter: above it is no fluid
RIM = 8.0  # mm of the brain's depth that hold its cortex


@pytest.mark.parametrize("age", [8.0, 80.0])
def test_little_of_a_bias_field_is_left_and_the_cortex_is_not_brightened(age: float) -> None:
    settings = Simulation(participants=1, spacing=SPACING, modality="t1w", seed=2, site_effects=0.0)
    person = replace(draw_people(1, {}, 2)[0], age=age)
    extracted, grid = make_volume(settings, person, session=1, age=age, modality="t1w")
    image = with_skull_and_neck(nibabel.Nifti1Image(extracted, np.array(grid.affine)), 0)
    head = np.asarray(image.dataobj, np.float32)
    margin, below = round(MARGIN / SPACING), round(BELOW / SPACING)
    around = ((margin, margin), (margin, margin), (below, margin))
    brain = np.pad(ndimage.binary_fill_holes(extracted > BRAIN * np.percentile(extracted, 97.5)), around)
    smooth = SmoothField(grid, 60.0)
    log_field = STRENGTH * np.pad(smooth.evaluate(smooth.draw(np.random.default_rng(3))), around, mode="edge")

    bias, biased = Bias(), (head * np.exp(log_field)).astype(np.float32)
    found = without_bias(
        biased, image.affine, head > FOREGROUND * np.percentile(head, 98), bias, spacing=bias.head_spacing,
        iterations=bias.head_iterations,
    )  # fmt: skip
    found = without_bias(found, image.affine, brain, bias, alone=True)

    tissue = brain & (head > TISSUE * np.percentile(head[brain], 97.5))
    left = np.log(np.maximum(found, 1.0) / np.maximum(head, 1.0))
    left -= np.median(left[tissue])
    assert left[tissue].std() < 0.35 * log_field[tissue].std()
    depth = ndimage.distance_transform_edt(brain) * SPACING
    assert abs(np.median(left[tissue & (depth < RIM)])) < 0.035  # fluid around the cortex is no dark part of the field
