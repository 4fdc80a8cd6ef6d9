"""The DALI graph: each operator equals its SciPy or NumPy counterpart, alone, in sequence, and mixed in one batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from data_pipeline.loading.augment import PRESETS, Augmentation, View, draw_view, view_arrays
from data_pipeline.loading.augmentations.bias import Bias
from data_pipeline.loading.augmentations.blur import Blur
from data_pipeline.loading.augmentations.cutout import Cutout
from data_pipeline.loading.augmentations.gamma import Gamma
from data_pipeline.loading.augmentations.noise import BANK_MARGIN, Noise, noise_bank
from data_pipeline.loading.augmentations.operator import ViewContext
from data_pipeline.loading.augmentations.warp import Affine, Crop, Flip, resampling, warp_matrix
from data_pipeline.loading.dali_graph import AugmentPipeline
from data_pipeline.volume.intensity import zscore
from tests.cohorts import blob

SHAPE = (14, 16, 12)
CONTEXT = ViewContext(SHAPE, 0)


def draw(settings: Augmentation, scan: int = 0, view: int = 0, seed: int = 0) -> View:
    return draw_view(settings, SHAPE, seed=seed, epoch=0, scan=scan, view=view)


def run_graph(settings: Augmentation, samples: list, device: str = "cpu", threads: int = 2) -> np.ndarray:
    """Views (2, B, D, H, W) of one batch; ``samples`` holds the graph's inputs of each scan."""
    pipeline = AugmentPipeline(
        lambda iteration: samples, settings, shape=SHAPE, batch=len(samples), device=device, threads=threads, prefetch=1
    )
    views = pipeline.run()[:, :, 0].cpu().numpy()
    pipeline.close()
    return views


def apply(settings: Augmentation, volume: np.ndarray, view: View, device: str = "cpu") -> np.ndarray:
    """One volume through the graph, with the same parameters for both views."""
    arrays = view_arrays(settings, view, CONTEXT)
    views = run_graph(settings, [[volume.astype(np.float16)[..., None], *arrays, *arrays]], device)[:, 0]
    assert np.array_equal(views[0], views[1])
    return views[0]


@pytest.fixture(scope="module")
def volume():
    return blob(3, 40.0).astype(np.float16).astype(np.float32)


@pytest.fixture(scope="module")
def scored(volume):
    return zscore(volume)


def matrix_of(view: View) -> np.ndarray:
    return warp_matrix(SHAPE, view["crop"], view["affine"], view["flip"])


def expected_warp(scored, matrix):
    """The same resampling by SciPy, whose coordinates start at the first voxel's centre instead of its corner."""
    linear, offset = matrix[:, :3].astype(float), matrix[:, 3].astype(float)
    half = np.full(3, 0.5)
    return ndimage.affine_transform(scored, linear, linear @ half + offset - half, order=1, mode="nearest")


def expected_gamma(scored, power, low, span):
    return np.clip((scored - low) / span, 0, 1) ** power * span + low


def expected_bias(scored, factors, low):
    field = np.einsum("d,h,w->dhw", *(np.asarray(factor, np.float64) for factor in factors))
    return (scored - low) * field + low


def noise_of(view: View) -> np.ndarray:
    """The noise that a view adds, (D, H, W), cut from the bank here."""
    sigma, corner, sign = view["noise"]
    box = tuple(slice(first, first + n) for first, n in zip(corner, SHAPE, strict=True))
    return sigma * sign * noise_bank(SHAPE, 0)[box].astype(np.float32)


def test_without_augmentation_the_view_is_the_z_score(volume, scored):
    out = apply(PRESETS["none"], volume, draw(PRESETS["none"]))
    np.testing.assert_allclose(out, scored, atol=3e-6)


def test_flip_mirrors_left_and_right_only(volume, scored):
    settings = Augmentation(flip=Flip(p=1.0))
    out = apply(settings, volume, draw(settings))
    np.testing.assert_allclose(out, scored[::-1], atol=3e-6)
    assert np.abs(out - scored).max() > 0.1  # the volume is not symmetric


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
def test_the_warp_equals_scipy(volume, scored, settings, scan):
    view = draw(settings, scan, seed=1)
    out = apply(settings, volume, view)
    np.testing.assert_allclose(out, expected_warp(scored, matrix_of(view)), atol=2e-4)
    assert np.abs(out - scored).max() > 0.05


