"""Speed of building, reading, verifying and describing shards: `python -m tests.benchmarks.bench_shards [--quick]`.

Uses simulated grey-matter maps of 121 x 145 x 121 voxels at 1.5 mm. The build is compared with a plain loop (nibabel load,
float16, zstd, tar), at the build's zstd level and at zstd's default. Both run on one core and alternate, so that other load
slows both. Memory is the largest resident size of a Ray worker. Reading is one pread, crc32c and decoding, compared with
nibabel on the same scans as .nii.gz. `info` is measured as a whole command, for a manifest of a million scans that is written
here without volumes. Takes one to three minutes on two cores.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import psutil
import zstandard

from data_pipeline.shards.build import build_shards
from data_pipeline.shards.tar import ZSTD_LEVEL
from data_pipeline.shards.verify import find_problems
from data_pipeline.simulation.cohort import simulate_cohort
from data_pipeline.storage.manifest import Manifest, write_manifest
from data_pipeline.volume.grid import Grid
from infra import ray_cluster
from tests.memory import peak_bytes

GRID = Grid.vbm(1.5)
MIB = 2**20
SITES, DATA_SETS = 74, 13
BUILD = "yaware shards build"


def bare_loop(paths: list[Path], out: Path, level: int) -> float:
    """Return the seconds of the least work that a build must do, at one zstd level."""
    started = time.perf_counter()
    with tarfile.open(out, "w") as tar:
        for path in paths:
            voxels = np.asarray(nibabel.load(path).dataobj, dtype=np.float32).astype(np.float16)
            payload = zstandard.ZstdCompressor(level=level).compress(voxels.tobytes())
            member = tarfile.TarInfo(f"{path.stem}.npy.zst")
            member.size = len(payload)
            tar.addfile(member, io.BytesIO(payload))
    return time.perf_counter() - started


def bench_build(cohort: Path, work: Path, rounds: int) -> Manifest:
    """Alternate the build and the plain loop; print both, their ratio, and the memory of the worker."""
    paths = sorted(cohort.rglob("*.nii.gz"))
    levels = {f"bare loop, zstd {level}": level for level in (ZSTD_LEVEL, 3)}
    seconds: dict[str, list[float]] = {**{name: [] for name in levels}, BUILD: []}
    peak, cpu = [0], []
    with ray_cluster.session(1):
        build_shards(cohort, work / "warm", grid=GRID, scans_per_shard=len(paths))
        stop = threading.Event()
        watcher = threading.Thread(target=_watch_workers, args=(peak, stop))
        watcher.start()
        try:
            for turn in range(rounds):
                marks = []
                for name, level in reversed(levels.items()):
                    marks = [_cpu_seconds()]
                    seconds[name].append(bare_loop(paths, work / "bare.tar", level))
                    marks.append(_cpu_seconds())
                started = time.perf_counter()
                built = build_shards(cohort, work / f"shards{turn}", grid=GRID, scans_per_shard=16)
                seconds[BUILD].append(time.perf_counter() - started)
                marks.append(_cpu_seconds())
                cpu.append((marks[1] - marks[0]) / (marks[2] - marks[1]))
        finally:
            stop.set()
            watcher.join()
    print(f"\nBuild, {len(paths)} scans of {' x '.join(map(str, GRID.shape))}, one core, {rounds} rounds in turn")
    print(f"{'':<24}{'scans/s':>10}{'ms/scan':>10}")
    for name, found in seconds.items():
        best = min(found)
        print(f"{name:<24}{len(paths) / best:>10.1f}{1000 * best / len(paths):>10.1f}")
    for name in levels:
        ratios = [a / b for a, b in zip(seconds[name], seconds[BUILD], strict=True)]
        shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        best = min(seconds[name]) / min(seconds[BUILD])
        print(f"build / {name}: best rounds {best:.2f}, median {statistics.median(ratios):.2f} ({shown}); goal 0.90")
    print(
        f"ratio of processor seconds, driver and worker together, {statistics.median(cpu):.2f} (depends little on other load)"
    )
    print(f"worker's largest resident size {peak[0] / MIB:.0f} MiB; goal below 1000")
    return built


def _cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its Ray workers."""
    spent = time.process_time()
    for process in psutil.Process().children(recursive=True):
        try:
            if process.name().startswith(("ray::build_one", "ray::IDLE")):
                used = process.cpu_times()
                spent += used.user + used.system
        except psutil.NoSuchProcess:
            continue
    return spent


def _watch_workers(peak: list[int], stop: threading.Event) -> None:
    """Record the largest peak memory (VmHWM) of this process's Ray workers that have built a shard."""
    while not stop.wait(0.1):
        for process in psutil.Process().children(recursive=True):
            try:
                if process.name().startswith("ray::build_one"):
                    peak[0] = max(peak[0], peak_bytes(process.pid))
            except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError, StopIteration):
                continue


