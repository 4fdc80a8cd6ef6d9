"""A cohort of the paper's size, end to end: `python -m tests.benchmarks.bench_cohort [--quick]`.

Simulates 8,600 participants (about 10,420 scans) on a coarse grid, then builds, verifies and describes the shards, each with
its command. Takes about three minutes and 1.5 GB of disk on two cores; prints seconds and sizes.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def timed(*arguments: str) -> float:
    """Run a command of yaware and return its seconds."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "infra.cli", *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def size_of(folder: Path) -> float:
    """Return the size of a folder's files in MB (10^6 bytes)."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="has no effect: all work is done on the CPU"
    )
    parser.add_argument("--quick", action="store_true", help="120 participants, to check that it runs")
    parser.add_argument("--spacing", default="6", help="mm")
    options = parser.parse_args()
    people = "120" if options.quick else "8600"
    print(f"{os.cpu_count()} cores {platform.machine()}, grid of {options.spacing} mm, {people} participants")
    with tempfile.TemporaryDirectory() as temporary:
        cohort, shards = Path(temporary) / "cohort", Path(temporary) / "shards"
        simulate = ["cohort", "simulate", str(cohort), "--participants", people, "--spacing", options.spacing]
        build = ["shards", "build", str(cohort), str(shards), "--scaling", "tiv", "--scans-per-shard", "512"]
        simulated, built = timed(*simulate), timed(*build)
        verified, described = timed("shards", "verify", str(shards)), timed("shards", "info", str(shards))
        scans = len(list(cohort.glob("sub-*/**/*.nii.gz")))
        tars = len(list(shards.glob("*.tar")))
        print(f"simulate  {simulated:7.1f} s  {scans / simulated:7.1f} scans/s  {size_of(cohort):8.1f} MB of NIfTI")
        print(f"build     {built:7.1f} s  {scans / built:7.1f} scans/s  {size_of(shards):8.1f} MB in {tars} shards")
        print(f"scans     {scans}")
        print(f"verify    {verified:7.1f} s\ninfo      {described:7.1f} s")


if __name__ == "__main__":
    main()
