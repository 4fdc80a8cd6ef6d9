"""The peers' virtual environment: torch as here, the peers and what they need, pinned by tests/benchmarks/peers.txt."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

from infra.errors import UserError

HERE = Path(__file__).resolve().parents[1]
PINS, STUB = HERE / "peers.txt", HERE / "peers" / "torchvision_stub.py"
STAMP = ".yaware-peers"
NAMES = (
    "monai",
    "torchio",
    "nidl",
    "webdataset",
    "litdata",
    "mosaicml-streaming",
    "torch",
    "numpy",
    "pytorch-lightning",
)


def state() -> str:
    """Return what an environment must have been made from."""
    return hashlib.sha256(PINS.read_bytes() + STUB.read_bytes() + sys.version.encode()).hexdigest()


def ready(folder: Path) -> bool:
    """Whether a folder holds the environment of the present pins."""
    stamp = folder / STAMP
    return stamp.is_file() and stamp.read_text() == state()


def make(folder: Path) -> Path:
    """Return the interpreter of the peers' environment; it is made in ``folder`` if it is not there.

    Raises:
        UserError: if it cannot be made, or if the folder holds something else.
    """
    python = folder / "bin" / "python"
    if ready(folder):
        return python
    if folder.exists():
        if any(folder.iterdir()) and not (folder / "pyvenv.cfg").is_file():
            raise UserError(f"--peers={folder} is neither empty nor a virtual environment; give another folder")
        shutil.rmtree(folder)
    print(f"bench: the peers are installed in {folder} (about 2 GB, some minutes)", flush=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    _run([sys.executable, "-m", "venv", str(folder)], folder)
    # --no-deps: the pins are the whole environment; some peers name versions of others that they do not need here.
    _run([*pip, "-r", str(PINS)], folder)
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "torchvision").mkdir(exist_ok=True)
    shutil.copyfile(STUB, site / "torchvision" / "__init__.py")
    (folder / STAMP).write_text(state())
    return python


def versions(python: Path) -> dict[str, str]:
    """Return the versions of the peers in their environment."""
    script = "import json, sys; from importlib.metadata import version as v; print(json.dumps({n: v(n) for n in sys.argv[1:]}))"
    done = subprocess.run([str(python), "-c", script, *NAMES], check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
        reason = next((line for line in reversed(lines) if "ERROR" in line), lines[-1])
        raise UserError(
            f"the peers cannot be installed in {folder}: {reason}; give --peers none to measure without them"
        )
