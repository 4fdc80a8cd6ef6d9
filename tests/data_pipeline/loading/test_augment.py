"""Drawing of parameters: keyed, uniform, identity at zero; and each DALI operator against its scipy twin."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import ndimage

from data_pipeline.loading.augment import (
    BANK_MARGIN,
    PRESETS,
    Affine,
    Augmentation,
    Bias,
    Blur,
    Crop,
    Cutout,
    Flip,
    Gamma,
    Noise,
    draw_view,
    load_augmentation,
    noise_bank,
    view_arrays,
)
from data_pipeline.loading.dali_graph import AugmentPipeline
from data_pipeline.volume.intensity import zscore
from infra.errors import UserError
from tests.cohorts import blob

SHAPE = (14, 16, 12)


def apply(settings: Augmentation, volume: np.ndarray, view, noise=None, device="cpu") -> np.ndarray:
    """One volume through the real graph, with the same parameters for both views."""

    def source(iteration):
        arrays = view_arrays(settings, view, noise)
        return [[volume.astype(np.float16)[..., None], *arrays, *arrays]]

    pipeline = AugmentPipeline(source, settings, shape=volume.shape, batch=1, device=device, threads=1, prefetch=1)
    views = pipeline.run()[:, 0, 0].cpu().numpy()
    pipeline.close()
    assert np.array_equal(views[0], views[1])
    return views[0]


@pytest.fixture(scope="module")
def volume():
    return blob(3, 40.0).astype(np.float16).astype(np.float32)


@pytest.fixture(scope="module")
def scored(volume):
    return zscore(volume)


def twin_warp(scored, matrix):
    """The same resampling by scipy, whose coordinates count from the first voxel's centre rather than its corner."""
    linear, offset = matrix[:, :3].astype(float), matrix[:, 3].astype(float)
    half = np.full(3, 0.5)
    return ndimage.affine_transform(scored, linear, linear @ half + offset - half, order=1, mode="nearest")


def test_no_augmentation_is_the_z_score(volume, scored):
    out = apply(PRESETS["none"], volume, draw_view(PRESETS["none"], SHAPE, 0, 0, 0, 0))
    np.testing.assert_allclose(out, scored, atol=3e-6)


def test_flip_changes_left_and_right_only(volume, scored):
    settings = Augmentation(flip=Flip(p=1.0))
    out = apply(settings, volume, draw_view(settings, SHAPE, 0, 0, 0, 0))
    np.testing.assert_allclose(out, scored[::-1], atol=3e-6)
    assert np.abs(out - scored).max() > 0.1  # the blob is not symmetric


@pytest.mark.parametrize("scan", range(4))
@pytest.mark.parametrize(
    "settings",
    [
        Augmentation(affine=Affine(p=1.0, degrees=20.0)),
        Augmentation(affine=Affine(p=1.0, zoom=0.2)),
        Augmentation(affine=Affine(p=1.0, shift=0.2)),
        Augmentation(crop=Crop(p=1.0, side=0.75)),
        Augmentation(
            flip=Flip(p=1.0), affine=Affine(p=1.0, degrees=10.0, zoom=0.1, shift=0.1), crop=Crop(p=1.0, side=0.8)
        ),
    ],
    ids=["rotation", "zoom", "shift", "crop", "all"],
)
def test_warp_equals_scipy(volume, scored, settings, scan):
    view = draw_view(settings, SHAPE, 1, 0, scan, 0)
    out = apply(settings, volume, view)
    np.testing.assert_allclose(out, twin_warp(scored, view.matrix), atol=2e-4)
    assert np.abs(out - scored).max() > 0.05


def test_a_crop_is_the_box_brought_back_to_the_grid(volume, scored):
    settings = Augmentation(crop=Crop(p=1.0, side=0.5))
    view = draw_view(settings, SHAPE, 2, 0, 1, 0)
    corner = view.matrix @ np.array([0, 0, 0, 1.0])
    assert np.allclose(view.matrix[:, :3], np.eye(3) * 0.5)
    assert np.all(corner >= -1e-5)
    assert np.all(corner <= np.array(SHAPE) * 0.5 + 1e-5)


def test_blur_equals_scipy(volume, scored):
    settings = Augmentation(blur=Blur(p=1.0, sigma=(0.8, 0.8)))
    out = apply(settings, volume, draw_view(settings, SHAPE, 0, 0, 0, 0))
    radius = int(np.ceil(3 * 0.8))
    twin = ndimage.gaussian_filter(scored.astype(np.float64), 0.8, mode="mirror", radius=radius)
    np.testing.assert_allclose(out, twin, atol=2e-5)


