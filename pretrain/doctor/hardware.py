"""GPUs and their driver, cores, memory, disk and shared memory of a node."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from infra.processes.allowance import free_memory, usable_cores
from pretrain.config import load_recipe
from pretrain.doctor.row import FAIL, OK, WARN, Found, Request, Row
from pretrain.doctor.software import DRIVERS, torch_cuda

GIB, MIB = 2**30, 2**20
DISK, MEMORY, MEMORY_WANTED, SHM, SHM_WANTED = 5 * GIB, 1 * GIB, 4 * GIB, 64 * MIB, 256 * MIB
SHM_FOLDER = "/dev/shm"
QUERY = ["nvidia-smi", "--query-gpu=name,memory.total,memory.used,driver_version", "--format=csv,noheader,nounits"]
BUSY = 0.1  # of a GPU's memory that another process may hold without a warning
# What nvidia-smi prints for a value that a healthy GPU or its driver does not tell.
UNKNOWN = ("[N/A]", "N/A", "[Not Supported]", "[Not Available]", "[Insufficient Permissions]")
SHOWN = 200  # letters of a message of nvidia-smi


def look_devices(request: Request) -> dict[str, Any]:
    """Return the GPUs that the driver lists, why it lists none, how many of them torch sees, and the cores."""
    gpus, problem = list_gpus()
    seen = None
    if gpus:
        import torch

        seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {"gpus": gpus, "torch": seen, "cuda": torch_cuda(), "cores": usable_cores(),
            "visible": os.environ.get("CUDA_VISIBLE_DEVICES"), "problem": problem}  # fmt: skip


def list_gpus() -> tuple[list[dict[str, Any]], str]:
    """Return the GPUs that nvidia-smi lists, and why they are not known; without nvidia-smi there are none, and no problem.

    Each GPU has ``name``, ``driver``, and ``total`` and ``used`` bytes of memory, None if nvidia-smi does not tell them.
    """
    try:
        done = subprocess.run(QUERY, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        return [], ""
    except OSError as error:
        return [], f"nvidia-smi cannot be started: {error.strerror}"
    except subprocess.TimeoutExpired:
        return [], "nvidia-smi does not answer within 60 s"
    said = " ".join((done.stdout + done.stderr).split())[:SHOWN]
    if done.returncode:
        return [], f"nvidia-smi ends with status {done.returncode}: {said or 'no message'}"
    try:
        gpus = [_read_gpu(line) for line in done.stdout.splitlines() if line.strip()]
    except ValueError:
        return [], f"what nvidia-smi prints cannot be read: {said}"
    return gpus, "" if gpus else "nvidia-smi lists no GPU"


def _read_gpu(line: str) -> dict[str, Any]:
    """Return the GPU of a line of nvidia-smi. Raises ValueError if the line has another form."""
    name, total, used, driver = (word.strip() for word in line.rsplit(",", 3))
    bytes_of = {text: None if text in UNKNOWN else MIB * int(text) for text in (total, used)}
    return {"name": name, "total": bytes_of[total], "used": bytes_of[used], "driver": driver}


def judge_devices(found: Found, request: Request) -> list[Row]:
    """Fail if GPUs are not known, if torch sees fewer than there are or than ranks, or if only some nodes have any; warn if
    they are in use or differ between nodes."""
    rows = []
    with_gpus = [node for node, value in found.items() if value["gpus"]]
    first = found[with_gpus[0]] if with_gpus else next(iter(found.values()))
    for node, value in found.items():
        state, text, fix = _devices_of(value, request.ranks_of(node))
        if not value["gpus"] and not value["problem"] and (with_gpus or request.gpus):
            wanted = (
                f"{with_gpus[0]} has {len(first['gpus'])}"
                if with_gpus
                else f"{request.gpus} a node were asked of SLURM"
            )
            state, text = FAIL, f"{value['cores']} cores, no GPU, and {wanted}"
            fix = "install the driver on this node, or leave the node out: all ranks need the same kind of device"
        if state == OK and [gpu["name"] for gpu in value["gpus"]] != [gpu["name"] for gpu in first["gpus"]]:
            state, fix = WARN, "the nodes have different GPUs: the slowest one decides"
        rows.append(Row("", state, text, fix, node if len(found) > 1 else ""))
    return rows


def _devices_of(value: dict[str, Any], ranks: int) -> tuple[str, str, str]:
    gpus, seen = value["gpus"], value["torch"]
    if value["problem"]:
        return FAIL, f"{value['cores']} cores; {value['problem']}", "run nvidia-smi there; see `dmesg`"
    if not gpus:
        text = f"{value['cores']} cores, no GPU: training runs on the CPU over gloo"
        return (WARN, text, f"{ranks} ranks share them") if ranks > value["cores"] else (OK, text, "")
    kinds = ", ".join(
        f"{gpu['name']} {'of unknown memory' if gpu['total'] is None else format(gpu['total'] / GIB, '.0f') + ' GiB'}"
        for gpu in gpus
    )
    text = f"{len(gpus)} GPUs ({kinds}), {value['cores']} cores"
    limited = value["visible"] is not None
    if seen < (ranks if limited else len(gpus)):
        cause = (
            f"CUDA_VISIBLE_DEVICES={value['visible']} hides some"
            if limited
            else f"torch is built for CUDA {value['cuda']}"
        )
        return FAIL, f"{text}; torch sees {seen}", cause
    if ranks > len(gpus):
        return FAIL, f"{text} for {ranks} ranks", "write the number of GPUs as slots"
    busy = [str(n) for n, gpu in enumerate(gpus) if (gpu["used"] or 0) > BUSY * (gpu["total"] or 0) > 0]
    if busy:
        return WARN, text, f"memory of GPU {', '.join(busy)} is in use; see nvidia-smi"
    return OK, text, ""


def judge_driver(value: dict[str, Any]) -> tuple[str, str, str]:
    """Fail if the driver does not answer, or is older than torch's CUDA needs; warn if its version is not known."""
    gpus, cuda = value["gpus"], value["cuda"]
    if value["problem"]:
        return FAIL, value["problem"], "install NVIDIA's driver again, or restart the node"
    if not gpus:
        return OK, "no GPU", ""
    driver, major = str(gpus[0]["driver"]), int(cuda.partition(".")[0] or 0)
    text = f"driver {driver}, torch built for CUDA {cuda or 'none'}"
    if not cuda:
        return FAIL, text, "this torch is a CPU build: install one for CUDA"
    oldest, release = DRIVERS.get(major), driver.partition(".")[0]
    if not (release.isascii() and release.isdigit()):
        return WARN, text, "the driver's version is not known; see nvidia-smi"
    if oldest and int(release) < oldest:
        return FAIL, text, f"CUDA {major} needs driver {oldest} or newer"
    return OK, text, ""


