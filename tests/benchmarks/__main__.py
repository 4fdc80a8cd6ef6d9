"""Run all benchmarks one after another: `python -m tests.benchmarks [--device cpu|gpu] [--quick]`, or `make bench`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

CPU_ONLY = ("bench_cohort", "bench_scaling", "bench_shards")  # all their work is done on the CPU


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes, to check that each benchmark runs")
    options = parser.parse_args()
    if options.device == "gpu":
        import torch

        if not torch.cuda.is_available():
            print("benchmarks: error: --device gpu needs a CUDA device; torch sees none", file=sys.stderr)
            return 2
    failed = []
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        if options.device == "gpu" and path.stem in CPU_ONLY:
            continue
        print(f"\n== {path.stem}", flush=True)
        command = [sys.executable, "-m", f"tests.benchmarks.{path.stem}"]
        command += ["--device", "cuda" if options.device == "gpu" else "cpu"] + ["--quick"] * options.quick
        if subprocess.run(command).returncode:
            failed.append(path.stem)
    if failed:
        print(f"benchmarks: error: {', '.join(failed)} failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
