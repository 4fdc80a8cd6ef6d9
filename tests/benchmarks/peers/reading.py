"""The libraries of others read the scans of the read rows: webdataset, litdata and MosaicML streaming. One thread, in order."""

from __future__ import annotations

import gc
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.harness.measure import back_memory, evict, fetched_bytes, measured

MIN_SECONDS = 1.0  # of a measurement
PAGE = 4096  # bytes


Read = Callable[[], float]  # reads all scans once and returns the sum of one voxel of each


def read_all(folder: Path, reader: Callable[[], Read], scans: int, cold: bool) -> dict[str, Any]:
    """Return the seconds per scan of a reader of the files in ``folder``.

    The files leave the page cache first: how fast the kernel copies out of it depends on how it was filled, by the program
    that wrote them or, as here, by the one that reads. Cold: one pass; ``fetched`` is what came from the disk. Warm: passes for
    a second, after two that are not counted. A page that is mapped cannot leave the cache, so that ``reader`` is called anew
    after the first pass.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    stored = sum(path.stat().st_size for path in files) / scans
    read = reader()
    first = measured(read)  # opens files, loads libraries
    del read
    gc.collect()
    read = reader()
    evict(files)
    if cold:
        before = fetched_bytes()
        found = measured(read, scans)
        return {**found, "bytes": stored, "fetched": (fetched_bytes() - before) / scans}
    passes = max(1, round(MIN_SECONDS / max(first["wall"], 1e-3)))
    checked = read()

    def work() -> None:
        for _ in range(passes):
            read()

    return {**measured(work, scans * passes), "bytes": stored, "check": checked}


def voxel(volume: Any) -> float:
    """Return the voxel in the middle of a volume (D, H, W), so that a wrong decoding is seen, after a look at every page of it.

    Some libraries return arrays that are mapped to a file and not read yet.
    """
    np.ravel(volume)[:: PAGE // volume.itemsize].max()
    d, h, w = volume.shape
    return float(volume[d // 2, h // 2, w // 2])


def webdataset(data: str, cold: bool = False) -> dict[str, Any]:
    """Read our shards with webdataset, and unpack and decode them as it would."""
    import io

    import webdataset as wds
    import zstandard

    folder, scans = Path(data, "full", "shards"), count(data)
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]

    def decoded(payload: bytes) -> Any:
        return np.load(io.BytesIO(zstandard.ZstdDecompressor().decompress(payload)))

    def read() -> float:
        samples = wds.WebDataset(urls, shardshuffle=False, empty_check=False).to_tuple("npy.zst")
        return sum(voxel(decoded(payload)) for (payload,) in samples)

    return read_all(folder, lambda: read, scans, cold)


def write_litdata(data: str) -> dict[str, Any]:
    """Write the scans as a litdata dataset of raw float16 arrays."""
    from litdata.streaming.writer import BinaryWriter

    folder = Path(data, "full", "litdata")
    folder.mkdir()
    writer = BinaryWriter(str(folder), chunk_bytes="256MB")
    for index, volume in enumerate(_float16(data)):
        writer[index] = {"voxels": volume}
    writer.done()
    writer.merge()
    return {"cpu": 0.0, "wall": 0.0}


def litdata(data: str, cold: bool = False) -> dict[str, Any]:
    """Read litdata's raw float16 arrays, which it copies out of its mapped files."""
    from litdata import StreamingDataset

    folder, scans = Path(data, "full", "litdata"), count(data)

    def reader() -> Read:
        dataset = StreamingDataset(str(folder))
        return lambda: sum(voxel(dataset[i]["voxels"]) for i in range(scans))

    return read_all(folder, reader, scans, cold)


def write_streaming(data: str) -> dict[str, Any]:
    """Write the scans as MosaicML datasets of float16 arrays: raw, and packed by zstd."""
    from streaming import MDSWriter

    for name, packed in (("mds", None), ("mds-zstd", "zstd:3")):
        volumes = _float16(data)
        first = next(volumes)
        columns = {"voxels": "ndarray:float16:" + ",".join(map(str, first.shape))}
        with MDSWriter(out=str(Path(data, "full", name)), columns=columns, compression=packed) as writer:
            for volume in (first, *volumes):
                writer.write({"voxels": volume})
    return {"cpu": 0.0, "wall": 0.0}


def streaming(data: str, form: str = "raw", cold: bool = False) -> dict[str, Any]:
    """Read a MosaicML dataset: ``raw``, ``unpacked`` (packed by zstd, read once before), or ``unpacking`` (its first read)."""
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    scans = count(data)
    with tempfile.TemporaryDirectory(dir=data) as temporary:
        source = Path(data, "full", "mds" if form == "raw" else "mds-zstd")
        local = source if form == "raw" else Path(temporary, "local")
        if form != "raw":
            shutil.copytree(source, local)
        dataset = StreamingDataset(local=str(local), batch_size=1, shuffle=False)

        def read() -> float:
            return sum(voxel(dataset[i]["voxels"]) for i in range(scans))

        if form != "unpacking":
            read()
            return read_all(local, lambda: read, scans, cold)
        if cold:
            evict(path for path in local.rglob("*") if path.is_file())
        packed = sum(path.stat().st_size for path in local.glob("*.zstd*")) / scans
        checked: list[float] = []
        before = fetched_bytes()
        found = measured(lambda: checked.append(read()), scans)
        fetched = {"fetched": (fetched_bytes() - before) / scans} if cold else {}
        return {**found, "bytes": packed, "check": checked[0], **fetched}


def count(data: str) -> int:
    """Return the number of scans."""
    return len(list(Path(data, "full", "npy").glob("*.npy")))


def _float16(data: str) -> Iterator[Any]:
    for path in sorted(Path(data, "full", "npy").glob("*.npy")):
        yield np.load(path).astype(np.float16)


def write_index(data: str, scans: int) -> dict[str, Any]:
    """Write the index of a MosaicML dataset of ``scans`` scans, 256 a shard, without the shards."""
    folder = Path(data, "index", f"mds-{scans}")
    folder.mkdir(parents=True)
    size = 256 * 4_200_000
    shards = [
        {"column_encodings": ["ndarray:float16:121,145,121"], "column_names": ["voxels"], "column_sizes": [4_245_890],
         "compression": None, "format": "mds", "hashes": [], "raw_data": {
             "basename": f"shard.{number:05d}.mds", "bytes": size, "hashes": {}},
         "samples": min(256, scans - first), "size_limit": size, "version": 2, "zip_data": None}
        for number, first in enumerate(range(0, scans, 256))
    ]  # fmt: skip
    (folder / "index.json").write_text(json.dumps({"shards": shards, "version": 2}))
    return {"cpu": 0.0, "wall": 0.0}


def memory_of_table(scans: int) -> int:
    """Return more bytes than any program needs to open a table of so many scans."""
    return max(2**26, 1000 * scans)


def open_streaming(data: str, scans: int) -> dict[str, Any]:
    """Open a MosaicML dataset of ``scans`` scans whose shards would be fetched when they are read."""
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    folder = Path(data, "index", f"mds-{scans}")
    found: list[Any] = []

    def work() -> None:
        found.append(StreamingDataset(local=str(folder), batch_size=1, allow_unsafe_types=False))

    back_memory(memory_of_table(scans))
    result = measured(work)
    return {**result, "check": float(found[0].num_samples)}
