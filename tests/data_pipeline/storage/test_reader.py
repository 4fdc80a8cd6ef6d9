"""Reading single scans: the same voxels with every codec, few open files, and errors that name the place."""

from __future__ import annotations

import gzip
import io
import pickle
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from data_pipeline.shards.tar import encode
from data_pipeline.storage import open_files
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
