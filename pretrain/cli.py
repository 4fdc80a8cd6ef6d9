"""``yaware pretrain``."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.distributed import free_port
from infra.extensions import extensions_folder

if TYPE_CHECKING:
    from pretrain.config import Recipe


def pretrain(arguments: list[str]) -> int:
    """Check the recipe here, where an error is one line, then hand it to the deepspeed launcher."""
    parser = argparse.ArgumentParser(
        prog="yaware pretrain",
        description="Pretrain an encoder: `deepspeed --num_accelerators N --module pretrain.train --config ...`.",
        epilog="Any key of the recipe is overridden by --section.key=value, as in --optimizer.lr=3e-4.",
    )
    parser.add_argument("--config", required=True, help="a shipped recipe (demo-cpu, ...) or a YAML file")
    parser.add_argument("--print_config", action="store_true", help="print the resolved recipe and exit")
    parser.add_argument("--resume", metavar="auto|never|PATH", help="short for --run.resume (default: auto)")
    options, overrides = parser.parse_known_args(arguments)
    if options.resume:
        overrides = [*overrides, f"--run.resume={options.resume}"]

    from infra.settings import to_yaml
    from pretrain.config import load_recipe

    recipe = load_recipe(options.config, overrides)
    if options.print_config:
        print(to_yaml(recipe), end="")
        return 0
    from pretrain.run.checkpoint import newest_step, step_folder, verify_checkpoint
    from pretrain.train import make_plan

    plan = make_plan(recipe, recipe.launch.ranks)
    checkpoints = Path(recipe.run.output) / "checkpoints"
    newest = newest_step(checkpoints)
    # A damaged last checkpoint is made again from the one before.
    if newest is not None and newest >= plan.total_steps and not verify_checkpoint(step_folder(checkpoints, newest)):
        _send_what_waits(recipe)
        print(f"pretrain: {recipe.run.name} is already complete: {plan.total_steps} steps, {checkpoints}")
        return 0
    return _launch(recipe.launch.ranks, ["--config", options.config, *overrides])


def _send_what_waits(recipe: Recipe) -> None:
    """Send to MLflow what a run could not send before it ended."""
    from infra.tracking.tracker import default_uri, send_spool
    from pretrain.run.log import SPOOL

    spool = Path(recipe.run.output) / SPOOL
    if spool.is_file() and send_spool(recipe.run.tracking_uri or default_uri(), spool):
        print("pretrain: sent to MLflow what waited for it")


def _launch(ranks: int, arguments: list[str]) -> int:
    launcher = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_accelerators",
        str(ranks),
        "--master_port",
        str(free_port()),
    ]
    device = os.environ.get("DS_ACCELERATOR", accelerator())
    defaults = {"DS_ACCELERATOR": device}
    if ranks > 1 and device == "cpu":
        defaults["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    return start([*launcher, "--log_level", "error", "--module", "pretrain.train", *arguments], defaults)


def start(command: list[str], defaults: dict[str, str]) -> int:
    """Run the deepspeed launcher to its end, handing signals on to the ranks; ``defaults``: variables where none are set."""
    extensions_folder()
    process = subprocess.Popen(command, env={**defaults, **os.environ})

    def pass_on(received: int, _: Any) -> None:
        # To the ranks themselves, which save and leave; the launcher would end them after half a minute. A Ctrl-C has
        # reached them already.
        if received != signal.SIGINT:
            ranks = _ranks_of(process.pid)
            for rank in ranks:
                rank.send_signal(signal.SIGUSR1)
            if not ranks:
                _end(process)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, pass_on)
    return process.wait()


def _ranks_of(launcher: int) -> list[Any]:
    """The training processes below a launcher's process."""
    return [p for p in _below(launcher) if any(word.startswith("--local_rank") for word in _words(p))]


def _end(launcher: subprocess.Popen[bytes]) -> None:
    """SIGTERM to a launcher that has no ranks below it.

    Over pdsh its own handler ends the ranks on all hosts, with pdsh's help, so nothing else is touched. Elsewhere the
    ranks have not been started yet, and the launcher would leave what it has started.
    """
    import psutil

    below = _below(launcher.pid)
    over_pdsh = any(Path(word).name == "pdsh" for p in below for word in _words(p)[:2])
    for process in [] if over_pdsh else below:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    with suppress(ProcessLookupError):
        launcher.send_signal(signal.SIGTERM)


def _below(launcher: int) -> list[Any]:
    """Processes that a launcher's has started; none where it has ended."""
    import psutil

    try:
        return list(psutil.Process(launcher).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _words(process: Any) -> list[str]:
    """A process's command line; empty where it has ended meanwhile."""
    import psutil

    try:
        return list(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return []


def accelerator() -> str:
    """What DeepSpeed is to train on here."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


COMMANDS: dict[str, Callable[[list[str]], int]] = {"pretrain": pretrain}
