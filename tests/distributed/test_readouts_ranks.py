"""Readouts on real gloo ranks with different scans on each, against one process."""

from __future__ import annotations

import numpy as np
import pytest

from pretrain.readouts.fit import OwnFeatures, Ranks, ReadoutSettings, fit_group, fit_readouts
from pretrain.readouts.targets import Target, TargetGroup, deal_folds

pytestmark = pytest.mark.distributed


def data(scans, features, calibrated=False):
    """Features with unreadable scans, and two targets that are unknown for some scans; a third of them to calibrate on."""
    rng = np.random.default_rng(scans)
    x = (rng.normal(size=(scans, features)) + 5.0).astype(np.float32)
    y = x[:, :3] @ np.array([[3.0, 0.2], [-2.0, 0.0], [1.0, 9.0]]) + rng.normal(size=(scans, 2))
    readable, known = np.ones(scans, bool), np.ones(scans, bool)
    readable[[2, 31]], known[[0, 7, 8]] = False, False
    x[~readable] = np.nan
    calibration = np.arange(scans) >= scans * 2 // 3 if calibrated else None
    folds = deal_folds(np.arange(scans) // 2, known & calibration if calibrated else known, seed=0)
    group = TargetGroup(
        [Target(name, values) for name, values in zip("ab", y.T, strict=True)], known, folds, calibration
    )
    return x, readable, group


def share(group, rank, scans, features, calibrated):
    """Fit to this rank's share of the scans."""
    size = group.size()
    x, readable, targets = data(scans, features, calibrated)
    own = OwnFeatures(x[rank::size], readable, Ranks(rank, size, group))
    return fit_group(own, targets)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(("scans", "features"), [(90, 20), (60, 130)])
def test_fits_do_not_depend_on_the_number_of_ranks(ranks, world_size, scans, features, calibrated):
    x, readable, group = data(scans, features, calibrated)
    expected = fit_group(OwnFeatures(x, readable, Ranks()), group)
    for found in ranks.run(share, world_size, scans=scans, features=features, calibrated=calibrated):
        np.testing.assert_array_equal(found.entries, expected.entries)
        for name in ("coefficients", "intercepts", "fold_coefficients", "fold_intercepts"):
            one = getattr(expected, name)
            np.testing.assert_allclose(getattr(found, name), one, atol=1e-6 * np.abs(one).max())


def from_scans(group, rank, encoder, shards, work):
    """Embed this rank's scans and fit readouts; return what the result holds."""
    from pathlib import Path

    from data_pipeline.storage.manifest import Manifest
    from pretrain.weights.encoder import Encoder

    manifest = Manifest.load(shards)
    settings = ReadoutSettings(columns=["age", "sex"], batch_size=5, workers=0, device="cpu", progress=False)
    fitted = fit_readouts(
        Encoder.from_pretrained(encoder), manifest, manifest.rows(), settings, Path(work),
        ranks=Ranks(rank, group.size(), group),
    )  # fmt: skip
    return {name: (vars(readout), fitted.left_out) for name, readout in fitted.readouts.items()}


def test_readouts_of_scans_do_not_depend_on_the_number_of_ranks(ranks, tmp_path, shards):
    """Features differ in their last digits between batches, so the tolerance is wider than for given features."""
    from data_pipeline.storage.manifest import Manifest
    from tests.pretrain.weights.encoders import write_small_encoder

    write_small_encoder(tmp_path / "encoder", Manifest.load(shards).grid, modality="vbm")
    results = {}
    for size in (1, 2, 3):
        arguments = {
            "encoder": str(tmp_path / "encoder"),
            "shards": str(shards),
            "work": str(tmp_path / f"work-{size}"),
        }
        answers = ranks.run(from_scans, size, **arguments)
        for answer in answers[1:]:
            for name, (found, _) in answer.items():
                np.testing.assert_array_equal(found["residuals"], answers[0][name][0]["residuals"])
        results[size] = answers[0]
    assert set(results[1]) == {"age", "sex"}
    for size in (2, 3):
        for name, (expected, _) in results[1].items():
            found = results[size][name][0]
            for key, value in expected["summary"].items():
                exact = isinstance(value, str | dict)
                assert found["summary"][key] == (value if exact else pytest.approx(value, rel=1e-3, abs=1e-4))
            assert [row | {"mae": 0, "bias": 0} for row in found["errors"]] == [
                row | {"mae": 0, "bias": 0} for row in expected["errors"]
            ]
            np.testing.assert_allclose(found["residuals"], expected["residuals"], rtol=1e-3, atol=1e-3)
            np.testing.assert_array_equal(found["residual_folds"], expected["residual_folds"])
