"""The anatomy of one brain: the asked amount of grey matter, a thinner cortex where some is lost, sharp borders."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.simulation.one_brain import one_person
from data_pipeline.simulation.volumes import anatomy_at


@pytest.mark.parametrize("spacing", [2.0, 3.0, 6.0])
@pytest.mark.parametrize("factor", [0.6, 0.8, 1.0, 1.1])
def test_one_person_has_the_asked_amount_of_grey_matter_in_every_part(factor, spacing):
    template = anatomy_at(spacing).template
    maps = template.gm, template.wm, template.csf
    amount = np.full_like(template.gm, factor)
    amount[: len(amount) // 2] = 1.0  # the other half of the brain does not change
    shares = one_person(*maps, template.gm * amount, spacing)
    assert sum(shares) == pytest.approx(sum(maps), abs=1e-5)
    assert min(share.min() for share in shares) > -1e-6
    left, right = (part.sum() for part in np.array_split(shares[0], [len(amount) // 2]))
    of_left, of_right = (part.sum() for part in np.array_split(template.gm, [len(amount) // 2]))
    assert left == pytest.approx(of_left, rel=0.05)
    assert right == pytest.approx(factor * of_right, rel=0.05)


def test_a_cortex_that_loses_tissue_gets_thinner_and_not_darker():
    template = anatomy_at(2.0).template
    maps = template.gm, template.wm, template.csf
    volumes, brightest = [], []
    for factor in (1.0, 0.7):
        grey = one_person(*maps, template.gm * np.float32(factor), 2.0)[0]
        volumes.append(grey.sum())
        brightest.append(np.percentile(grey[grey > 0.5], 75))
    assert volumes[1] < 0.75 * volumes[0]
    assert min(brightest) > 0.97


def test_one_brain_has_sharper_borders_than_the_mean_of_many():
    template = anatomy_at(2.0).template
    maps = template.gm, template.wm, template.csf
    grey = one_person(*maps, template.gm, 2.0)[0]
    mixed = [float(((share > 0.2) & (share < 0.8)).sum() / (share > 0.2).sum()) for share in (grey, template.gm)]
    assert mixed[0] < 0.6 * mixed[1]
