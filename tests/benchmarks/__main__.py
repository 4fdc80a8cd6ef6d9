"""`make bench`: measure every row beside its peers, write docs/performance.md. `make bench-gpu`: the benchmarks of a GPU.

python -m tests.benchmarks [--rows PATTERNS] [--peers FOLDER|none] [--out FOLDER] [--quick]      # tests.benchmarks.harness
python -m tests.benchmarks --device gpu [--quick]                                                # every bench_*.py, in turn
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.harness import command

CPU_ONLY = ("bench_cohort", "bench_scaling", "bench_shards")  # all their work is done on the CPU


def on_a_gpu(quick: bool) -> int:
    """Run the benchmarks one after another on a CUDA device; return 1 if one failed."""
    import torch

    if not torch.cuda.is_available():
        print("benchmarks: error: --device gpu needs a CUDA device; torch sees none", file=sys.stderr)
        return 2
    failed = []
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        if path.stem in CPU_ONLY:
            continue
        print(f"\n== {path.stem}", flush=True)
        started = [sys.executable, "-m", f"tests.benchmarks.{path.stem}", "--device", "cuda", *["--quick"] * quick]
        if subprocess.run(started).returncode:
            failed.append(path.stem)
    if failed:
        print(f"benchmarks: error: {', '.join(failed)} failed", file=sys.stderr)
    return 1 if failed else 0


def main(arguments: Sequence[str]) -> int:
    """Choose between the two; return the exit status."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    device, rest = parser.parse_known_args(arguments)
    if device.device == "cpu":
        return command.main(rest)
    gpu = argparse.ArgumentParser(prog="benchmarks")
    gpu.add_argument("--quick", action="store_true", help="small sizes, to check that each benchmark runs")
    return on_a_gpu(gpu.parse_args(rest).quick)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
