"""Sequential readers: the same contract of batches, whole epochs, exact resuming, and no unnoticed damage."""

from __future__ import annotations

import copy
import re
import shutil
import tarfile
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
from data_pipeline.shards.tar import CODECS
from data_pipeline.storage.manifest import Manifest
from data_pipeline.volume.intensity import zscore
from infra.errors import LoaderError, UserError
from tests.memory import peak_bytes, reset_peak

QUERY = "age > 30"


@pytest.fixture(scope="module")
def plain(cohort, tmp_path_factory):
    """The cohort in shards with plain .npy members."""
    return build_shards(cohort, tmp_path_factory.mktemp("shards") / "npy", scans_per_shard=10, codec="npy")


CASES = [("dali", "npy"), ("stream", "npy"), ("stream", "zst"), ("dali", "zst")]


@pytest.fixture(params=CASES, ids=[f"{reader} {codec}" for reader, codec in CASES])
def case(request, plain, manifest):
    reader, codec = request.param
    return reader, plain if codec == "npy" else manifest


def loader_of(manifest, reader, **options):
    options = {"rows": manifest.rows(query=QUERY), "global_batch": 6, "buffer": 8, **options}
    return TwoViewLoader(manifest, reader=reader, **options)


def batches(manifest, reader, count, **options):
    loader = loader_of(manifest, reader, **options)
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


