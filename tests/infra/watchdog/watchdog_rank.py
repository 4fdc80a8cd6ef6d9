"""A rank under the watchdog that only pretends to load, exchange and write; test_watchdog.py chooses what goes wrong.

usage: watchdog_rank.py SECONDS {"RANK": "what it does at step 3", "late": "the rank that connects late", ...}
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from infra import distributed, watchdog


class SameEverywhere(RuntimeError):
    """An error that all ranks raise, as NotFinite is."""


def fail(error: type[Exception]) -> None:
    raise error("out of memory")


ACTIONS = {
    "hang": lambda: time.sleep(600),
    "hold python's lock": lambda: ctypes.PyDLL(None).sleep(600),
    "raise": lambda: fail(RuntimeError),
    "raise everywhere": lambda: fail(SameEverywhere),
    "take twice as long but beat": lambda: [(time.sleep(0.5), watchdog.beat()) for _ in range(12)],
}


def main(seconds: float, actions: dict[str, str]) -> None:
    dist.init_process_group("gloo")
    try:
        watched(seconds, actions)
    finally:
        print("SIGTERM:", signal.getsignal(signal.SIGTERM), flush=True)
        dist.destroy_process_group()  # as pretrain.train does; otherwise gloo's threads may abort the exiting process
    print("done", flush=True)


@contextmanager
def sigterm_recorded() -> Iterator[None]:
    """Ignore SIGTERM within the block, as pretrain.run.stop does while ranks train.

    Until the watchdog has ended: a signal between the two would end the rank, whose death the launching command then names.
    """
    signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def watched(seconds: float, actions: dict[str, str]) -> None:
    """Make six steps and a checkpoint."""
    if actions.get("late") == str(distributed.rank()):
        reduce_scalars = distributed.reduce_scalars
        distributed.reduce_scalars = lambda *given: (reduce_scalars(*given), time.sleep(1))[0]
    with sigterm_recorded(), watchdog.Watchdog(seconds):
        watchdog.connect()
        for step in range(6):
            watchdog.phase(f"the loading of batch {step}")
            if step == 3 and str(distributed.rank()) in actions:
                print("at step 3", flush=True)
                ACTIONS[actions[str(distributed.rank())]]()
            watchdog.phase(f"the exchange of step {step}")
            dist.all_reduce(torch.ones(1))
            watchdog.steady()
        watchdog.phase("the writing of the checkpoint", slow=True)
        if actions.get("checkpoint") == "slow":
            time.sleep(1.5 * seconds)
        dist.barrier()


if __name__ == "__main__":
    main(float(sys.argv[1]), json.loads(sys.argv[2]))