def twin_gamma(scored, power):
    low, high = scored.min(), scored.max()
    return ((scored - low) / (high - low)) ** power * (high - low) + low


def twin_bias(scored, factors):
    field = np.einsum("d,h,w->dhw", *(np.asarray(f, np.float64) for f in factors))
    return (scored - scored.min()) * field + scored.min()


@pytest.mark.parametrize("scan", range(3))
def test_gamma_is_a_power_of_the_intensities_between_minimum_and_maximum(volume, scored, scan):
    settings = Augmentation(gamma=Gamma(p=1.0, log=0.7))
    view = draw_view(settings, SHAPE, 0, 0, scan, 0)
    out = apply(settings, volume, view)
    np.testing.assert_allclose(out, twin_gamma(scored.astype(np.float64), view.gamma), atol=1e-5)
    assert (out.min(), out.max()) == pytest.approx((scored.min(), scored.max()), abs=1e-5)
    assert abs(out - scored).max() > 0.005
    assert np.exp(-0.7) <= view.gamma <= np.exp(0.7)


@pytest.mark.parametrize("scan", range(3))
def test_a_bias_field_is_smooth_bounded_and_multiplies_what_lies_above_the_minimum(volume, scored, scan):
    settings = Augmentation(bias=Bias(p=1.0, strength=0.6))
    view = draw_view(settings, SHAPE, 0, 0, scan, 0)
    out = apply(settings, volume, view)
    np.testing.assert_allclose(out, twin_bias(scored.astype(np.float64), view.bias), atol=1e-5)
    field = np.einsum("d,h,w->dhw", *view.bias)
    assert np.exp(-0.6) <= field.min() < field.max() <= np.exp(0.6)
    assert [len(factor) for factor in view.bias] == list(SHAPE)
    steps = [np.abs(np.diff(np.log(factor))).max() for factor in view.bias]
    assert max(steps) < 0.6 / 3 * 3 * np.pi / min(SHAPE)  # the derivative of a half and a whole wave


def test_operators_follow_one_another_in_the_documented_order(volume, scored):
    settings = Augmentation(
        flip=Flip(p=1.0), blur=Blur(p=1.0, sigma=(0.7, 0.7)), gamma=Gamma(p=1.0), bias=Bias(p=1.0),
        noise=Noise(p=1.0, sigma=(0.3, 0.3)), cutout=Cutout(p=1.0),
    )  # fmt: skip
    view = draw_view(settings, SHAPE, 0, 0, 3, 1)
    noise = np.random.default_rng(0).normal(size=(*SHAPE, 1)).astype(np.float16)
    out = apply(settings, volume, view, noise)
    low, high = float(scored.min()), float(scored.max())
    twin = ndimage.gaussian_filter(scored[::-1].astype(np.float64), 0.7, mode="mirror", radius=3)
    twin = low + (high - low) * np.clip((twin - low) / (high - low), 0, 1) ** view.gamma
    twin = low + (twin - low) * np.einsum("d,h,w->dhw", *view.bias)
    twin = twin + view.noise * view.noise_sign * noise[..., 0].astype(np.float32)
    outside = out != 0
    np.testing.assert_allclose(out[outside], twin[outside], atol=5e-5)
    assert 0.005 < 1 - outside.mean() < 0.03  # a box of a quarter of each side


def test_views_of_one_batch_take_each_its_own_operators(volume, scored):
    """The graph skips an operator for the views that did not draw it; both kinds in one batch must come out right."""
    settings = Augmentation(
        flip=Flip(p=0.5), affine=Affine(p=0.5, degrees=15.0), crop=Crop(p=0.5, side=0.8), gamma=Gamma(p=0.5),
        bias=Bias(p=0.5),
    )  # fmt: skip
    pairs = [[draw_view(settings, SHAPE, 0, 0, scan, number) for number in range(2)] for scan in range(16)]
    assert {view.move for pair in pairs for view in pair} == {0, 1, 2, 3}

    def source(iteration):
        voxels = volume.astype(np.float16)[..., None]
        return [[voxels, *(a for view in pair for a in view_arrays(settings, view, None))] for pair in pairs]

    pipeline = AugmentPipeline(source, settings, shape=SHAPE, batch=16, device="cpu", threads=2, prefetch=1)
    views = pipeline.run()[:, :, 0].numpy()
    pipeline.close()
    low, span = scored.min(), scored.max() - scored.min()
    for scan, pair in enumerate(pairs):
        for number, view in enumerate(pair):
            twin = (np.clip((twin_warp(scored, view.matrix) - low) / span, 0, 1)) ** view.gamma * span
            twin = low + twin * np.einsum("d,h,w->dhw", *view.bias)
            np.testing.assert_allclose(views[number, scan], twin, atol=5e-4)