def test_batches_hold_views_proxies_and_row_numbers_of_the_same_scans(case):
    reader, shards = case
    for batch in batches(shards, reader, 3, augmentation="none"):
        assert batch["views"].shape == (2, 6, 1, 14, 16, 12)
        rows = batch["scan"].numpy()
        np.testing.assert_allclose(batch["proxies"][:, 0].numpy(), shards.scans["age"].to_numpy()[rows], rtol=1e-6)
        for place, row in enumerate(rows):
            expected = zscore(shards.read_volume(int(row)))
            np.testing.assert_allclose(batch["views"][1, place, 0].numpy(), expected, atol=3e-6)


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_epoch_holds_exactly_the_chosen_scans_once(case, world_size):
    reader, shards = case
    rows = shards.rows(query=QUERY)
    assert 0 < len(rows) < len(shards.scans)
    epochs = [[], []]
    for rank in range(world_size):
        steps = -(-2 * len(rows) // 6)
        rank_batches = batches(shards, reader, steps, augmentation="none", rank=rank, world_size=world_size)
        seen = torch.cat([batch["scan"] for batch in rank_batches]).tolist()
        per_epoch = len(rows) * (rank + 1) // world_size - len(rows) * rank // world_size
        epochs[0] += seen[:per_epoch]
        epochs[1] += seen[per_epoch : 2 * per_epoch]
    assert sorted(epochs[0]) == sorted(epochs[1]) == rows.tolist()
    assert epochs[0] != epochs[1]
    order = [(int(shards.scans["shard"].iloc[row]), int(shards.scans["offset"].iloc[row])) for row in epochs[0]]
    assert order != sorted(order)


@pytest.mark.parametrize(("step", "workers"), [(2, 0), (9, 0), (9, 1)])
def test_resuming_equals_an_uninterrupted_run(case, step, workers):
    reader, shards = case
    first = loader_of(shards, reader)
    for _ in range(step):
        next(first)
    state = first.state_dict()
    uninterrupted = [next(first) for _ in range(3)]
    first.close()
    second = loader_of(shards, reader, workers=workers)
    second.load_state_dict(state)
    for expected in uninterrupted:
        batch = next(second)
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
    second.close()


def test_a_state_of_another_number_of_ranks_or_another_buffer_is_rejected(plain):
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


def damaged_copy(shards, tmp_path, row, damage):
    """A copy of the shards in which a scan's payload has one wrong bit, or its shard ends inside the payload."""
    folder = tmp_path / "damaged"
    shutil.copytree(shards.root, folder)
    path = folder / shards.shards[int(shards.scans["shard"].iloc[row])]["name"]
    content = bytearray(path.read_bytes())
    offset = int(shards.scans["offset"].iloc[row])
    if damage == "bit":
        content[offset + int(shards.scans["size"].iloc[row]) // 2] ^= 4
    else:
        content = content[: offset + 10]
    path.write_bytes(content)
    return Manifest.load(folder)


def test_a_payload_with_a_wrong_bit_is_found_and_replaced(case, tmp_path, capsys):
    reader, shards = case
    row = int(shards.rows(query=QUERY)[5])
    loader = loader_of(damaged_copy(shards, tmp_path, row, "bit"), reader, augmentation="none")
    delivered = [next(loader) for _ in range(8)]  # more than an epoch
    loader.close()
    assert loader.bad_scans == 1
    assert row not in torch.cat([batch["scan"] for batch in delivered]).tolist()
    assert all(len(set(batch["scan"].tolist())) == 6 for batch in delivered[:6])
    for batch in delivered:
        for place, scan in enumerate(batch["scan"].tolist()):
            expected = zscore(shards.read_volume(scan))
            np.testing.assert_allclose(batch["views"][0, place, 0].numpy(), expected, atol=3e-6)
    printed = capsys.readouterr().err
    assert f"scan {shards.scans['key'].iloc[row]} fails its checksum; replaced by scan" in printed


def test_scans_behind_the_end_of_a_truncated_tar_are_reported_and_never_delivered(case, tmp_path, capsys):
    reader, shards = case
    in_shard = shards.scans[shards.scans["shard"] == 2].sort_values("offset")
    lost = in_shard[2:]
    damaged = damaged_copy(shards, tmp_path, int(lost.index[0]), "truncated")
    loader = loader_of(damaged, reader, rows=shards.rows(), max_bad_share=1.0)
    delivered = torch.cat([next(loader)["scan"] for _ in range(8)])  # 48 scans: one epoch
    loader.close()
    assert not set(delivered.tolist()) & set(lost.index)
    reported = set(re.findall(r", scan (\S+) .*; replaced by scan", capsys.readouterr().err))
    if reader == "stream":
        assert reported == set(lost["key"])
        assert loader.bad_scans == len(lost) == 8
    else:  # DALI's reader cannot continue after an error: it loses what it has read ahead and the rest of the epoch
        source = loader._source
        keys = [source.keys[index] for index in source.sequence(0)]
        first_lost = keys.index(lost["key"].iloc[0])
        assert reported >= set(keys[first_lost:])
        delivered_before = keys[: first_lost - source.buffer - 2 * source.batch]
        assert len(delivered_before) == 10
        assert reported.isdisjoint(delivered_before)
        assert loader.bad_scans == len(reported)


def test_a_truncated_tar_stops_the_run_unless_the_recipe_allows_it(case, tmp_path):
    reader, shards = case
    in_shard = shards.scans[shards.scans["shard"] == 2].sort_values("offset")
    loader = loader_of(damaged_copy(shards, tmp_path, int(in_shard.index[2]), "truncated"), reader, rows=shards.rows())
    with pytest.raises(LoaderError, match="scans cannot be read, more than data.max_bad_share"):
        for _ in range(16):
            next(loader)
    loader.close()


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 9), st.integers(0, 3), st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_the_ranks_divide_each_epoch_among_them(scans, world_size, shards, epoch, seed):
    shard = np.sort(np.random.default_rng(seed).integers(0, shards, scans))
    numbers = np.arange(scans)

    def part(rank):
        return StreamSource(
            kind="stream", root="", shards=[""] * shards, keys=[], rows=numbers, shard=shard, offset=numbers, size=numbers,
            crc32c=numbers, codec="npy", reader=None, shape=(1, 1, 1), settings=PRESETS["none"], seed=seed, batch=4,
            rank=rank, world_size=world_size, buffer=8,
        )  # fmt: skip

    parts = [part(rank).sequence(epoch) for rank in range(world_size)]
    whole = np.concatenate(parts)
    assert sorted(whole.tolist()) == list(range(scans))
    assert [len(p) for p in parts] == [part(rank).scans_per_epoch for rank in range(world_size)]
    # One shard after the other, each from front to back.
    runs = np.flatnonzero(np.diff(shard[whole])) + 1
    assert len(runs) + 1 == len(np.unique(shard))
    assert all(np.all(np.diff(run) > 0) for run in np.split(whole, runs))


def sparse_member(name, size):
    """The 512 bytes of a GNU sparse member that claims ``size`` bytes and has none."""
    member = tarfile.TarInfo(name)
    member.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"00000000000\0" * 2  # a block of no bytes
    header[482:495] = b"\0" + b"%011o\0" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def test_a_sparse_member_of_the_name_of_a_scan_takes_no_memory(case, tmp_path, capsys):
    reader, shards = case
    folder = tmp_path / "sparse"
    shutil.copytree(shards.root, folder)
    rows = shards.rows(query=QUERY)
    scan = shards.scans.iloc[int(rows[0])]
    path = folder / str(shards.shards[int(scan["shard"])]["name"])
    name = f"{scan['key']}.{CODECS[str(shards.settings['codec'])]}"
    path.write_bytes(sparse_member(name, 6 * 2**30) + path.read_bytes())
    with tarfile.open(path) as tar:
        assert tar.getmember(name).size < 2**30 < 6 * 2**30 == tar.getmembers()[0].size
    table = shards.scans.copy()
    table.loc[table["shard"] == scan["shard"], "offset"] += 512
    moved = copy.copy(shards)
    moved.root, moved.url, moved.scans = folder, str(folder), table
    reset_peak()
    before = peak_bytes()
    seen = [
        row for batch in batches(moved, reader, len(rows) // 6, augmentation="none") for row in batch["scan"].tolist()
    ]
    assert set(seen) <= set(rows.tolist())
    assert peak_bytes() - before < 2**30
    assert "bad" not in capsys.readouterr().err


def test_shards_with_an_unsupported_codec_are_rejected(plain):
    foreign = SimpleNamespace(settings={"codec": "nii.gz"}, grid=plain.grid)
    with pytest.raises(
        UserError, match="data.reader=stream reads shards of codec zst, npy; these have nii.gz: set data.reader=index"
    ):
        TwoViewLoader(foreign, rows=np.arange(3), global_batch=2, reader="stream")
    assert set(SEQUENTIAL) == {"stream", "dali"}
