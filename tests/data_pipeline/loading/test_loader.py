"""Batches: what they hold, and that ranks, workers and interruptions do not change them."""

from __future__ import annotations

import shutil
import threading
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.loading.balance import build_order
from data_pipeline.loading.loader import TwoViewLoader, volumes
from data_pipeline.loading.order import EveryScan, batch_of
from data_pipeline.loading.source import sample_bytes
from data_pipeline.storage.manifest import Manifest
from data_pipeline.volume.intensity import zscore
from infra.errors import LoaderError, UserError
from tests.readers import reader_pids


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


def test_a_batch_holds_two_views_proxies_and_row_numbers(manifest, whole):
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
def test_starting_at_a_step_gives_the_batch_of_an_uninterrupted_run(manifest, whole, step):
    (batch,) = batches(manifest, 1, start_step=step)
    assert all(torch.equal(batch[name], whole[step][name]) for name in batch)


def test_a_state_can_be_resumed_on_another_number_of_ranks(manifest, whole):
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


def test_reader_processes_do_not_change_the_batches(manifest, whole):
    for batch, expected in zip(batches(manifest, 3, workers=2), whole, strict=False):
        assert all(torch.equal(batch[name], expected[name]) for name in batch)


def test_memory_of_the_reader_processes_is_bounded_and_does_not_grow(manifest):
    loader = TwoViewLoader(manifest, rows=manifest.rows(), global_batch=6, workers=2, prefetch=3)
    next(loader)
    bound = loader.shared_bytes
    assert bound == 4 * 6 * sample_bytes(loader._source.settings, (14, 16, 12))
    for _ in range(12):
        next(loader)
    assert loader.shared_bytes == bound
    for pid in reader_pids(loader):  # a process maps its own block of shared memory only
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        spans = [line.split()[0].split("-") for line in lines if "memfd:yaware" in line]
        assert sum(int(end, 16) - int(start, 16) for start, end in spans) <= bound / 2 + 4096
    loader.close()


def test_the_next_batch_is_fetched_while_the_current_one_is_used(manifest):
    loader = TwoViewLoader(manifest, rows=manifest.rows(), global_batch=6, workers=1)
    first, next_views = next(loader), loader._next_views
    kept = first["views"].clone()
    ready = next_views.result(timeout=60)  # without another call of next
    assert torch.equal(first["views"], kept), "the batch in use was written to"
    assert next(loader)["views"] is ready
    state = loader.state_dict()
    assert state["step"] == 2, "a batch that is fetched ahead does not count as delivered"
    loader.load_state_dict({**state, "step": 0})
    assert torch.equal(next(loader)["views"], kept), (
        "a batch that was fetched before loading a state must not be delivered"
    )
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]
    in_process = TwoViewLoader(manifest, rows=manifest.rows(), global_batch=6)
    next(in_process)
    assert in_process._thread is None
    in_process.close()


def test_reader_processes_end_with_the_loader(manifest):
    loader = TwoViewLoader(manifest, rows=manifest.rows(), global_batch=6, workers=2)
    next(loader)
    pids = reader_pids(loader)
    assert len(pids) == 2
    loader.close()
    assert not any(_alive(pid) for pid in pids)


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_the_time_spent_waiting_for_data_is_measured(manifest):
    loader = TwoViewLoader(manifest, rows=manifest.rows(), global_batch=6)
    assert loader.wait_seconds == 0
    next(loader)
    samples = loader._source.samples

    def slow_samples(step, positions):
        time.sleep(0.3)
        return samples(step, positions)

    loader._source.samples = slow_samples
    next(loader)
    assert 0.3 <= loader.wait_seconds < 3
    loader.close()


