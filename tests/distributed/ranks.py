"""Real ranks for tests: processes that communicate over gloo and are started once for many cases.

A pool of W processes serves every world size up to W: a case for w ranks runs on the first w processes, in their own process
group. A case is a function ``case(group, rank, **arguments)`` of an importable module; the test receives its results, one per
rank.
"""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from infra.processes.scratch import scratch_folder
from tests.forkserver import imported

TIMEOUT_S = 120


def _serve(rank: int, world: int, store: str, inbox: Connection) -> None:
    # All ranks share the few cores of the machine.
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    timeout = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)
    answer_cases(
        rank, {size: dist.new_group(list(range(size)), timeout=timeout) for size in range(1, world + 1)}, inbox
    )


def answer_cases(rank: int, groups: dict[int, Any], inbox: Connection) -> None:
    """Run the cases that the test sends, each in the group of its world size, until it sends None."""
    inbox.send((True, "ready"))
    while (message := inbox.recv()) is not None:
        case, size, arguments = message
        try:
            inbox.send((True, case(groups[size], rank, **arguments)))
        except Exception:
            inbox.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """``Ranks(3).run(case, 2, **arguments)`` runs a case on two of three processes. Use it as a context manager.

    If a rank fails, the others wait in a collective; all processes are then ended and started again.
    """

    def __init__(self, world: int, serve: Callable[[int, int, str, Connection], None] = _serve) -> None:
        self._world, self._serve = world, serve
        self._start()

    def _start(self) -> None:
        context = imported()
        self._scratch = contextlib.ExitStack()
        store = str(self._scratch.enter_context(scratch_folder("ranks")) / "store")
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(self._world):
            ours, theirs = context.Pipe()
            process = context.Process(target=self._serve, args=(rank, self._world, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        assert set(self._answers(self._world)) == {"ready"}

    def run(self, case: Callable[..., Any], world_size: int, **arguments: Any) -> list[Any]:
        """Return the case's result on each of the first ``world_size`` ranks; raises AssertionError if a rank failed."""
        for pipe in self._pipes[:world_size]:
            pipe.send((case, world_size, arguments))
        try:
            return self._answers(world_size)
        except AssertionError:
            self._end(patience_s=0)
            self._start()
            raise

    def _answers(self, world_size: int) -> list[Any]:
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + TIMEOUT_S
        while len(answers) < world_size:
            waiting = {self._pipes[rank]: rank for rank in range(world_size) if rank not in answers}
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            assert ready, f"ranks {sorted(waiting.values())} gave no answer within {TIMEOUT_S} s"
            for pipe in ready:
                rank = waiting[pipe]
                try:
                    fine, result = pipe.recv()
                except EOFError:
                    raise AssertionError(f"rank {rank} died") from None
                assert fine, f"rank {rank}:\n{result}"
                answers[rank] = result
        return [answers[rank] for rank in range(world_size)]

    def _end(self, patience_s: float) -> None:
        for process in self._processes:
            process.join(patience_s)
            if process.is_alive():
                process.kill()
                process.join()
        self._scratch.close()

    def __enter__(self) -> Ranks:
        return self

    def ask_to_end(self) -> None:
        """Ask the ranks to end without waiting for them, so that several pools can end at the same time."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)

    def __exit__(self, *_: object) -> None:
        self.ask_to_end()
        self._end(patience_s=10)