@pytest.mark.parametrize("side", [0.5, 0.75])
@pytest.mark.parametrize("scan", range(3))
def test_a_crop_is_a_box_inside_the_volume_resized_to_the_full_grid(volume, scored, scan, side):
    settings = Augmentation(crop=Crop(p=1.0, side=side))
    view = draw(settings, scan, seed=2)
    corner = (np.array(SHAPE) / 2) * (1 - side) + view["crop"].shift
    assert np.all(corner >= -1e-5)
    assert np.all(corner + side * np.array(SHAPE) <= np.array(SHAPE) + 1e-5)
    expected = scored.astype(np.float64)
    for axis, length in enumerate(SHAPE):  # linear interpolation between voxel centres, axis by axis
        position = corner[axis] + (np.arange(length) + 0.5) * side - 0.5
        expected = np.apply_along_axis(
            lambda line, x=position: np.interp(x, np.arange(len(line)), line), axis, expected
        )
    out = apply(settings, volume, view)
    np.testing.assert_allclose(out, expected, atol=2e-4)
    assert np.abs(out - scored).max() > 0.05


def test_blur_equals_scipy(volume, scored):
    settings = Augmentation(blur=Blur(p=1.0, sigma=(0.8, 0.8)))
    out = apply(settings, volume, draw(settings))
    radius = int(np.ceil(3 * 0.8))
    expected = ndimage.gaussian_filter(scored.astype(np.float64), 0.8, mode="mirror", radius=radius)
    np.testing.assert_allclose(out, expected, atol=2e-5)


@pytest.mark.parametrize("scan", range(3))
def test_gamma_is_a_power_of_the_intensities_between_minimum_and_maximum(volume, scored, scan):
    settings = Augmentation(gamma=Gamma(p=1.0, log=0.7))
    view = draw(settings, scan)
    out = apply(settings, volume, view)
    low, high = float(scored.min()), float(scored.max())
    expected = expected_gamma(scored.astype(np.float64), view["gamma"], low, high - low)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert (out.min(), out.max()) == pytest.approx((low, high), abs=1e-5)
    assert abs(out - scored).max() > 0.005
    assert np.exp(-0.7) <= view["gamma"] <= np.exp(0.7)


@pytest.mark.parametrize("scan", range(3))
def test_the_bias_field_is_smooth_and_bounded_and_multiplies_intensities_above_the_minimum(volume, scored, scan):
    settings = Augmentation(bias=Bias(p=1.0, strength=0.6))
    view = draw(settings, scan)
    out = apply(settings, volume, view)
    np.testing.assert_allclose(out, expected_bias(scored.astype(np.float64), view["bias"], scored.min()), atol=1e-5)
    field = np.einsum("d,h,w->dhw", *view["bias"])
    assert np.exp(-0.6) <= field.min() < field.max() <= np.exp(0.6)
    assert [len(factor) for factor in view["bias"]] == list(SHAPE)
    steps = [np.abs(np.diff(np.log(factor))).max() for factor in view["bias"]]
    assert max(steps) < 0.6 / 3 * 3 * np.pi / min(SHAPE)  # the derivative of a half and a whole wave


def test_noise_is_cut_from_the_bank(volume, scored):
    settings = Augmentation(noise=Noise(p=1.0, sigma=(0.5, 0.5)))
    view = draw(settings)
    out = apply(settings, volume, view)
    np.testing.assert_allclose(out, scored + noise_of(view), atol=1e-5)
    assert abs(float((out - scored).std()) - 0.5) < 0.05
    bank = noise_bank(SHAPE, 0)
    assert bank.shape == tuple(n + BANK_MARGIN for n in SHAPE)
    assert abs(float(bank.astype(np.float32).std()) - 1) < 0.01


