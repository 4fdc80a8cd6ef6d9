"""A cohort and its shards, built once per session for all tests of the pipeline."""

from __future__ import annotations

import pytest

from tests.cohorts import write_cohort


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
    return write_cohort(tmp_path_factory.mktemp("cohort") / "tiny", participants=24, sessions=2)


@pytest.fixture(scope="session")
def manifest(cohort, tmp_path_factory):
    from data_pipeline.shards.build import build_shards

    return build_shards(cohort, tmp_path_factory.mktemp("shards") / "tiny", scans_per_shard=10)
