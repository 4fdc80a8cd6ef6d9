"""Fixtures for the tests of readouts."""

from __future__ import annotations

import pytest

from tests.pretrain.weights.encoders import write_small_encoder


@pytest.fixture
def encoder(tmp_path, healthy):
    """An exported encoder with random weights for these shards."""
    write_small_encoder(tmp_path / "encoder", healthy.grid, modality="vbm")
    return tmp_path / "encoder"
