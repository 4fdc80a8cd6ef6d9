"""Fixtures for all tests."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch and NumPy are imported. Several test processes share the cores, and threads that wait for each other burn
# them: on two cores with other work, two threads used three times the CPU seconds of one.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import pytest  # noqa: E402

from tests.cohorts import write_cohort  # noqa: E402


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Shards of 36 simulated participants with two sessions each."""
    from data_pipeline.shards.build import build_shards

    cohort = write_cohort(tmp_path_factory.mktemp("cohort") / "tiny", participants=36, sessions=2)
    out = tmp_path_factory.mktemp("shards") / "tiny"
    build_shards(cohort, out, scans_per_shard=20)
    return out


# The files that take longest, which start first, so that no process has one of them left when the others have finished.
LONG_FILES = (
    "integration/test_slurm.py", "integration/test_slurm_ray.py", "integration/test_slurm_launch.py",
    "faults/test_loader_faults.py", "faults/test_stop_resume.py", "distributed/test_two_hosts.py",
    "faults/test_watchdog_recipe.py", "faults/test_build_faults.py", "docs/test_tutorials.py", "infra/test_tuning_restart.py",
    "integration/test_main_job.py", "faults/test_kill_resume.py", "evaluation/protocols/test_protocols.py",
    "api/test_pretrain.py", "infra/watchdog/test_watchdog.py", "distributed/test_grad_cache_ranks.py",
    "integration/test_recipes.py", "faults/test_kill_points.py", "infra/test_ray_cluster.py",
    "pretrain/encoders/test_networks.py", "faults/test_failures.py", "distributed/test_loss_zero.py",
    "pretrain/encoders/test_layers.py", "distributed/test_engine_ranks.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Sort the tests by file, the files of LONG_FILES first."""
    root = Path(__file__).parent
    place = {root / name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: place.get(item.path, len(place)))
