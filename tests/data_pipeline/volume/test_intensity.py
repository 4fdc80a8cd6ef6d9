"""Intensity scaling, its defaults, and rounding to float16."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from data_pipeline.volume.errors import BadScan
from data_pipeline.volume.intensity import as_float16, as_float32, robust_intensity, zscore
from data_pipeline.volume.preparation import check_preparation
from infra.errors import UserError


def test_robust_intensity_scales_the_foregrounds_percentiles_to_0_and_1():
    generator = np.random.default_rng(0)
    voxels = np.zeros((20, 20, 20), dtype=np.float32)
    voxels[4:16, 4:16, 4:16] = generator.normal(300, 40, (12, 12, 12))
    voxels[5, 5, 5] = 4000.0  # a vessel
    scaled = robust_intensity(voxels)
    head = np.sort(voxels[voxels > voxels.mean()].astype(np.float64))
    low, high = (np.interp(q * (len(head) - 1), np.arange(len(head)), head) for q in (0.01, 0.99))
    np.testing.assert_allclose(scaled, np.clip((voxels - low) / (high - low), 0, 1), atol=1e-5)
    np.testing.assert_allclose(robust_intensity(voxels * 7), scaled, atol=1e-5)
    assert (scaled.min(), scaled.max()) == (0.0, 1.0)
    flat = np.zeros((8, 8, 8), dtype=np.float32)
    flat[2:5] = 3.0
    with pytest.raises(BadScan, match="99 % of its foreground is 3"):
        robust_intensity(flat)


def test_the_default_intensity_depends_on_the_modality():
    assert [check_preparation(m, "world", None) for m in ("vbm", "t1w", "quasiraw")] == ["none", "robust", "robust"]
    assert check_preparation("vbm", "brain", "robust") == "robust"
    with pytest.raises(UserError, match=r"crop='brian' is not known \(did you mean 'brain'\?\); allowed: world, brain"):
        check_preparation("vbm", "brian", None)
    with pytest.raises(UserError, match="intensity='zscore' is not known; allowed: none, robust"):
        check_preparation("vbm", "world", "zscore")


def test_torch_and_numpy_round_to_the_same_float16(monkeypatch):
    import torch  # noqa: F401  (so that it is there to be used)

    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    values = bits.view(np.float32)
    values = np.concatenate(
        [values[np.abs(values) < 60000.0], np.float32([0.0, -0.0, 6e-8, 2.98e-8, 2.99e-8, 1.0004883])]
    )
    with_torch = as_float16(values.copy())
    monkeypatch.delitem(sys.modules, "torch")
    assert np.array_equal(with_torch.view(np.uint16), as_float16(values.copy()).view(np.uint16))


def test_torch_and_numpy_widen_every_float16_to_the_same_float32(monkeypatch):
    import torch  # noqa: F401

    values = np.arange(2**16, dtype=np.uint32).astype(np.uint16).view(np.float16)
    values = values[~np.isnan(values)]
    with_torch = as_float32(values)
    assert with_torch.base is None or not np.shares_memory(with_torch, values)
    monkeypatch.delitem(sys.modules, "torch")
    assert np.array_equal(with_torch.view(np.uint32), as_float32(values).view(np.uint32))


@pytest.mark.parametrize("torch_is_there", [True, False])
@pytest.mark.parametrize("kind", ["float16", "float32", "read-only", "not in C order", "constant"])
def test_the_zscore_is_that_of_the_plain_formula_to_the_last_bit(kind, torch_is_there, monkeypatch):
    import torch  # noqa: F401

    voxels = (
        np.random.default_rng(0).gamma(2.0, 0.3, (31, 37, 29)).astype(np.float32 if kind == "float32" else np.float16)
    )
    if kind == "constant":
        voxels[:] = 0.7
    if kind == "not in C order":
        voxels = voxels.transpose(2, 0, 1)
    voxels.flags.writeable = kind != "read-only"
    before = voxels.copy()
    if not torch_is_there:
        monkeypatch.delitem(sys.modules, "torch")
    found = zscore(voxels)
    wide = before.astype(np.float32)
    mean, deviation = float(wide.mean(dtype=np.float64)), max(float(wide.std(dtype=np.float64)), 1e-8)
    assert np.array_equal(found, (wide - np.float32(mean)) / np.float32(deviation))
    assert found.dtype == np.float32
    assert np.array_equal(voxels, before)  # the caller's voxels stay as they are