OLD_MATRIX = [
    [-1.0289863, -0.0724739, 0.0391346, 15.0986099],
    [-0.0668658, 1.0214277, 0.1334583, -0.9038237],
    [0.0480931, -0.1304978, 1.0228657, 0.8456799],
]


def test_new_operators_left_the_older_draws_as_they_were():
    """Numbers noted before gamma and bias field came: a run begun then goes on with the same views."""
    view = draw_view(PRESETS["default"], SHAPE, 3, 1, 7, 1)
    np.testing.assert_allclose(view.matrix, OLD_MATRIX, rtol=1e-5, atol=1e-6)
    assert (view.noise_from, view.noise_sign, view.noise, view.cutout_side) == ((21, 32, 16), -1.0, 0.0, 0.0)
    assert view.blur == pytest.approx(0.6228776)
    assert view.gamma == 1.0
    assert all(np.all(factor == 1) for factor in view.bias)


def test_noise_is_the_drawn_part_of_the_bank(volume, scored):
    settings = Augmentation(noise=Noise(p=1.0, sigma=(0.5, 0.5)))
    view = draw_view(settings, SHAPE, 0, 0, 0, 0)
    bank = noise_bank(SHAPE, 0)
    part = bank[tuple(slice(c, c + n) for c, n in zip(view.noise_from, SHAPE, strict=True))]
    out = apply(settings, volume, view, np.ascontiguousarray(part[..., None]))
    np.testing.assert_allclose(out, scored + 0.5 * view.noise_sign * part.astype(np.float32), atol=1e-5)
    assert bank.shape == tuple(n + BANK_MARGIN for n in SHAPE)
    assert abs(float(bank.astype(np.float32).std()) - 1) < 0.01


def test_cutout_zeroes_a_box_of_a_quarter_of_each_side(volume, scored):
    settings = Augmentation(cutout=Cutout(p=1.0, side=0.25))
    out = apply(settings, volume, draw_view(settings, SHAPE, 0, 0, 5, 0))
    cut = np.argwhere(out != scored.astype(np.float32))
    changed = np.abs(out - scored) > 1e-5
    low, high = np.argwhere(changed).min(0), np.argwhere(changed).max(0) + 1
    assert np.all(out[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] == 0)
    assert np.all(np.abs((high - low) - np.array(SHAPE) * 0.25) <= 1)
    assert len(cut)


@pytest.mark.parametrize(
    "settings",
    [
        Augmentation(affine=Affine(p=1.0)),
        Augmentation(crop=Crop(p=1.0, side=1.0)),
        Augmentation(blur=Blur(p=1.0, sigma=(0.0, 0.0))),
        Augmentation(noise=Noise(p=1.0, sigma=(0.0, 0.0))),
        Augmentation(gamma=Gamma(p=1.0, log=0.0)),
        Augmentation(bias=Bias(p=1.0, strength=0.0)),
        Augmentation(flip=Flip(p=1e-12), blur=Blur(p=1e-12), cutout=Cutout(p=1e-12)),
    ],
    ids=["affine", "crop", "blur", "noise", "gamma", "bias", "never"],
)
def test_zero_strength_changes_nothing(volume, scored, settings):
    noise = np.ones((*SHAPE, 1), np.float16)
    out = apply(settings, volume, draw_view(settings, SHAPE, 0, 0, 0, 0), noise)
    np.testing.assert_allclose(out, scored, atol=5e-6)


SINGLE = {
    "flip": Augmentation(flip=Flip(p=1.0)),
    "turn": Augmentation(affine=Affine(p=1.0, degrees=20.0, zoom=0.1, shift=0.1)),
    "crop": Augmentation(crop=Crop(p=1.0, side=0.75)),
    "blur": Augmentation(blur=Blur(p=1.0, sigma=(0.8, 0.8))),
    "gamma": Augmentation(gamma=Gamma(p=1.0, log=0.5)),
    "bias": Augmentation(bias=Bias(p=1.0, strength=0.5)),
    "cutout": Augmentation(cutout=Cutout(p=1.0)),
    "noise": Augmentation(noise=Noise(p=1.0, sigma=(0.5, 0.5))),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("operator", SINGLE)
def test_gpu_equals_cpu_operator_by_operator(volume, operator):
    settings = SINGLE[operator]
    view = draw_view(settings, SHAPE, 0, 0, 5, 0)
    noise = np.random.default_rng(0).normal(size=(*SHAPE, 1)).astype(np.float16) if view.noise > 0 else None
    here, there = (apply(settings, volume, view, noise, device) for device in ("cpu", "gpu"))
    np.testing.assert_allclose(there, here, atol=2e-3)


def test_a_view_depends_on_its_key_alone():
    settings = PRESETS["default"]
    keys = list(itertools.product([0, 1], [0, 1], [0, 7], [0, 1]))
    first = [draw_view(settings, SHAPE, *key) for key in keys]
    again = [draw_view(settings, SHAPE, *key) for key in reversed(keys)][::-1]
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a.matrix, b.matrix)
        assert (a.blur, a.noise, a.noise_from) == (b.blur, b.noise, b.noise_from)
    assert len({view.noise_from for view in first}) == len(keys)


