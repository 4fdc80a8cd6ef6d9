"""Drawing of a view's parameters: keyed, uniform, as often as configured; and a recipe's settings."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from data_pipeline.loading.augment import (
    AUGMENTATIONS,
    PRESETS,
    Augmentation,
    View,
    check_numbers,
    draw_view,
    load_augmentation,
)
from data_pipeline.loading.augmentations.warp import warp_matrix
from infra.errors import UserError

SHAPE = (14, 16, 12)


def draw(settings: Augmentation, scan: int = 0, *, seed: int = 0, epoch: int = 0, view: int = 0) -> View:
    return draw_view(settings, SHAPE, seed=seed, epoch=epoch, scan=scan, view=view)


def matrix_of(view: View) -> np.ndarray:
    return warp_matrix(SHAPE, view["crop"], view["affine"], view["flip"])


def many_views(settings: Augmentation) -> list[View]:
    return [draw(settings, scan, view=view) for scan in range(1000) for view in range(2)]


# Noted before gamma and bias field were added.
MATRIX_BEFORE_GAMMA = [
    [-1.0289863, -0.0724739, 0.0391346, 15.0986099],
    [-0.0668658, 1.0214277, 0.1334583, -0.9038237],
    [0.0480931, -0.1304978, 1.0228657, 0.8456799],
]


def test_newer_operators_leave_older_draws_unchanged():
    """A run that was started before an operator existed continues with the same views."""
    for preset in ("default", "t1w"):
        view = draw(PRESETS[preset], 7, seed=3, epoch=1, view=1)
        np.testing.assert_allclose(matrix_of(view), MATRIX_BEFORE_GAMMA, rtol=1e-5, atol=1e-6)
        assert view["noise"] is None
        assert view["cutout"] is None
        assert view["blur"] == pytest.approx(0.6228776)
    view = draw(load_augmentation({"preset": "none", "noise": {"p": 1.0}}), 7, seed=3, epoch=1, view=1)
    assert view["noise"].corner == (21, 32, 16)
    assert view["noise"].sign == -1.0


def test_a_view_depends_only_on_seed_epoch_scan_and_view():
    settings = PRESETS["paper-all"]
    keys = [
        dict(zip(("seed", "epoch", "scan", "view"), key, strict=True)) for key in itertools.product([0, 1], repeat=4)
    ]
    first = [draw(settings, **key) for key in keys]
    again = [draw(settings, **key) for key in reversed(keys)][::-1]
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(matrix_of(a), matrix_of(b))
        assert (a["blur"], a["noise"]) == (b["blur"], b["noise"])
    always = load_augmentation({"preset": "none", "noise": {"p": 1.0}})
    assert len({draw(always, **key)["noise"].corner for key in keys}) == len(keys)


def test_operators_are_applied_as_often_as_configured():
    views = many_views(PRESETS["paper-all"])
    for name in ("flip", "blur", "noise", "cutout", "crop"):
        share = np.mean([view[name] is not None for view in views])
        assert share == pytest.approx(0.5, abs=0.06), name  # five standard deviations


def test_preset_paper_all_draws_what_the_paper_says():
    views = many_views(PRESETS["paper-all"])
    blurs = [view["blur"] for view in views if view["blur"] is not None]
    noises = [view["noise"].sigma for view in views if view["noise"] is not None]
    for sigmas in (blurs, noises):  # uniform in 0.1 to 1, in voxels and in units of the z-score
        assert 0.1 <= min(sigmas) < 0.11
        assert 0.99 < max(sigmas) <= 1.0
        assert np.mean(sigmas) == pytest.approx(0.55, abs=0.04)
    for box in (view["cutout"] for view in views if view["cutout"] is not None):
        assert box.side == 0.25  # a quarter of each side
        assert (box.corner >= 0).all()
        assert (box.corner + box.side <= 1).all()
    for matrix in map(matrix_of, views):
        # A crop of three quarters of each side, or none; a flip of left and right; no rotation and no shift of its own.
        sides = np.diag(matrix[:, :3])
        assert np.array_equal(matrix[:, :3], np.diag(sides))
        assert set(np.abs(sides)) in ({0.75}, {1.0})
        assert (sides[1:] > 0).all()
        ends = np.sort([matrix[:, 3], matrix[:, 3] + sides * np.array(SHAPE)], axis=0)
        assert (ends[0] > -1e-4).all()
        assert (ends[1] < np.array(SHAPE) + 1e-4).all()


def test_preset_paper_cutout_cuts_out_a_box_of_every_view_and_does_nothing_else():
    assert list(PRESETS["paper-cutout"].operators) == ["cutout"]
    for scan in range(100):
        view = draw(PRESETS["paper-cutout"], scan)
        assert view["cutout"].side == 0.25
        assert [name for name, drawn in view.parameters.items() if drawn is not None] == ["cutout"]


def test_changing_one_probability_leaves_the_other_draws_unchanged():
    for scan in range(20):
        first = draw(PRESETS["paper-all"], scan)
        second = draw(load_augmentation({"preset": "paper-all", "cutout": {"p": 0.0}}), scan)
        assert np.array_equal(matrix_of(first), matrix_of(second))
        assert (first["blur"], first["noise"]) == (second["blur"], second["noise"])


def test_operators_never_share_a_random_number():
    check_numbers(AUGMENTATIONS)
    with pytest.raises(ValueError, match="blur and again both draw number 0; give the newer one numbers from 39 on"):
        check_numbers({**AUGMENTATIONS, "again": AUGMENTATIONS["blur"]})


def test_a_recipe_changes_single_keys_of_a_preset():
    changed = load_augmentation({"preset": "default", "blur": {"p": 0.2, "sigma": [0.1, 0.8]}})
    assert (changed["blur"].p, changed["blur"].sigma) == (0.2, (0.1, 0.8))
    assert changed["noise"] == PRESETS["default"]["noise"]
    assert load_augmentation("default") == PRESETS["default"] != changed


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ("papr-all", r"augmentation.preset='papr-all' is not known \(did you mean 'paper-all'\?\)"),
        ({"preset": "none", "blurr": {}}, r"augmentation.blurr is not an operator \(did you mean 'blur'\?\)"),
        ({"blur": {"sigm": 1}}, r"augmentation.blur.sigm is not known \(did you mean 'sigma'\?\)"),
        ({"blur": 0.5}, "augmentation.blur=0.5 must hold keys"),
        ({"flip": {"p": 2}}, r"augmentation.flip.p: .*less than or equal to 1, found 2"),
    ],
)
def test_an_invalid_setting_is_named(section, text):
    with pytest.raises(UserError, match=text):
        load_augmentation(section)
