"""The batches: what they hold, and that neither ranks, workers nor interruptions change them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data_pipeline.loader import TwoViewLoader, volumes
from data_pipeline.volume import zscore
from infra.errors import UserError


def batches(manifest, count, **options):
    settings = {"rows": manifest.rows(), "global_batch": 6, "augmentation": "default", **options}
    loader = TwoViewLoader(manifest, **settings)
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


@pytest.fixture(scope="module")
def whole(manifest):
    """Ten batches of one rank: 48 scans, so they run into the second epoch."""
    return batches(manifest, 10)


def test_a_batch_holds_what_the_contract_says(manifest, whole):
    batch = whole[0]
    assert batch["views"].shape == (2, 6, 1, 14, 16, 12)
    assert (batch["views"].dtype, batch["proxies"].dtype, batch["scan"].dtype) == (
        torch.float32,
        torch.float32,
        torch.int64,
    )
    ages = manifest.scans["age"].to_numpy()[batch["scan"].numpy()]
    np.testing.assert_allclose(batch["proxies"][:, 0].numpy(), ages, rtol=1e-6)
    assert not torch.equal(batch["views"][0], batch["views"][1])


def test_an_epoch_holds_every_scan_once(whole):
    seen = torch.cat([batch["scan"] for batch in whole[:8]])
    assert sorted(seen.tolist()) == list(range(48))


def test_without_augmentation_both_views_are_the_z_scored_scan(manifest):
    (batch,) = batches(manifest, 1, augmentation="none")
    for place, row in enumerate(batch["scan"].tolist()):
        expected = zscore(manifest.read_volume(row))
        np.testing.assert_allclose(batch["views"][0, place, 0].numpy(), expected, atol=3e-6)
    assert torch.equal(batch["views"][0], batch["views"][1])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_ranks_batches_together_are_the_same_for_every_world_size(manifest, whole, world_size):
    parts = [batches(manifest, 9, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in (0, 4, 8):
        for name, axis in (("views", 1), ("proxies", 0), ("scan", 0)):
            assert torch.equal(torch.cat([part[step][name] for part in parts], dim=axis), whole[step][name])


@pytest.mark.parametrize("step", [1, 7, 9])
def test_starting_at_a_step_equals_having_come_there(manifest, whole, step):
    (batch,) = batches(manifest, 1, start_step=step)
    assert all(torch.equal(batch[name], whole[step][name]) for name in batch)


def test_state_continues_on_another_world_size(manifest, whole):
    first = TwoViewLoader(manifest, rows=manifest.rows(), global_batch=6, augmentation="default")
    for _ in range(3):
        next(first)
    state = first.state_dict()
    first.close()
    parts = []
    for rank in range(2):
        other = TwoViewLoader(
            manifest, rows=manifest.rows(), global_batch=6, augmentation="default", rank=rank, world_size=2
        )
        other.load_state_dict(state)
        parts.append(next(other)["views"])
        other.close()
    assert torch.equal(torch.cat(parts, dim=1), whole[3]["views"])
    wrong = TwoViewLoader(manifest, rows=manifest.rows(), global_batch=6, seed=1)
    with pytest.raises(UserError, match="loader state has seed=0, this loader 1"):
        wrong.load_state_dict(state)


def test_worker_processes_change_nothing(manifest, whole):
    for mine, theirs in zip(batches(manifest, 3, workers=2), whole, strict=False):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_another_seed_gives_other_scans_and_other_views(manifest, whole):
    (other,) = batches(manifest, 1, seed=1)
    assert not torch.equal(other["scan"], whole[0]["scan"])


def test_volumes_give_every_row_once_in_order(manifest):
    rows = manifest.rows(query="age > 40")
    parts = list(volumes(manifest, rows, 5))
    assert np.array_equal(np.concatenate([part for part, _ in parts]), rows)
    assert torch.cat([batch for _, batch in parts]).shape == (len(rows), 1, 14, 16, 12)


def test_wrong_requests_are_named(manifest):
    with pytest.raises(UserError, match="split 'pretrian' is not in"):
        manifest.rows(split="pretrian")
    with pytest.raises(UserError, match="query 'agee > 3' does not work"):
        manifest.rows(query="agee > 3")
    with pytest.raises(UserError, match=r"proxy 'agee' is no column of .*\(did you mean 'age'\?\)"):
        manifest.proxies(["agee"])
    with pytest.raises(UserError, match="no scan to load"):
        TwoViewLoader(manifest, rows=manifest.rows()[:0], global_batch=2)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device='gpu' cannot be used here; allowed: cpu"):
            TwoViewLoader(manifest, rows=manifest.rows(), global_batch=2, device="gpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_views_equal_cpu_views(manifest, whole):
    for mine, theirs in zip(batches(manifest, 2, device="gpu"), whole, strict=False):
        assert torch.equal(mine["scan"].cpu(), theirs["scan"])
        torch.testing.assert_close(mine["views"].cpu(), theirs["views"], atol=2e-3, rtol=1e-3)
