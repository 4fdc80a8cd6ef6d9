"""Fixtures for all tests."""

from __future__ import annotations

import pytest

from tests.cohorts import write_cohort


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Shards of 36 simulated participants with two sessions each."""
    from data_pipeline.shards.build import build_shards

    cohort = write_cohort(tmp_path_factory.mktemp("cohort") / "tiny", participants=36, sessions=2)
    out = tmp_path_factory.mktemp("shards") / "tiny"
    build_shards(cohort, out, scans_per_shard=20)
    return out
