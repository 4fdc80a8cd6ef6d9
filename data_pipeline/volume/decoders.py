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
from data_pipeline.volume.limits import MAX_VOXELS, largest_member
from data_pipeline.volume.resample import reorient

# The part of a member's name after the first dot -> its codec in the manifest.
ENDINGS = {"npy.zst": "zst", "npy": "npy", "npy.gz": "npy.gz", "nii.gz": "nii.gz", "nii": "nii"}


def decode(
    payload: bytes | NDArray[np.uint8], codec: str, orientation: str = "RAS", voxels: int = MAX_VOXELS
) -> NDArray[np.float16]:  # fmt: skip
    """Decode a member to a volume.

    Args:
        payload: the bytes of the member, as an array only with the codec ``npy``, whose volume then shares its memory.
        codec: a key of ``DECODERS``.
        orientation: of the stored axes of arrays; NIfTI files are reoriented by their headers instead.
        voxels: of the grid. A member that claims more is refused before memory is taken for it.

    Returns:
        (D, H, W) float16 in RAS.

    Raises:
        ValueError: the member is not one 3D volume of numbers, or is larger than the grid.
    """
    array, affine = DECODERS[codec](payload, voxels)
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


def _npy(raw: bytes | NDArray[np.uint8], voxels: int) -> tuple[NDArray[Any], None]:
    """The array in the bytes of an .npy file, without a copy: writable if ``raw`` is."""
    head = io.BytesIO(bytes(raw[:HEADER_BYTES]))
    version = np.lib.format.read_magic(head)
    if version not in _HEADERS:
        raise ValueError(f".npy version {version} is not 1.0 or 2.0")
    shape, fortran, dtype = _HEADERS[version](head)
    if dtype.hasobject:
        raise ValueError(f"an array of {dtype} would be a pickle; numbers are needed")
    if dtype.kind not in "biuf" or dtype.itemsize > 16:
        raise ValueError(f"an array of {dtype}; numbers are needed")
    _check_shape(shape, voxels)
    flat = np.frombuffer(raw, dtype, math.prod(shape), head.tell())
    return (flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)), None


def _check_shape(shape: tuple[int, ...], voxels: int) -> None:
    """Raise ValueError if a header claims more voxels than the grid has, or a side that no volume has."""
    if any(type(side) is not int or side < 0 for side in shape) or len(shape) > 8 or math.prod(shape) > voxels:
        raise ValueError(f"shape {str(shape)[:80]} is larger than the grid of {voxels} voxels, or is none")


HEADER_BYTES = 1 << 16
MAX_WINDOW = 2**27  # of zstd's highest level
_HEADERS: dict[tuple[int, int], Callable[[Any], Any]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def _read_all(stream: Any, voxels: int) -> bytes:
    """Return what an unpacked stream holds. Raises ValueError, before more memory is taken, if it is more than a volume."""
    most = largest_member(voxels)
    content: bytes = stream.read(most + 1)
    if len(content) > most:
        raise ValueError(f"more than {most} bytes unpacked, the most that the grid's {voxels} voxels can take")
    return content


def _gunzip(payload: bytes, voxels: int) -> bytes:
    with gzip.GzipFile(fileobj=io.BytesIO(payload)) as stream:
        return _read_all(stream, voxels)


def _npy_zst(payload: bytes, voxels: int) -> tuple[NDArray[Any], None]:
    size = zstandard.get_frame_parameters(payload).content_size
    if size in (0, zstandard.CONTENTSIZE_UNKNOWN):
        # A streamed frame does not state its size, and a file may hold several frames.
        with _unpacker(voxels).stream_reader(payload, read_across_frames=True) as stream:
            return _npy(_read_all(stream, voxels), voxels)
    return _npy(_one_frame(payload, size, voxels), voxels)


def _one_frame(payload: bytes, size: int, voxels: int) -> NDArray[np.uint8]:
    if size > largest_member(voxels):
        raise ValueError(
            f"a zstd frame of {size} bytes; the grid's {voxels} voxels take at most {largest_member(voxels)}"
        )
    # Directly into the memory in which the voxels stay: a copy of 4 MB would add a sixth to the decoding time.
    raw = np.empty(size, np.uint8)
    with _unpacker(voxels).stream_reader(payload) as stream:
        read = stream.readinto(raw)
    if read != size:
        raise ValueError(f"a zstd frame of {size} bytes ends after {read}")
    return raw


def _unpacker(voxels: int) -> zstandard.ZstdDecompressor:
    # A frame says how much memory its unpacking takes, up to 2 GB: as much as the content, or the window of zstd's levels.
    return zstandard.ZstdDecompressor(max_window_size=max(MAX_WINDOW, largest_member(voxels)))


def _nifti(raw: bytes, voxels: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    # A header begins with its own size in either byte order: 348 in NIfTI-1, 540 in NIfTI-2.
    is_nifti2 = 540 in (int.from_bytes(raw[:4], order) for order in ("little", "big"))
    image_class = nibabel.Nifti2Image if is_nifti2 else nibabel.Nifti1Image
    image = image_class.from_bytes(raw)
    _check_shape(tuple(int(side) for side in image.shape), voxels)
    if image.get_data_dtype().kind not in "iuf":
        raise ValueError(f"voxels are of type {image.get_data_dtype()}; numbers are needed")
    image = nibabel.as_closest_canonical(image)
    if len(image.shape) == 4 and image.shape[3] == 1:
        image = nibabel.squeeze_image(image)
    return np.asarray(image.dataobj, dtype=np.float32), np.asarray(image.affine)


# Codec -> function from bytes and the grid's number of voxels to the array and its affine: NIfTI in RAS with an affine,
# .npy as stored with None.
DECODERS: dict[str, Callable[[Any, int], tuple[NDArray[Any], NDArray[np.float64] | None]]] = {
    "zst": _npy_zst,
    "npy": _npy,
    "npy.gz": lambda payload, voxels: _npy(_gunzip(payload, voxels), voxels),
    "nii": _nifti,
    "nii.gz": lambda payload, voxels: _nifti(_gunzip(payload, voxels), voxels),
}