def test_cutout_zeroes_a_box_of_a_quarter_of_each_side(volume, scored):
    settings = Augmentation(cutout=Cutout(p=1.0, side=0.25))
    out = apply(settings, volume, draw(settings, 5))
    changed = np.abs(out - scored) > 1e-5
    low, high = np.argwhere(changed).min(0), np.argwhere(changed).max(0) + 1
    assert np.all(out[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] == 0)
    assert np.all(np.abs((high - low) - np.array(SHAPE) * 0.25) <= 1)


def test_operators_are_applied_in_the_documented_order(volume, scored):
    settings = Augmentation(
        flip=Flip(p=1.0), blur=Blur(p=1.0, sigma=(0.7, 0.7)), gamma=Gamma(p=1.0), bias=Bias(p=1.0),
        noise=Noise(p=1.0, sigma=(0.3, 0.3)), cutout=Cutout(p=1.0),
    )  # fmt: skip
    view = draw(settings, 3, view=1)
    out = apply(settings, volume, view)
    low, span = float(scored.min()), float(scored.max() - scored.min())
    expected = ndimage.gaussian_filter(scored[::-1].astype(np.float64), 0.7, mode="mirror", radius=3)
    expected = expected_bias(expected_gamma(expected, view["gamma"], low, span), view["bias"], low) + noise_of(view)
    outside = out != 0
    np.testing.assert_allclose(out[outside], expected[outside], atol=5e-5)
    assert 0.005 < 1 - outside.mean() < 0.03  # a box of a quarter of each side


def test_each_view_of_a_batch_gets_its_own_operators(volume, scored):
    """The graph skips a step for views that did not draw it; both kinds of view in one batch must be correct."""
    settings = Augmentation(
        flip=Flip(p=0.5), affine=Affine(p=0.5, degrees=15.0), crop=Crop(p=0.5, side=0.8), gamma=Gamma(p=0.5),
        bias=Bias(p=0.5),
    )  # fmt: skip
    pairs = [[draw(settings, scan, number) for number in range(2)] for scan in range(16)]
    assert {resampling(matrix_of(view), SHAPE) for pair in pairs for view in pair} == {0, 1, 2, 3}
    voxels = volume.astype(np.float16)[..., None]
    views = run_graph(
        settings, [[voxels, *(a for v in pair for a in view_arrays(settings, v, CONTEXT))] for pair in pairs]
    )
    low, span = scored.min(), scored.max() - scored.min()
    for scan, pair in enumerate(pairs):
        for number, view in enumerate(pair):
            expected = expected_warp(scored, matrix_of(view))
            if view["gamma"] is not None:
                expected = expected_gamma(expected, view["gamma"], low, span)
            if view["bias"] is not None:
                expected = expected_bias(expected, view["bias"], low)
            np.testing.assert_allclose(views[number, scan], expected, atol=5e-4)


def test_views_do_not_depend_on_the_number_of_threads(volume):
    settings = PRESETS["t1w"]
    pairs = [[draw(settings, scan, number) for number in range(2)] for scan in range(7)]
    voxels = volume.astype(np.float16)[..., None]
    samples = [[voxels, *(a for v in pair for a in view_arrays(settings, v, CONTEXT))] for pair in pairs]
    alone = run_graph(settings, samples, threads=1)
    assert all(np.array_equal(run_graph(settings, samples, threads=threads), alone) for threads in (2, 3))


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
    np.testing.assert_allclose(apply(settings, volume, draw(settings)), scored, atol=5e-6)


SINGLE = {
    "flip": Augmentation(flip=Flip(p=1.0)),
    "affine": Augmentation(affine=Affine(p=1.0, degrees=20.0, zoom=0.1, shift=0.1)),
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
def test_each_operator_gives_the_same_on_gpu_and_cpu(volume, operator):
    settings = SINGLE[operator]
    view = draw(settings, 5)
    on_cpu, on_gpu = (apply(settings, volume, view, device) for device in ("cpu", "gpu"))
    np.testing.assert_allclose(on_gpu, on_cpu, atol=2e-3)