def look_memory(request: Request) -> float:
    """Return the bytes of memory that a new process could use."""
    return float(free_memory())


def judge_memory(found: Found, request: Request) -> list[Row]:
    """Fail below 1 GiB per rank, warn below 4."""
    rows = []
    for node, free in found.items():
        ranks = request.ranks_of(node)
        state = FAIL if free < MEMORY * ranks else WARN if free < MEMORY_WANTED * ranks else OK
        fix = "" if state == OK else f"{ranks} ranks want {ranks * MEMORY_WANTED / GIB:.0f} GiB; end other processes"
        rows.append(Row("", state, f"{free / GIB:.1f} GiB free", fix, node if len(found) > 1 else ""))
    return rows


def look_disk(request: Request) -> tuple[float, str]:
    """Return the free bytes where the recipe's run is written, or of the working directory, and the folder."""
    folder = Path(load_recipe(request.recipe[0], request.recipe[1:]).run.output) if request.recipe else Path()
    while not folder.exists():
        folder = folder.parent
    return float(shutil.disk_usage(folder).free), str(folder)


def judge_disk(found: tuple[float, str]) -> tuple[str, str, str]:
    """Fail if there is no room for checkpoints and shards."""
    free, folder = found
    text = f"{free / GIB:.0f} GiB free {'here' if folder == '.' else f'in {folder}'}"
    return (OK, text, "") if free > DISK else (FAIL, text, "at least 5 GiB are needed")


def look_shm(request: Request) -> float | None:
    """Return the free bytes of shared memory; None if there is none."""
    try:
        return float(shutil.disk_usage(SHM_FOLDER).free)
    except OSError:
        return None


def judge_shm(found: Found, request: Request) -> list[Row]:
    """Fail if NCCL, or readers that hand batches over, would find no room; warn if there is little."""
    rows = []
    for node, free in found.items():
        ranks, where = request.ranks_of(node), node if len(found) > 1 else ""
        if free is None:
            rows.append(Row("", FAIL, f"{SHM_FOLDER} is missing", "mount a tmpfs there", where))
            continue
        state = FAIL if free < SHM * ranks else WARN if free < SHM_WANTED * ranks else OK
        fix = "" if state == OK else (
            f"{ranks * SHM_WANTED / MIB:.0f} MiB are wanted: remove files of ended jobs there, or enlarge it (--shm-size)"
        )  # fmt: skip
        rows.append(Row("", state, f"{free / MIB:,.0f} MiB free in {SHM_FOLDER}", fix, where))
    return rows
