"""Reading single scans: the same voxels with every codec, few open files, and errors that name the place."""

from __future__ import annotations

import gzip
import io
import pickle
import subprocess
import sys
from pathlib import Path

import google_crc32c
import nibabel
import numpy as np
import pandas as pd
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from data_pipeline.shards.tar import encode
from data_pipeline.storage import open_files, pieces
from data_pipeline.storage.manifest import VolumeReader
from data_pipeline.volume.decoders import DECODERS, as_volume, decode
from data_pipeline.volume.grid import Grid
from data_pipeline.volume.load import load_volume


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def streamed_zstd(raw: bytes) -> bytes:
    """Two frames without their content size."""
    half = len(raw) // 2
    frames = []
    for part in (raw[:half], raw[half:]):
        packer = zstandard.ZstdCompressor().compressobj()
        frames.append(packer.compress(part) + packer.flush())
    return b"".join(frames)


PACK = {
    "npy": npy,
    "npy.gz": lambda a: gzip.compress(npy(a)),
    "zst": lambda a: zstandard.ZstdCompressor().compress(npy(a)),
    "zst in frames": lambda a: streamed_zstd(npy(a)),
    "nii": lambda a: nibabel.Nifti1Image(a, np.eye(4)).to_bytes(),
    "nii.gz": lambda a: gzip.compress(nibabel.Nifti1Image(a, np.eye(4)).to_bytes()),
    "nii two": lambda a: nibabel.Nifti2Image(a, np.eye(4)).to_bytes(),
}


@pytest.mark.parametrize("how", PACK)
def test_every_codec_gives_the_same_voxels(how):
    voxels = np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float32)
    decoded = decode(PACK[how](voxels), how.split(" ")[0])
    assert decoded.dtype == np.float16
    assert decoded.flags["C_CONTIGUOUS"]
    assert np.array_equal(decoded, voxels.astype(np.float16))
    assert {name.split(" ")[0] for name in PACK} == set(DECODERS)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int16, np.uint8, ">f4", ">i2"])
@pytest.mark.parametrize("leading", [(), (1,), (1, 1)])
def test_leading_axes_of_length_one_are_dropped_and_every_type_becomes_float16(dtype, leading):
    voxels = np.arange(60).reshape(3, 4, 5).astype(dtype)
    decoded = decode(npy(np.asfortranarray(voxels).reshape(*leading, 3, 4, 5)), "npy")
    assert (decoded.shape, decoded.dtype) == ((3, 4, 5), np.float16)
    assert np.array_equal(decoded.astype(float), voxels.astype(float))


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4, 5), (1, 2, 3, 4, 5)])
def test_an_array_that_is_not_one_volume_is_rejected_with_its_shape(shape):
    with pytest.raises(ValueError, match=r"is not one 3D volume"):
        as_volume(np.zeros(shape))


def test_an_array_of_objects_is_never_unpickled():
    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="would be a pickle"):
        decode(stream.getvalue(), "npy")


@settings(max_examples=60, deadline=None)
@given(arrays.arrays(np.float32, (2, 3, 2), elements=st.floats(-1e7, 1e7, width=32)))
def test_values_beyond_float16_are_scaled_by_a_power_of_two_as_load_volume_does(tmp_path_factory, voxels):
    scaled = as_volume(voxels).astype(np.float64)
    assert np.isfinite(scaled).all()
    peak = np.abs(voxels).max()
    factor = 2.0 ** min(0, np.floor(np.log2(32768.0 / peak))) if peak > 32768 else 1.0
    np.testing.assert_allclose(scaled, voxels.astype(np.float64) * factor, rtol=1e-3, atol=1e-7)
    if voxels.min() < voxels.max():
        path = tmp_path_factory.mktemp("scan") / "scan.nii"
        nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)
        assert np.array_equal(load_volume(path, Grid.of((2, 3, 2), np.eye(4))), as_volume(voxels))


