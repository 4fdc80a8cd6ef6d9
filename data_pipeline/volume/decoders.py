"""Decode the members of shards to volumes: yaware's own, and those that other tools write into WebDataset shards."""

from __future__ import annotations

import gzip
import io
import math
from collections.abc import Callable
from typing import Any

import nibabel
import numpy as np
import zstandard
from numpy.typing import NDArray

from data_pipeline.volume.intensity import to_float16
from data_pipeline.volume.resample import reorient

# The part of a member's name after the first dot -> its codec in the manifest.
ENDINGS = {"npy.zst": "zst", "npy": "npy", "npy.gz": "npy.gz", "nii.gz": "nii.gz", "nii": "nii"}


def decode(payload: bytes, codec: str, orientation: str = "RAS") -> NDArray[np.float16]:
    """Decode a member to a volume.

    Args:
        payload: the bytes of the member.
        codec: a key of ``DECODERS``.
        orientation: of the stored axes of arrays; NIfTI files are reoriented by their headers instead.

    Returns:
        (D, H, W) float16 in RAS.

    Raises:
        ValueError: the member is not one 3D volume of numbers.
    """
    array, affine = DECODERS[codec](payload)
    volume = as_volume(array)
    return volume if affine is not None else reorient(volume, orientation)


def as_volume(array: NDArray[Any]) -> NDArray[np.float16]:
    """Convert a real array to (D, H, W) float16 in C order, as ``to_float16`` does.

    Leading axes of length 1 are removed. Raises ValueError if the array is not one 3D volume.
    """
    while array.ndim > 3 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 3:
        raise ValueError(f"shape {array.shape} is not one 3D volume")
    if array.dtype != np.float16:
        return to_float16(np.array(array, dtype=np.float32))
    return np.ascontiguousarray(array)


def _npy(raw: bytes | NDArray[np.uint8]) -> tuple[NDArray[Any], None]:
    """The array in the bytes of an .npy file, without a copy: writable if ``raw`` is."""
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
    # A streamed frame does not state its size, and a file may hold several frames.
    with zstandard.ZstdDecompressor().stream_reader(payload, read_across_frames=True) as stream:
        return stream.read()


def _npy_zst(payload: bytes) -> tuple[NDArray[Any], None]:
    size = zstandard.get_frame_parameters(payload).content_size
    return _npy(_unpack_zstd(payload) if size in (0, zstandard.CONTENTSIZE_UNKNOWN) else _one_frame(payload, size))


def _one_frame(payload: bytes, size: int) -> NDArray[np.uint8]:
    # Directly into the memory in which the voxels stay: a copy of 4 MB would add a sixth to the decoding time.
    raw = np.empty(size, np.uint8)
    with zstandard.ZstdDecompressor().stream_reader(payload) as stream:
        read = stream.readinto(raw)
    if read != size:
        raise ValueError(f"a zstd frame of {size} bytes ends after {read}")
    return raw


def _nifti(raw: bytes) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    # A header begins with its own size in either byte order: 348 in NIfTI-1, 540 in NIfTI-2.
    is_nifti2 = 540 in (int.from_bytes(raw[:4], order) for order in ("little", "big"))
    image_class = nibabel.Nifti2Image if is_nifti2 else nibabel.Nifti1Image
    image = nibabel.as_closest_canonical(image_class.from_bytes(raw))
    if len(image.shape) == 4 and image.shape[3] == 1:
        image = nibabel.squeeze_image(image)
    return np.asarray(image.dataobj, dtype=np.float32), np.asarray(image.affine)


# Codec -> function from bytes to the array and its affine: NIfTI in RAS with an affine, .npy as stored with None.
DECODERS: dict[str, Callable[[bytes], tuple[NDArray[Any], NDArray[np.float64] | None]]] = {
    "zst": _npy_zst,
    "npy": _npy,
    "npy.gz": lambda payload: _npy(gzip.decompress(payload)),
    "nii": _nifti,
    "nii.gz": lambda payload: _nifti(gzip.decompress(payload)),
}
