"""Start the ranks of a job and wait for its end: shared by ``yaware pretrain``, ``yaware launch`` and the Python API."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.distributed import accelerator, loopback_of_gloo
from infra.errors import UserError
from infra.extensions import extensions_folder
from infra.files import read_text
from infra.lean_imports import start_collecting
from infra.processes.allowance import usable_cores
from infra.processes.scratch import scratch_folder
from infra.processes.unchanged import unchanged_environment
from infra.processes.with_parent import command_with_parent
from infra.watchdog.exit_note import PROBLEM_FILE, read_notes, remove_notes
from pretrain.launch.launchers import LAUNCHERS, Job, Launcher
from pretrain.launch.orphans import end_orphans
from pretrain.launch.postmortem import explain
from pretrain.launch.processes import LOOK_SECONDS, RankObserver

if TYPE_CHECKING:
    from pretrain.config import Recipe

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass(frozen=True)
class JobEnd:
    """How a job ended.

    Attributes:
        status: exit status of the launcher: 0 done or stopped and saved, 1 failed, 2 wrong input, 75 ended by the watchdog.
        reason: one line that names the lost rank, or, from `start_recipe`, the wrong input; empty if neither is known.
    """

    status: int
    reason: str = ""


def start_recipe(recipe: Recipe, ranks: int) -> JobEnd:
    """Train ``recipe`` on ``ranks`` processes of this host and wait for the end.

    The ranks read the recipe from a temporary file. Raises UserError if ``ranks`` does not divide the batch.
    """
    from pretrain.config import check_world_size

    check_world_size(recipe.batch.global_, ranks)
    with scratch_folder("recipe") as folder:
        path, problem = folder / "recipe.yaml", folder / "problem.txt"
        recipe.save(path)
        end = start_on_this_host([str(path)], ranks, Path(recipe.run.output), {PROBLEM_FILE: str(problem)})
        told = problem.is_file() and end.status != 0 and not end.reason
        return JobEnd(end.status, read_text(problem)) if told else end


def start_on_this_host(recipe: Sequence[str], ranks: int, run_folder: Path, defaults: Mapping[str, str] = {}) -> JobEnd:
    """Start ``ranks`` ranks on this host; ``recipe`` is a recipe's name or path and its overrides.

    ``defaults`` are environment variables for the ranks, if they are not set.

    Raises UserError if this host has fewer GPUs than ranks.
    """
    device = accelerator()
    if device == "cuda" and (gpus := visible_gpus()) < ranks:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        cause = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
        raise UserError(f"launch.ranks={ranks} needs a GPU for each rank; found {gpus}{cause}; lower launch.ranks")
    defaults = {**defaults, "DS_ACCELERATOR": device, **loopback_of_gloo()}
    if ranks > 1 and device == "cpu":
        defaults["OMP_NUM_THREADS"] = str(max(1, usable_cores() // ranks))
    launcher, job = LAUNCHERS["one-host"], Job(recipe, {"localhost": ranks})
    return start(launcher, launcher.command(job), run_folder=run_folder, defaults=defaults)


def start(
    launcher: Launcher, command: Sequence[str], *, run_folder: Path | None = None, host: str | None = None,
    defaults: Mapping[str, str] = {},
) -> JobEnd:  # fmt: skip
    """Run a launcher's ``command`` to its end. On return, also after an error, its process has ended.

    If this process is killed, the launcher gets SIGTERM and the ranks save and end. What an earlier, killed job has left is
    ended first.

    In the main thread SIGTERM, SIGUSR1 and SIGINT to this process are passed on by ``launcher.stop``, and all handlers are
    restored afterwards. Ctrl-C in a terminal is not passed on, because the terminal sends it to the ranks as well.

    Args:
        launcher: the entry of LAUNCHERS that built ``command``.
        command: program and arguments.
        run_folder: where the ranks leave their exit notes; None if this is not known.
        host: look only at the notes of this host's ranks, if the other hosts have launchers of their own.
        defaults: environment variables for the ranks, if they are not set.
    """
    with unchanged_environment():
        extensions_folder()
        environment = {**defaults, **os.environ}
    if run_folder:
        end_orphans(run_folder)
        remove_notes(run_folder, host)
    process = subprocess.Popen(command_with_parent(command), env=environment)
    observer = RankObserver(process.pid)
    start_collecting()  # this process may wait for days

    def pass_on(number: int, _: Any) -> None:
        """Ask the ranks to save and end."""
        if number != signal.SIGINT or not _in_foreground():
            launcher.stop(process)

    try:
        with _handled(pass_on):
            while process.poll() is None:
                observer.look()
                time.sleep(LOOK_SECONDS)
        observer.look()
    finally:
        if process.poll() is None:
            launcher.stop(process)
            process.wait()
        observer.close()
    if process.returncode == 0 and observer.running:
        return JobEnd(1, f"the launcher ended before its ranks; still running: {observer.running}")
    notes = [note for note in (read_notes(run_folder) if run_folder else []) if host in (None, note.host)]
    reason = explain(notes, observer.deaths, process.returncode)
    return JobEnd(process.returncode, reason)


def _in_foreground() -> bool:
    """Return whether this process is in the group that receives Ctrl-C from its terminal; the ranks then receive it too."""
    try:
        with open("/dev/tty", "rb") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False


@contextmanager
def _handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Handle SIGNALS by ``handler`` in the main thread; elsewhere Python allows no handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, before in old.items():
            signal.signal(number, before)


def visible_gpus() -> int:
    """Return the number of GPUs that torch sees."""
    import torch

    return int(torch.cuda.device_count())
