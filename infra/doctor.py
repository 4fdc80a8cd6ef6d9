"""``yaware doctor``: check whether this machine can run yaware, and say how to fix what is missing."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from infra.extensions import extensions_folder

PACKAGES = ("torch", "deepspeed", "webdataset", "nibabel", "mlflow", "ray", "monai", "nvidia-dali-cuda130")

Check = tuple[str, bool, str]  # name, whether it passed, text


def check_python() -> Check:
    """Check for Python 3.10 or newer."""
    return "python", sys.version_info >= (3, 10), sys.version.split()[0]


def check_compiler() -> Check:
    """Check for g++ and ninja, which DeepSpeed needs to compile its CPU collectives."""
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    return "compiler", not missing, f"missing: {', '.join(missing)}" if missing else "g++ and ninja found"


def check_packages() -> Check:
    """Check that the main packages are installed."""
    installed, missing = [], []
    for package in PACKAGES:
        try:
            installed.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            missing.append(package)
    if missing == ["nvidia-dali-cuda130"] and _is_installed("nvidia-dali-cuda120"):
        missing = []
    return (
        "packages",
        not missing,
        f"missing: {', '.join(missing)}; run `make setup`" if missing else ", ".join(installed),
    )


def check_extension() -> Check:
    """Report whether DeepSpeed's collectives are compiled; this check always passes."""
    folder = extensions_folder()
    built = any(folder.glob("deepspeed_shm_comm/*.so"))
    return (
        "collectives",
        True,
        f"compiled in {folder}" if built else "not compiled yet; the first run takes a minute longer",
    )


def check_devices() -> Check:
    """Report CPU cores, free memory and CUDA devices; this check always passes."""
    import psutil
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = psutil.virtual_memory().available / 2**30
    text = f"{len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB free, {len(gpus)} CUDA devices"
    return "devices", True, text + (f" ({', '.join(gpus)})" if gpus else " (training runs on the CPU over gloo)")


def check_space() -> Check:
    """Check for 5 GiB of free disk space in the working directory, for shards and checkpoints."""
    free = shutil.disk_usage(".").free / 2**30
    return "disk", free > 5, f"{free:.0f} GiB free here" + ("" if free > 5 else "; at least 5 GiB are needed")


CHECKS: tuple[Callable[[], Check], ...] = (
    check_python, check_compiler, check_packages, check_extension, check_devices, check_space,
)  # fmt: skip


def doctor(arguments: list[str]) -> int:
    """Run every check and print one line for each. Return 1 if a check fails, else 0."""
    argparse.ArgumentParser(prog="yaware doctor", description=__doc__).parse_args(arguments)
    rows = [check() for check in CHECKS]
    for name, passed, text in rows:
        print(f"{'ok  ' if passed else 'FAIL'} {name:<12} {text}")
    return 0 if all(passed for _, passed, _ in rows) else 1


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


COMMANDS: dict[str, Callable[[list[str]], int]] = {"doctor": doctor}