def test_operators_are_applied_as_often_as_asked():
    settings = PRESETS["paper-all"]
    views = [draw_view(settings, SHAPE, 0, 0, scan, view) for scan in range(1000) for view in range(2)]
    shares = [
        np.mean([v.matrix[0, 0] < 0 for v in views]),
        np.mean([v.blur > 0.01 for v in views]),
        np.mean([v.noise > 0 for v in views]),
        np.mean([v.cutout_side > 0 for v in views]),
        np.mean([abs(v.matrix[1, 1]) < 1 for v in views]),
    ]
    assert np.allclose(shares, 0.5, atol=0.06)  # five standard deviations


def test_the_papers_presets_draw_what_the_paper_says():
    views = [draw_view(PRESETS["paper-all"], SHAPE, 0, 0, scan, view) for scan in range(1000) for view in range(2)]
    shape = np.array(SHAPE)
    for name in ("blur", "noise"):  # standard deviations uniform in 0.1 to 1, voxels and units of the z-score
        strengths = [getattr(view, name) for view in views if getattr(view, name) > 0.01]
        assert 0.1 <= min(strengths) < 0.11
        assert 0.99 < max(strengths) <= 1.0
        assert np.mean(strengths) == pytest.approx(0.55, abs=0.04)
    assert {view.cutout_side for view in views} == {0.0, 0.25}  # a quarter of each side
    for view in views:
        low, high = view.cutout_from, view.cutout_from + view.cutout_side
        assert (low >= 0).all()
        assert (high <= 1).all()
        # A crop of three quarters of each side, or nothing; a flip of left and right; no rotation, no shift of its own.
        sides = np.diag(view.matrix[:, :3])
        assert np.array_equal(view.matrix[:, :3], np.diag(sides))
        assert set(np.abs(sides)) in ({0.75}, {1.0})
        assert (sides[1:] > 0).all()
        ends = np.sort([view.matrix[:, 3], view.matrix[:, 3] + sides * shape], axis=0)
        assert (ends[0] > -1e-4).all()
        assert (ends[1] < shape + 1e-4).all()
    for scan in range(100):  # what the published weights used: a cutout of every view, and nothing else
        view = draw_view(PRESETS["paper-cutout"], SHAPE, 0, 0, scan, 0)
        assert (view.cutout_side, view.noise, view.gamma) == (0.25, 0.0, 1.0)
        assert view.blur < 0.01
        assert np.array_equal(view.matrix, np.eye(3, 4))
    assert PRESETS["paper-cutout"].operators == ("cutout",)


def test_changing_one_probability_leaves_the_other_draws_alone():
    base = PRESETS["paper-all"]
    other = load_augmentation({"preset": "paper-all", "cutout": {"p": 0.0}})
    for scan in range(20):
        a, b = (draw_view(s, SHAPE, 0, 0, scan, 0) for s in (base, other))
        assert np.array_equal(a.matrix, b.matrix)
        assert (a.blur, a.noise) == (b.blur, b.noise)


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ("papr-all", r"augmentation.preset='papr-all' is not known \(did you mean 'paper-all'\?\)"),
        ({"preset": "none", "blurr": {}}, r"augmentation.blurr is no operator \(did you mean 'blur'\?\)"),
        ({"blur": {"sigm": 1}}, r"augmentation.blur.sigm is not known \(did you mean 'sigma'\?\)"),
        ({"blur": 0.5}, "augmentation.blur=0.5 must hold keys"),
        ({"flip": {"p": 2}}, r"augmentation.flip.p: .*less than or equal to 1, found 2"),
    ],
)
def test_wrong_settings_are_named(section, text):
    with pytest.raises(UserError, match=text):
        load_augmentation(section)
