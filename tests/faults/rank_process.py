"""Ranks of the real training, forked from a process with all imports so that they start quickly, and faults at chosen points.

Each rank is a process with its own process group, sockets and files. It runs ``pretrain.train.main``, and a fault kills it with
a real SIGKILL.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.distributed import free_port
from tests.forkserver import imported
from tests.stores import store_at


@dataclass(frozen=True)
class Fault:
    """Kills ``rank`` ``delay`` seconds after it reaches ``point`` for the ``nth`` time (0 = the first).

    ``point`` is how a watchdog phase begins ("the forward pass"), or a key of POINTS.
    """

    rank: int
    point: str
    nth: int = 0
    delay: float = 0.0


def start(
    command: Sequence[str],
    folder: Path,
    world: int,
    fault: Fault | None = None,
    harm: Callable[[int], None] | None = None,
    store: str | None = None,
) -> list[Any]:
    """Start the ranks of ``pretrain.train`` with these arguments; each writes ``rank-N.log`` in ``folder``.

    ``harm(rank)`` is called in each rank before the training starts, to inject other faults. ``store`` is the URI of the MLflow
    store, if the arguments do not say it.
    """
    context = imported()
    port, ranks = free_port(), []
    for rank in range(world):
        environment = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": 1,
            **({} if store is None else {"MLFLOW_TRACKING_URI": store}),
        }  # fmt: skip
        own_fault = fault if fault and fault.rank == rank else None
        ranks.append(context.Process(target=_rank, args=(list(command), str(folder), environment, own_fault, harm)))
        ranks[-1].start()
    return ranks


def wait(ranks: Sequence[Any], seconds: float = 150.0) -> list[int | None]:
    """Wait for all ranks and return their exit status (negative: the signal). Ranks that still run are killed."""
    limit = time.monotonic() + seconds
    for process in ranks:
        process.join(max(0.0, limit - time.monotonic()))
    statuses = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
        process.join()
    return statuses


def run_ranks(command: Sequence[str], folder: Path, world: int = 2, fault: Fault | None = None) -> str:
    """Train as a command of ``tests.runs.pretrain_command`` does, without its launcher, and return what rank 0 printed.

    Much quicker than the command, since the ranks are forked with all imports. ``folder`` gets the logs, and a store of
    MLflow if it has none. With a ``fault`` the other ranks are killed too; otherwise all must end with status 0.
    """
    folder.mkdir(exist_ok=True)
    words = [word for word in command[command.index("--config") :] if not word.startswith("--launch.ranks=")]
    ranks = start(words, folder, world, fault, store=store_at(folder / "mlflow.db"))
    if fault:
        ranks[fault.rank].join(150)
        for process in ranks:
            process.kill()
    statuses, text = wait(ranks), (folder / "rank-0.log").read_text()
    assert fault or statuses == [0] * world, text[-3000:]
    return text


def _rank(
    command: list[str],
    folder: str,
    environment: dict[str, Any],
    fault: Fault | None,
    harm: Callable[[int], None] | None,
) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    log = os.open(f"{folder}/rank-{environment['RANK']}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch

    from pretrain import train
    from pretrain.run import loop

    torch.set_num_threads(1)  # torch was imported before OMP_NUM_THREADS was set

    _record_scans(loop, Path(folder) / f"scans-{environment['RANK']}.jsonl")
    if harm:
        harm(int(environment["RANK"]))
    if fault:
        _arm(fault)
    status = train.main(command)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _record_scans(loop: Any, path: Path) -> None:
    """Record the scans of each step in ``path``."""
    train_step = loop.train_step

    def recorded(engine: Any, loss: Any, batch: dict[str, Any], step: int, *rest: Any, **options: Any) -> Any:
        with path.open("a") as stream:
            stream.write(json.dumps([step, batch["scan"].tolist()]) + "\n")
        return train_step(engine, loss, batch, step, *rest, **options)

    loop.train_step = recorded


def _arm(fault: Fault) -> None:
    seen = 0

    def strike() -> None:
        nonlocal seen
        seen += 1
        if seen != fault.nth + 1:
            return
        if fault.delay > 0:
            threading.Timer(fault.delay, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        else:
            os.kill(os.getpid(), signal.SIGKILL)

    if fault.point in POINTS:
        POINTS[fault.point](strike)
    else:
        at_phase(fault.point, strike)


def at_phase(beginning: str, strike: Callable[[], None]) -> None:
    """Call ``strike`` when this rank begins a watchdog phase whose text starts with ``beginning``."""
    from infra.watchdog import Watchdog

    begin = Watchdog.begin

    def watched(self: Watchdog, text: str, slow: bool = False) -> None:
        begin(self, text, slow)
        if text.startswith(beginning):
            strike()

    Watchdog.begin = watched  # type: ignore[method-assign]


def _in_shard(strike: Callable[[], None]) -> None:
    """When half of one of DeepSpeed's files is written."""
    import torch

    save = torch.save

    def cut(content: Any, target: Any, *rest: Any, **options: Any) -> None:
        save(content, target, *rest, **options)
        if isinstance(target, str) and ".unfinished-" in target:
            os.truncate(target, Path(target).stat().st_size // 2)
            strike()

    torch.save = cut


def _before_rename(strike: Callable[[], None]) -> None:
    """When the checkpoint is complete under its temporary name."""
    _around(Path, "rename", strike, before=True, which=lambda path, target: Path(target).name.startswith("step-"))


def _before_pointer(strike: Callable[[], None]) -> None:
    """When the checkpoint has its final name, and ``latest`` still names the one before."""
    _around(os, "replace", strike, before=True, which=lambda source, target: Path(target).name == "latest")


def _after_pointer(strike: Callable[[], None]) -> None:
    """When ``latest`` has moved, before the other ranks continue and MLflow is updated."""
    _around(os, "replace", strike, before=False, which=lambda source, target: Path(target).name == "latest")


def _in_cleaning(strike: Callable[[], None]) -> None:
    """When an old checkpoint has been renamed, before it is removed."""
    _around(
        Path, "rename", strike, before=False, which=lambda path, target: Path(target).name.startswith(".unfinished-")
    )


def _around(owner: Any, name: str, strike: Callable[[], None], before: bool, which: Callable[..., bool]) -> None:
    original = getattr(owner, name)

    def wrapped(*arguments: Any) -> Any:
        hit = which(*arguments)
        if hit and before:
            strike()
        result = original(*arguments)
        if hit and not before:
            strike()
        return result

    setattr(owner, name, wrapped)


POINTS = {
    "in a shard": _in_shard, "before the rename": _before_rename, "before the pointer": _before_pointer,
    "after the pointer": _after_pointer, "in the cleaning": _in_cleaning,
}  # fmt: skip
