"""The sequential readers: the same contract of batches, whole epochs, exact continuation, and no silent damage."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loading.augment import PRESETS
from data_pipeline.loading.loader import TwoViewLoader
from data_pipeline.loading.stream import SEQUENTIAL, StreamSource
from data_pipeline.shards.build import build_shards
from data_pipeline.storage.manifest import Manifest
from data_pipeline.volume.intensity import zscore
from infra.errors import LoaderError, UserError

QUERY = "age > 30"


@pytest.fixture(scope="module")
def plain(cohort, tmp_path_factory):
    """The cohort in shards of plain .npy members."""
    return build_shards(cohort, tmp_path_factory.mktemp("shards") / "npy", scans_per_shard=10, workers=2, codec="npy")


CASES = [("dali", "npy"), ("stream", "npy"), ("stream", "zst"), ("dali", "zst")]


@pytest.fixture(params=CASES, ids=[f"{reader} {codec}" for reader, codec in CASES])
def case(request, plain, manifest):
    reader, codec = request.param
    return reader, plain if codec == "npy" else manifest


def loader_of(manifest, reader, **options):
    given = {"rows": manifest.rows(query=QUERY), "global_batch": 6, "buffer": 8, **options}
    return TwoViewLoader(manifest, reader=reader, **given)


def batches(manifest, reader, count, **options):
    loader = loader_of(manifest, reader, **options)
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


def test_batches_hold_what_the_contract_says_and_name_the_scan_that_they_show(case):
    reader, shards = case
    for batch in batches(shards, reader, 3, augmentation="none"):
        assert batch["views"].shape == (2, 6, 1, 14, 16, 12)
        rows = batch["scan"].numpy()
        np.testing.assert_allclose(batch["proxies"][:, 0].numpy(), shards.scans["age"].to_numpy()[rows], rtol=1e-6)
        for place, row in enumerate(rows):
            expected = zscore(shards.read_volume(int(row)))
            np.testing.assert_allclose(batch["views"][1, place, 0].numpy(), expected, atol=3e-6)


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_epoch_holds_every_chosen_scan_once_and_no_other(case, world_size):
    reader, shards = case
    rows = shards.rows(query=QUERY)
    assert 0 < len(rows) < len(shards.scans)
    epochs = [[], []]
    for rank in range(world_size):
        steps = -(-2 * len(rows) // 6)
        found = batches(shards, reader, steps, augmentation="none", rank=rank, world_size=world_size)
        seen = torch.cat([batch["scan"] for batch in found]).tolist()
        own = len(rows) * (rank + 1) // world_size - len(rows) * rank // world_size
        epochs[0] += seen[:own]
        epochs[1] += seen[own : 2 * own]
    assert sorted(epochs[0]) == sorted(epochs[1]) == rows.tolist()
    assert epochs[0] != epochs[1]
    order = [(int(shards.scans["shard"].iloc[row]), int(shards.scans["offset"].iloc[row])) for row in epochs[0]]
    assert order != sorted(order)


@pytest.mark.parametrize(("step", "workers"), [(2, 0), (9, 0), (9, 1)])
def test_continuing_equals_having_gone_on(case, step, workers):
    reader, shards = case
    first = loader_of(shards, reader)
    for _ in range(step):
        next(first)
    state = first.state_dict()
    rest = [next(first) for _ in range(3)]
    first.close()
    second = loader_of(shards, reader, workers=workers)
    second.load_state_dict(state)
    for mine in rest:
        theirs = next(second)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    second.close()


def test_another_number_of_ranks_or_another_buffer_is_refused(plain):
    state = loader_of(plain, "dali").state_dict()
    other = loader_of(plain, "dali", rank=1, world_size=2)
    with pytest.raises(
        UserError, match="loader state has world_size=1, this loader 2: a sequential reader's order dep"
    ):
        other.load_state_dict(state)
    with pytest.raises(UserError, match="loader state has buffer=8, this loader 9"):
        loader_of(plain, "dali", buffer=9).load_state_dict(state)
    with pytest.raises(UserError, match="loader state has reader=dali, this loader index"):
        TwoViewLoader(plain, rows=plain.rows(query=QUERY), global_batch=6).load_state_dict(state)


def spoilt(shards, tmp_path, row, how):
    folder = tmp_path / "spoilt"
    shutil.copytree(shards.root, folder)
    path = folder / shards.shards[int(shards.scans["shard"].iloc[row])]["name"]
    content = bytearray(path.read_bytes())
    place = int(shards.scans["offset"].iloc[row])
    if how == "payload":
        content[place + int(shards.scans["size"].iloc[row]) // 2] ^= 4
    if how == "cut":
        content = content[: place + 10]
    path.write_bytes(content)
    return Manifest.load(folder)


def test_a_spoilt_payload_is_caught_and_replaced(case, tmp_path, capsys):
    reader, shards = case
    row = int(shards.rows(query=QUERY)[5])
    loader = loader_of(spoilt(shards, tmp_path, row, "payload"), reader, augmentation="none")
    found = [next(loader) for _ in range(8)]  # an epoch and more
    loader.close()
    assert loader.bad_scans == 1
    assert row not in torch.cat([batch["scan"] for batch in found]).tolist()
    assert all(len(set(batch["scan"].tolist())) == 6 for batch in found[:6])
    for batch in found:
        for place, delivered in enumerate(batch["scan"].tolist()):
            expected = zscore(shards.read_volume(delivered))
            np.testing.assert_allclose(batch["views"][0, place, 0].numpy(), expected, atol=3e-6)
    said = capsys.readouterr().err
    assert f"scan {shards.scans['key'].iloc[row]} fails its checksum; replaced by scan" in said


def test_a_truncated_tar_never_passes_silently(case, tmp_path, capsys):
    reader, shards = case
    scans = shards.scans
    row = int(scans[scans["shard"] == 2]["offset"].nsmallest(3).index[-1])  # seven of ten are lost
    loader = loader_of(spoilt(shards, tmp_path, row, "cut"), reader, rows=shards.rows())
    with pytest.raises(LoaderError, match="scans cannot be read, more than data.max_bad_share"):
        for _ in range(16):
            next(loader)
    loader.close()
    assert scans["key"].iloc[row] in capsys.readouterr().err or loader.bad_scans > 3


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 9), st.integers(0, 3), st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_ranks_cut_each_epoch_once(scans, world_size, shards, epoch, seed):
    shard = np.sort(np.random.default_rng(seed).integers(0, shards, scans))
    numbers = np.arange(scans)

    def part(rank):
        return StreamSource(
            "stream", "", [""] * shards, [], numbers, shard, numbers, numbers, numbers, "npy", None, (1, 1, 1),
            PRESETS["none"], seed, 4, rank, world_size, 8,
        )  # fmt: skip

    parts = [part(rank).sequence(epoch) for rank in range(world_size)]
    whole = np.concatenate(parts)
    assert sorted(whole.tolist()) == list(range(scans))
    assert [len(p) for p in parts] == [part(rank).part_length for rank in range(world_size)]
    # one shard after the other, each from front to back
    runs = np.flatnonzero(np.diff(shard[whole])) + 1
    assert len(runs) + 1 == len(np.unique(shard))
    assert all(np.all(np.diff(run) > 0) for run in np.split(whole, runs))


def test_shards_of_a_codec_that_they_cannot_decode_are_refused(plain):
    foreign = SimpleNamespace(settings={"codec": "nii.gz"}, grid=plain.grid)
    with pytest.raises(
        UserError, match="data.reader=stream reads shards of codec zst, npy; these are nii.gz: use index"
    ):
        TwoViewLoader(foreign, rows=np.arange(3), global_batch=2, reader="stream")
    assert set(SEQUENTIAL) == {"stream", "dali"}
