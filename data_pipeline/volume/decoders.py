"""From the bytes of a shard's member to a volume: what yaware writes, and what other tools put into WebDataset shards."""

from __future__ import annotations

import gzip
import io
import math
from collections.abc import Callable

import nibabel
import numpy as np
import zstandard

from data_pipeline.volume.load import Array, to_float16, turned

# What follows the first dot of a member's name, and the codec that the manifest gives it.
ENDINGS = {"npy.zst": "zst", "npy": "npy", "npy.gz": "npy.gz", "nii.gz": "nii.gz", "nii": "nii"}


def decode(payload: bytes, codec: str, orientation: str = "RAS") -> Array:
    """A member's voxels as (D, H, W) float16; ValueError for an array that is not one volume.

    ``orientation``: the order in which arrays without a header were stored; what has a header is turned by that.
    """
    array, affine = DECODERS[codec](payload)
    volume = as_volume(array)
    return volume if affine is not None else turned(volume, orientation)


def as_volume(array: Array) -> Array:
    """(..., D, H, W) of any real type with leading axes of length 1 -> (D, H, W) float16, C order, as ``to_float16``."""
    while array.ndim > 3 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 3:
        raise ValueError(f"shape {array.shape} is not one 3D volume")
    if array.dtype != np.float16:
        return to_float16(np.array(array, dtype=np.float32))
    return np.ascontiguousarray(array)


def _npy(raw: bytes | Array) -> tuple[Array, Array | None]:
    """The array that lies in ``raw`` behind its header, without a copy: writable where ``raw`` is."""
    head = io.BytesIO(bytes(raw[:HEADER_BYTES]))
    version = np.lib.format.read_magic(head)
    if version not in _HEADERS:
        raise ValueError(f".npy version {version} is not 1.0 or 2.0")
    shape, fortran, dtype = _HEADERS[version](head)
    if dtype.hasobject:
        raise ValueError(f"an array of {dtype} would be a pickle; numbers are needed")
    flat = np.frombuffer(raw, dtype, math.prod(shape), head.tell())
    return (flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)), None


HEADER_BYTES = 1 << 16
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def _unpack_zstd(payload: bytes) -> bytes:
    # A frame written as a stream does not say how long it is; a file may also hold several frames.
    with zstandard.ZstdDecompressor().stream_reader(payload, read_across_frames=True) as stream:
        return stream.read()


def _npy_zst(payload: bytes) -> tuple[Array, Array | None]:
    size = zstandard.get_frame_parameters(payload).content_size
    return _npy(_unpack_zstd(payload) if size in (0, zstandard.CONTENTSIZE_UNKNOWN) else _one_frame(payload, size))


def _one_frame(payload: bytes, size: int) -> Array:
    # Straight into the memory in which the voxels stay: a copy of 4 MB would add a sixth to the time of decoding.
    raw = np.empty(size, np.uint8)
    with zstandard.ZstdDecompressor().stream_reader(payload) as stream:
        found = stream.readinto(raw)
    if found != size:
        raise ValueError(f"a zstd frame of {size} bytes ends after {found}")
    return raw


def _nifti(raw: bytes) -> tuple[Array, Array | None]:
    # The first number of a header is its size: 348 in NIfTI-1, 540 in NIfTI-2, in either byte order.
    second = 540 in (int.from_bytes(raw[:4], order) for order in ("little", "big"))
    kind = nibabel.Nifti2Image if second else nibabel.Nifti1Image
    image = nibabel.as_closest_canonical(kind.from_bytes(raw))
    if len(image.shape) == 4 and image.shape[3] == 1:
        image = nibabel.squeeze_image(image)
    return np.asarray(image.dataobj, dtype=np.float32), np.asarray(image.affine)


# Each gives the array as stored and, where the format has one, the RAS affine of the array as given.
DECODERS: dict[str, Callable[[bytes], tuple[Array, Array | None]]] = {
    "zst": _npy_zst,
    "npy": _npy,
    "npy.gz": lambda payload: _npy(gzip.decompress(payload)),
    "nii": _nifti,
    "nii.gz": lambda payload: _nifti(gzip.decompress(payload)),
}