@pytest.fixture
def damaged(manifest, tmp_path):
    """``damage(rows, how)`` returns the manifest of a copy of the shards in which some scans' bytes are damaged."""

    def damage(rows, how="flip"):
        folder = tmp_path / "damaged"
        shutil.copytree(manifest.root, folder)
        scans = manifest.scans
        for row in rows:
            path = folder / manifest.shards[int(scans["shard"].iloc[row])]["name"]
            place = int(scans["offset"].iloc[row])
            if how == "cut":
                with path.open("r+b") as stream:
                    stream.truncate(place + int(scans["size"].iloc[row]) // 2)
            else:
                content = bytearray(path.read_bytes())
                content[place + 100] ^= 1
                path.write_bytes(content)
        return Manifest.load(folder)

    return damage


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_scan_is_named_counted_and_replaced_by_the_next_in_order(manifest, whole, damaged, capsys, workers):
    order = EveryScan(48, 0, 6)
    victim = int(batch_of(order, 1, 6)[0][2])
    replacement = int(batch_of(order, 2, 6)[0][2])
    broken = damaged([victim])
    delivered = batches(broken, 4, workers=workers)
    assert delivered[1]["scan"].tolist() == [replacement if r == victim else r for r in whole[1]["scan"].tolist()]
    ages = manifest.scans["age"].to_numpy()[delivered[1]["scan"].numpy()]
    np.testing.assert_allclose(delivered[1]["proxies"][:, 0].numpy(), ages, rtol=1e-6)
    for step in (0, 2, 3):
        assert all(torch.equal(delivered[step][name], whole[step][name]) for name in whole[step])
    others = [place for place in range(6) if place != 2]
    assert torch.equal(delivered[1]["views"][:, others], whole[1]["views"][:, others])
    printed = capsys.readouterr().err
    keys = manifest.scans["key"]
    assert printed.count("\n") == 1
    assert f"step 1: shard {manifest.shards[int(manifest.scans['shard'].iloc[victim])]['name']}, scan" in printed
    assert f"scan {keys.iloc[victim]} fails its checksum" in printed
    assert f"replaced by scan {keys.iloc[replacement]} (1 bad so far)" in printed


def test_the_voxels_of_the_replacement_are_delivered(manifest, damaged):
    victim = int(batch_of(EveryScan(48, 0, 6), 0, 6)[0][0])
    (batch,) = batches(damaged([victim]), 1, augmentation="none")
    row = int(batch["scan"][0])
    np.testing.assert_allclose(batch["views"][0, 0, 0].numpy(), zscore(manifest.read_volume(row)), atol=3e-6)
    assert row != victim


def test_replacements_are_the_same_for_every_number_of_ranks(manifest, damaged):
    numbers = batch_of(EveryScan(48, 0, 6), 1, 6)[0]
    broken = damaged([int(numbers[1]), int(numbers[4])])
    (alone,) = batches(broken, 1, start_step=1)
    for world_size in (2, 3):
        parts = [batches(broken, 1, start_step=1, rank=r, world_size=world_size)[0] for r in range(world_size)]
        assert torch.equal(torch.cat([part["scan"] for part in parts]), alone["scan"])
        assert torch.equal(torch.cat([part["views"] for part in parts], dim=1), alone["views"])
    assert len(set(alone["scan"].tolist())) == 6


def test_a_truncated_shard_loses_its_last_scans_and_each_is_counted_once(manifest, damaged):
    scans = manifest.scans
    last = scans[scans["shard"] == 1]["offset"].nlargest(2).index[-1]
    loader = TwoViewLoader(damaged([last], "cut"), rows=manifest.rows(), global_batch=6)
    rows = [next(loader)["scan"].tolist() for _ in range(24)]  # three epochs
    assert loader.bad_scans == 2
    assert not {int(last), int(scans[scans["shard"] == 1]["offset"].idxmax())} & set(chain(*rows))
    loader.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_unreadable_scans_stop_the_run_with_one_line(manifest, damaged, workers):
    broken = damaged(range(0, 48, 2))
    loader = TwoViewLoader(broken, rows=manifest.rows(), global_batch=6, workers=workers)
    text = r"[4-9] of the first \d+ scans cannot be read, more than data.max_bad_share=0.001 allows; run `yaware shards verify"
    with pytest.raises(LoaderError, match=text):
        for _ in range(8):
            next(loader)
    loader.close()


def test_a_larger_allowed_share_lets_the_run_continue(manifest, damaged):
    broken = damaged(range(0, 48, 8))  # six of 48
    loader = TwoViewLoader(broken, rows=manifest.rows(), global_batch=6, max_bad_share=0.5)
    for _ in range(8):
        next(loader)
    assert loader.bad_scans == 6
    loader.close()


def test_missing_shards_stop_the_run_and_are_named(manifest, damaged):
    broken = damaged([])
    for path in broken.root.glob("*.tar"):
        path.unlink()
    loader = TwoViewLoader(broken, rows=manifest.rows(), global_batch=6)
    with pytest.raises(LoaderError, match=r"step 0: 14 scans in a row cannot be read; the first: .*\.tar"):
        next(loader)
    loader.close()


@pytest.mark.parametrize("balance", [{"by": "site"}, {"by": "age", "bins": 10.0}, {"one_session_per_subject": True}])
def test_balanced_orders_decide_the_batches_on_any_number_of_ranks(manifest, balance):
    rows = manifest.rows()
    order = build_order(manifest, rows, seed=0, batch=6, **balance)
    parts = [batches(manifest, 5, order=order, rank=rank, world_size=2) for rank in range(2)]
    for step, (first, second) in enumerate(zip(*parts, strict=True)):
        together = torch.cat([first["scan"], second["scan"]]).numpy()
        assert np.array_equal(together, rows[batch_of(order, step, 6)[0]])
    (later,) = batches(manifest, 1, order=order, start_step=4)
    assert torch.equal(later["views"], torch.cat([parts[0][4]["views"], parts[1][4]["views"]], dim=1))


def test_another_seed_gives_other_scans_and_other_views(manifest, whole):
    (other,) = batches(manifest, 1, seed=1)
    assert not torch.equal(other["scan"], whole[0]["scan"])


def test_volumes_give_every_row_once_in_order(manifest):
    rows = manifest.rows(query="age > 40")
    parts = list(volumes(manifest, rows, 5))
    assert np.array_equal(np.concatenate([part for part, _ in parts]), rows)
    assert torch.cat([batch for _, batch in parts]).shape == (len(rows), 1, 14, 16, 12)


def test_invalid_arguments_are_named(manifest):
    with pytest.raises(UserError, match="split 'pretrian' is not in"):
        manifest.rows(split="pretrian")
    with pytest.raises(UserError, match="query 'agee > 3' fails on"):
        manifest.rows(query="agee > 3")
    with pytest.raises(UserError, match=r"proxy 'agee' is not a column of .*\(did you mean 'age'\?\)"):
        manifest.proxies(["agee"])
    with pytest.raises(UserError, match="no scan is selected"):
        TwoViewLoader(manifest, rows=manifest.rows()[:0], global_batch=2)
    with pytest.raises(UserError, match=r"data.reader='indx' is not known \(did you mean 'index'\?\)"):
        TwoViewLoader(manifest, rows=manifest.rows(), global_batch=2, reader="indx")
    with pytest.raises(UserError, match="data.balance needs data.reader: index, found dali"):
        order = build_order(manifest, manifest.rows(), seed=0, batch=2, by="site")
        TwoViewLoader(manifest, rows=manifest.rows(), global_batch=2, reader="dali", order=order)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device='gpu' is not available on this machine; allowed: cpu"):
            TwoViewLoader(manifest, rows=manifest.rows(), global_batch=2, device="gpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_views_equal_cpu_views(manifest, whole):
    for on_gpu, on_cpu in zip(batches(manifest, 2, device="gpu"), whole, strict=False):
        assert torch.equal(on_gpu["scan"].cpu(), on_cpu["scan"])
        torch.testing.assert_close(on_gpu["views"].cpu(), on_cpu["views"], atol=2e-3, rtol=1e-3)
