"""Fixtures for the tests of readouts."""

from __future__ import annotations

import pytest

from data_pipeline.storage.manifest import Manifest
from pretrain.readouts.add import add_readouts
from tests.pretrain.weights.encoders import write_encoders_of, write_small_encoder


@pytest.fixture
def encoder(tmp_path, healthy):
    """An exported encoder with random weights for these shards."""
    write_small_encoder(tmp_path / "encoder", healthy.grid, modality="vbm")
    return tmp_path / "encoder"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, two_splits):
    """An exported encoder that was trained on the split pretrain, with the readout of age that ``auto`` fits."""
    folder = tmp_path_factory.mktemp("trained") / "encoder"
    write_encoders_of(Manifest.load(two_splits), folder)
    add_readouts(folder, two_splits, columns=["age"], batch_size=8, workers=0, progress=False)
    return folder


@pytest.fixture
def manifest(two_splits):
    """The manifest of 24 people of pretrain, 55 of monitor and 3 of other, whose table a test may change."""
    return Manifest.load(two_splits)