def bench_read(cohort: Path, manifest: Manifest, repeats: int) -> None:
    """Alternate reading the scans from the shards and from .nii.gz, in one thread; print both."""
    paths = sorted(cohort.rglob("*.nii.gz"))
    some = paths[: max(1, len(paths) // 4)]
    readers: dict[str, tuple[Sequence[Any], Callable[[Any], Any]]] = {
        "shards (zst)": (range(len(manifest.scans)), manifest.read_volume),
        "nibabel, .nii.gz": (some, lambda path: np.asarray(nibabel.load(path).dataobj, dtype=np.float32)),
    }
    wall: dict[str, list[float]] = {name: [] for name in readers}
    processor: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(repeats):
        for name, (scans, read) in readers.items():
            started, spent = time.perf_counter(), time.process_time()
            for scan in scans:
                read(scan)
            wall[name].append((time.perf_counter() - started) / len(scans))
            processor[name].append((time.process_time() - spent) / len(scans))
    print("\nRead, checksum and decode, one core, best of the rounds")
    print(f"{'':<24}{'volumes/s':>10}{'ms/volume':>10}{'processor ms':>14}")
    for name in readers:
        best = min(wall[name])
        print(f"{name:<24}{1 / best:>10.1f}{1000 * best:>10.1f}{1000 * min(processor[name]):>14.1f}")
    ratios = [min(found["nibabel, .nii.gz"]) / min(found["shards (zst)"]) for found in (wall, processor)]
    print(f"ratio {ratios[0]:.1f}, of processor time {ratios[1]:.1f}; goals 120/s and 8")


def bench_verify(manifest: Manifest) -> None:
    """Print the speed of verifying all bytes of the shards, read from the page cache."""
    size = sum(int(row["bytes"]) for row in manifest.shards)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        assert not find_problems(manifest)
        seconds.append(time.perf_counter() - started)
    print(f"\nVerify: {size / 1e6 / min(seconds):.0f} MB/s on all cores ({size / 1e6:.0f} MB, from the page cache)")


def write_large_manifest(root: Path, scans: int) -> Manifest:
    """Write a manifest without volumes: 13 data sets, 74 sites, 256 scans per shard, ids of seven digits."""
    generator = np.random.default_rng(0)
    person = generator.integers(0, max(1, int(scans * 0.74)), scans)
    ids = np.char.mod("%07d", person)
    data_set = np.array([f"set{n:02d}" for n in range(DATA_SETS)])[person % DATA_SETS]
    session = np.char.mod("%d", np.arange(scans) % 9 + 1)
    table = pd.DataFrame({
        "key": [f"{s}_sub-{i}_ses-{n}_run-{row}" for row, (s, i, n) in enumerate(zip(data_set, ids, session, strict=True))],
        "shard": np.arange(scans) // 256, "offset": np.arange(scans) % 256 * 1_040_000,
        "size": generator.integers(900_000, 1_100_000, scans), "crc32c": generator.integers(0, 2**32, scans),
        "participant_id": ids, "session": session, "run": "", "dataset": data_set,
        "site": np.array([f"site{n:02d}" for n in range(SITES)])[person % SITES],
        "age": np.where(generator.random(scans) < 0.01, np.nan, generator.uniform(6, 88, scans)),
        "sex": np.where(person % 2, "F", "M"), "diagnosis": np.where(person % 10, "control", "AD"),
        "tiv": generator.normal(1500, 120, scans), "split": np.array(["pretrain", "monitor", "downstream"])[person % 3],
    })  # fmt: skip
    shards = [
        {"name": f"set-{n:06d}.tar", "bytes": 268_000_000 + n, "sha256": f"{n:064x}", "scans": min(256, scans - first)}
        for n, first in enumerate(range(0, scans, 256))
    ]
    settings = {
        "dataset": "set", "modality": "vbm", "scaling": "none", "codec": "zst", "scans_per_shard": 256, "seed": 0,
        "splits": {"pretrain": 0.7, "monitor": 0.1, "downstream": 0.2}, "simulated": True, "scans_found": scans,
        "quarantined": 0,
    }  # fmt: skip
    return write_manifest(root, GRID, settings, shards, table)


def bench_info(work: Path, scans: int) -> None:
    """Print the seconds of the whole command, including the start of Python."""
    root = work / "large"
    root.mkdir()
    write_large_manifest(root, scans)
    seconds, before = [], resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "infra.cli", "shards", "info", str(root)], check=True, capture_output=True
        )
        seconds.append(time.perf_counter() - started)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / len(seconds)
    size = (root / "scans.parquet").stat().st_size / 1e6
    print(f"\nInfo, {scans} scans ({size:.0f} MB of table): {min(seconds):.2f} s at best, "
          f"median {statistics.median(seconds):.2f} s, processor {spent:.2f} s; goal 2")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", choices=("cpu", "cuda", "gpu"), default="cpu", help="has no effect: all work is done on the CPU"
    )
    parser.add_argument("--quick", action="store_true", help="few scans, to check that it runs")
    chosen = parser.parse_args()
    scans, rounds, large = (8, 1, 100_000) if chosen.quick else (96, 3, 1_000_000)
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores {platform.machine()}, load {load:.1f}, nibabel {nibabel.__version__}, "
          f"zstandard {zstandard.__version__}, numpy {np.__version__}")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        cohort = simulate_cohort(work / "cohort", participants=scans, spacing=1.5)
        manifest = bench_build(cohort, work, rounds)
        bench_read(cohort, manifest, rounds)
        bench_verify(manifest)
        bench_info(work, large)


if __name__ == "__main__":
    main()