def test_a_nifti_member_is_reoriented_to_ras():
    voxels = np.random.default_rng(1).normal(size=(4, 5, 6)).astype(np.float32)
    turned = nibabel.Nifti1Image(voxels[::-1], np.array([[-1, 0, 0, 3], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]))
    assert np.array_equal(decode(turned.to_bytes(), "nii"), voxels.astype(np.float16))


def count_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_reader_opens_few_files_and_a_pickled_one_opens_its_own(manifest, monkeypatch):
    monkeypatch.setattr(open_files, "MAX_OPEN", 2)
    reader = manifest.reader()
    expected = [manifest.read_volume(row) for row in range(48)]
    before = count_open_files()
    for row in (0, 11, 22, 33, 44, 5, 47, 0):
        assert np.array_equal(reader.read(row), expected[row])
    assert count_open_files() - before <= 2
    other = pickle.loads(pickle.dumps(reader))
    assert isinstance(other, VolumeReader)
    assert np.array_equal(other.read(17), expected[17])
    del reader, other
    assert count_open_files() <= before


RAW = [
    np.random.default_rng(row).normal(size=(3, 4, 5)).astype(kind) for row, kind in enumerate((np.float16, "f4", ">i2"))
]


def reader_of_raw_arrays(folder: Path) -> VolumeReader:
    """Three .npy files one after another, behind 11 bytes of something else."""
    members = [npy(volume) for volume in RAW]
    (folder / "a.tar").write_bytes(b"x" * 11 + b"".join(members))
    keys = pd.DataFrame({"key": [f"scan-{row}" for row in range(3)]})
    keys.to_parquet(folder / "scans.parquet")
    sizes = np.array([len(member) for member in members])
    sums = np.array([google_crc32c.value(member) for member in members])
    return VolumeReader(
        root=str(folder), names=["a.tar"], shard=np.zeros(3, np.int64), offset=11 + np.cumsum(sizes) - sizes, size=sizes,
        crc32c=sums, codecs=["npy"], table=str(folder / "scans.parquet"), voxels=60,
    )  # fmt: skip


@pytest.mark.parametrize("piece", [1, 100, 188, 248, 1 << 20])
def test_raw_arrays_of_a_shard_are_read_in_pieces_into_memory_of_their_own(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(pieces, "PIECE", piece)
    reader = reader_of_raw_arrays(tmp_path)
    for row, volume in enumerate(RAW):
        found = reader.read(row)
        assert np.array_equal(found, volume.astype(np.float16))
        found += 1  # writable, and no other reader's
        assert np.array_equal(reader.read(row), volume.astype(np.float16))
    intact = (tmp_path / "a.tar").read_bytes()
    end = int(reader.offset[1] + reader.size[1])
    for position in range(int(reader.offset[1]), end):
        damaged = bytearray(intact)
        damaged[position] ^= 1
        (tmp_path / "a.tar").write_bytes(damaged)
        with pytest.raises(OSError, match=r"^shard a.tar, scan scan-1 fails its checksum; run `yaware shards verify"):
            reader.read(1)
        assert np.array_equal(reader.read(2), RAW[2].astype(np.float16))
    for length in (end, len(intact) - 1):
        (tmp_path / "a.tar").write_bytes(intact[:length])
        with pytest.raises(OSError, match=r"^shard a.tar, scan scan-2 is truncated; run"):
            reader.read(2)
        assert np.array_equal(reader.read(1), RAW[1].astype(np.float16))


def test_local_shards_are_read_without_fsspec(manifest):
    code = (
        "import sys; from data_pipeline import Manifest; "
        f"Manifest.load({str(manifest.root)!r}).read_volume(3); "
        "print([m for m in ('aiohttp', 's3fs', 'data_pipeline.loading.dali_graph') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_decode_inverts_encode():
    voxels = np.random.default_rng(2).normal(size=(4, 5, 6)).astype(np.float16)
    for codec in ("zst", "npy"):
        assert np.array_equal(decode(encode(voxels, codec), codec), voxels)
