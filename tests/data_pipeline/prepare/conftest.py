"""A small raw cohort, and the same prepared."""

from __future__ import annotations

import pytest

from infra import cli
from tests.data_pipeline.prepare.phantoms import SMALL_OPTIONS, write_small_cohort


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return write_small_cohort(tmp_path_factory.mktemp("raw") / "small")


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "out"
    assert cli.run(["cohort", "prepare", str(raw), str(out), *SMALL_OPTIONS, "--workers", "1"]) == 0
    return out
