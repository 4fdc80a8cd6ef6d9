"""Commands in a world unlike the developer's machine: mounts and a user of their own, made by ``unshare``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from infra.extensions import extensions_folder

ROOT = Path(__file__).resolve().parents[2]
AS_A_NUMBER = ("unshare", "--user", "--map-user=12345", "--map-group=12345")
# flock as on file systems without locks; fcntl's locks, which SQLite takes, are left.
NO_FLOCK = "#include <errno.h>\nint flock(int file, int operation) { errno = ENOLCK; return -1; }\n"
# Runs commands of ``yaware`` one after the other in one process, which imports the libraries once.
SEVERAL = """
import json, sys
from infra.cli import print_any_text, run
print_any_text()
for words in json.loads(sys.argv[1]):
    status = run(words)
    print(f"{words[0]} {words[1]}: status {status}", flush=True)
    if status:
        sys.exit(status)
"""


# The same, on after a failure.
EACH = SEVERAL.partition("    if status:")[0]


@dataclass
class World:
    """What is unusual: each attribute is a row of the matrix.

    Attributes:
        folder: for what the world needs: temporary folder, home, extensions.
        nobody: a user without name, and without HOME.
        home_read_only: HOME is a folder that cannot be written.
        ascii: LANG=C and a console and files in ASCII.
        long_tmpdir: a TMPDIR of 100 letters.
        noexec_tmpdir: programs in TMPDIR cannot be executed.
        small_shm: /dev/shm of 64 MB.
        no_flock: file systems without locks.
        read_only: folders that are mounted read-only.
    """

    folder: Path
    nobody: bool = False
    home_read_only: bool = False
    ascii: bool = False
    long_tmpdir: bool = False
    noexec_tmpdir: bool = False
    small_shm: bool = False
    no_flock: bool = False
    read_only: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.home, self.tmpdir = self.folder / "home", self.folder / ("t" * (100 if self.long_tmpdir else 1))
        for made in (self.home, self.tmpdir):
            made.mkdir(parents=True, exist_ok=True, mode=0o700)

    def why_not(self) -> str:
        """Why this machine cannot make the world; empty if it can."""
        done = subprocess.run(self._inside(["true"]), capture_output=True, text=True)
        return f"no right to make namespaces and mounts: {done.stderr.strip()[:200]}" if done.returncode else ""

    def yaware(self, *commands: Sequence[str | Path], code: str = SEVERAL) -> subprocess.CompletedProcess[str]:
        """Run commands of ``yaware`` in the world, in the folder ``work``; the first that fails is the last."""
        work = self.folder / "work"
        work.mkdir(exist_ok=True)
        words = json.dumps([[str(word) for word in command] for command in commands])
        done = subprocess.run(
            self._inside([sys.executable, "-c", code, words]), cwd=work, env=self._environment(), capture_output=True,
            text=True, errors="replace", timeout=600,
        )  # fmt: skip
        print(done.stdout[-3000:], done.stderr[-6000:])
        return done

    def _inside(self, command: list[str]) -> list[str]:
        read_only = [*self.read_only, *([self.home] if self.home_read_only else [])]
        lines = [f"mount --bind '{path}' '{path}' && mount -o remount,bind,ro '{path}'" for path in read_only]
        if self.small_shm:
            lines.append("mount -t tmpfs -o size=64m tmpfs /dev/shm")
        if self.noexec_tmpdir:
            lines.append(
                f"mount --bind '{self.tmpdir}' '{self.tmpdir}' && mount -o remount,bind,noexec '{self.tmpdir}'"
            )
        if lines:
            own = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
            user = " ".join(AS_A_NUMBER) if self.nobody else ""
            script = " && ".join([*lines, f'exec {user} "$@"'])
            return ["unshare", *own, "--mount", "sh", "-c", script, "sh", *command]
        return [*(AS_A_NUMBER if self.nobody else ()), *command]

    def _environment(self) -> dict[str, str]:
        environment = {
            "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu", "TMPDIR": str(self.tmpdir), "TORCH_EXTENSIONS_DIR": str(extensions_folder()),
        }  # fmt: skip
        if not self.nobody:
            environment["HOME"] = str(self.home)
        if self.ascii:
            environment |= {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        if self.no_flock:
            environment["LD_PRELOAD"] = str(self._without_flock())
        return environment

    def _without_flock(self) -> Path:
        library = self.folder / "noflock.so"
        if not library.exists():
            subprocess.run(
                ["g++", "-shared", "-fPIC", "-xc", "-o", library, "-"], input=NO_FLOCK, text=True, check=True
            )
        return library
