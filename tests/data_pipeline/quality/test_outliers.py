"""The rules that compare scans: exact, monotone in the threshold, and independent of the division into parts."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import median_abs_deviation

from data_pipeline.quality import outliers
from data_pipeline.quality.outliers import StoredScan, find_outliers, save_coarse
from data_pipeline.quality.rules import Outlier, Quality
from data_pipeline.shards.build import build_shards
from tests.data_pipeline.shards.faults import write_faulty_cohort

SCANS, VOXELS = 30, 64


def table_of(digests: list[str], datasets: list[str] | None = None) -> pd.DataFrame:
    names = datasets or ["a"] * len(digests)
    keys = [f"{name}_sub-{n:02d}_ses-1" for n, name in enumerate(names)]
    return pd.DataFrame(
        {"key": keys, "dataset": names, "participant_id": [f"{n:02d}" for n in range(len(keys))],
         "voxels_sha256": digests}
    )  # fmt: skip


def volumes(seed: int) -> np.ndarray:
    """(SCANS, VOXELS) scans of decreasing similarity to a common pattern, rounded to float16 as in the files."""
    generator = np.random.default_rng(seed)
    noise = np.geomspace(0.05, 3.0, SCANS)[:, None] * generator.standard_normal((SCANS, VOXELS))
    return (generator.standard_normal(VOXELS) + noise).astype(np.float16).astype(np.float64)


def write_parts(folder: Path, content: np.ndarray, cuts: list[int]) -> list[Path]:
    """Write the coarse volumes in parts that begin at the given rows."""
    edges = [0, *sorted(set(cuts)), len(content)]
    files = []
    for number, (left, right) in enumerate(pairwise(edges)):
        if right > left:
            files.append(folder / f"{number}.npy")
            save_coarse(files[-1], list(content[left:right]))
    return files


def paths(table: pd.DataFrame) -> dict[str, Path]:
    return {key: Path(f"{key}.nii") for key in table["key"]}


@given(seed=st.integers(0, 50), first=st.floats(-20, -0.1), second=st.floats(-20, -0.1))
@settings(max_examples=30, deadline=None)
def test_a_stricter_threshold_removes_a_superset(tmp_path_factory, seed, first, second):
    table = table_of([str(n) for n in range(SCANS)])
    files = write_parts(tmp_path_factory.mktemp("parts"), volumes(seed), [11, 20])
    loose, strict = sorted((first, second))
    removed = []
    for limit in (loose, strict):
        verdict = find_outliers(table, files, Quality(outlier=Outlier(robust_z=limit, least_drop=0.0)), paths(table))
        removed.append({removal.key for removal in verdict.removals})
        assert removed[-1] == set(table["key"][verdict.z < limit])
        assert all(removal.measured < limit == removal.threshold for removal in verdict.removals)
    assert removed[0] <= removed[1]


def test_a_small_drop_is_kept_and_a_large_one_is_excluded(tmp_path):
    """A scan like that of a thinned cortex: a low robust z in a homogeneous cohort, but a high correlation."""
    generator = np.random.default_rng(0)
    base = generator.random(500)
    content = base + 0.01 * generator.random((40, 500))
    content[7] += 0.12 * generator.random(500)  # slightly changed
    content[9] = generator.random(500)  # unrelated
    table = table_of([str(n) for n in range(40)])
    verdict = find_outliers(table, write_parts(tmp_path, content.astype(np.float32), []), Quality(), paths(table))
    assert verdict.z[7] < -5
    assert verdict.location - verdict.correlation[7] < 0.05
    assert [removal.key for removal in verdict.removals] == [table["key"][9]]


@given(seed=st.integers(0, 50), cuts=st.lists(st.integers(1, SCANS - 1), max_size=6), block=st.integers(1, 40_000))
@settings(max_examples=30, deadline=None)
def test_the_verdict_equals_a_naive_one_for_any_division_and_block_size(tmp_path_factory, seed, cuts, block):
    table, content = table_of([str(n) for n in range(SCANS)]), volumes(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outliers, "MEMORY_BYTES", block)
        verdict = find_outliers(
            table, write_parts(tmp_path_factory.mktemp("parts"), content, cuts), Quality(), paths(table)
        )
    median = np.median(content, axis=0)
    expected = np.array([np.corrcoef(volume, median)[0, 1] for volume in content])
    np.testing.assert_allclose(verdict.correlation, expected, atol=1e-6)
    z = (expected - np.median(expected)) / median_abs_deviation(expected, scale="normal")
    np.testing.assert_allclose(verdict.z, z, atol=1e-3)


@given(
    groups=st.lists(st.integers(0, 6), min_size=2, max_size=SCANS),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_the_first_key_of_each_group_of_copies_is_kept_for_any_order_of_rows(tmp_path_factory, groups, data):
    datasets = [data.draw(st.sampled_from("ab")) for _ in groups]
    table = table_of([f"digest{group}" for group in groups], datasets)
    order = data.draw(st.permutations(range(len(groups))))
    shuffled = table.iloc[order].reset_index(drop=True)
    files = write_parts(tmp_path_factory.mktemp("parts"), volumes(0)[: len(groups)], [])
    rules = Quality(outlier=Outlier(use=False))
    verdict = find_outliers(shuffled, files, rules, paths(shuffled))
    first = table.sort_values("key").drop_duplicates("voxels_sha256").set_index("voxels_sha256")["key"]
    removed = {removal.key for removal in verdict.removals}
    assert set(table["key"]) - removed == set(first)
    digest = table.set_index("key")["voxels_sha256"]
    for removal in verdict.removals:
        assert f"same voxels as {first[digest[removal.key]]}," in removal.reason
        assert "listed as two participants" in removal.reason
        assert removal.measured == (digest == digest[removal.key]).sum()


def test_a_copy_in_another_data_set_is_a_duplicate(tmp_path):
    table = table_of(["x", "y", "x"], ["openbhb", "openbhb", "abide"])
    verdict = find_outliers(table, write_parts(tmp_path, volumes(0)[:3], []), Quality(), paths(table))
    (removal,) = verdict.removals
    assert removal.key == "openbhb_sub-00_ses-1"
    assert "same voxels as abide_sub-02_ses-1" in removal.reason


def test_a_copy_of_a_scan_in_the_shards_is_a_duplicate(tmp_path):
    table = table_of(["x", "y", "z"])
    known = {"y": StoredScan("old_sub-9_ses-1", "downstream")}
    verdict = find_outliers(table, write_parts(tmp_path, volumes(0)[:3], []), Quality(), paths(table), known)
    assert [(removal.key, removal.rule) for removal in verdict.removals] == [("a_sub-01_ses-1", "duplicate")]
    assert "old_sub-9_ses-1, which the shards hold already" in verdict.removals[0].reason


def test_duplicates_do_not_count_in_the_median(tmp_path):
    content = volumes(3)
    odd = np.random.default_rng(9).standard_normal(VOXELS).astype(np.float16)
    with_copies = np.concatenate([content, [odd] * 40])  # forty copies of one odd scan
    table = table_of([*(str(n) for n in range(SCANS)), *["odd"] * 40])
    verdict = find_outliers(table, write_parts(tmp_path, with_copies, [25]), Quality(), paths(table))
    median = np.median([*content, odd], axis=0)
    expected = [np.corrcoef(volume, median)[0, 1] for volume in with_copies]
    np.testing.assert_allclose(verdict.correlation, expected, atol=1e-6)


def test_nearly_equal_scans_are_not_outliers(tmp_path):
    pattern = np.random.default_rng(0).standard_normal(VOXELS)
    content = np.tile(pattern, (SCANS, 1))
    content[4, 0] += 0.05  # all others are equal, so the median absolute deviation is 0
    table = table_of([str(n) for n in range(SCANS)])
    assert find_outliers(table, write_parts(tmp_path, content, []), Quality(), paths(table)).removals == []


def test_a_constant_volume_has_no_correlation_and_is_not_judged(tmp_path):
    content = volumes(1)
    content[2] = 0.5
    table = table_of([str(n) for n in range(SCANS)])
    verdict = find_outliers(table, write_parts(tmp_path, content, [3]), Quality(), paths(table))
    assert np.isnan(verdict.correlation[2])
    assert "a_sub-02_ses-1" not in {removal.key for removal in verdict.removals}


@pytest.mark.jobs
def test_the_number_of_workers_does_not_change_any_file(tmp_path):
    """None builds so few scans in this process."""
    cohort = write_faulty_cohort(tmp_path / "faulty")
    here, one, two = (
        build_shards(cohort, tmp_path / f"out{workers}", scans_per_shard=5, workers=workers).root
        for workers in (None, 1, 2)
    )
    names = sorted(path.name for path in here.iterdir())
    for other in (one, two):
        assert names == sorted(path.name for path in other.iterdir())
        for name in names:
            assert (here / name).read_bytes() == (other / name).read_bytes()
