"""Run a function on several gloo ranks of this machine, each a new process with one thread; for every environment."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch


def _serve(case: Callable[..., Any], rank: int, store: tuple[int, int], answer: Connection, arguments: Any) -> None:
    ranks, port = store
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
        answer.send((True, case(rank, **arguments)))
    except Exception as error:
        answer.send((False, f"{type(error).__name__}: {error}"))
        raise
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def on_ranks(case: Callable[..., Any], ranks: int, **arguments: Any) -> list[Any]:
    """Return ``case(rank, **arguments)`` of every rank; ``case`` is a function of an importable module.

    Raises:
        RuntimeError: if a rank fails; the others are ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(ranks):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_serve, args=(case, rank, (ranks, port), theirs, arguments), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    answers: dict[int, Any] = {}
    try:
        while len(answers) < ranks:
            for pipe in wait([pipe for rank, pipe in enumerate(pipes) if rank not in answers]):
                rank = pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    fine, answers[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    fine, answers[rank] = False, "it ended without an answer"
                if not fine:
                    raise RuntimeError(f"rank {rank}: {answers[rank]}")
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()
    return [answers[rank] for rank in range(ranks)]


def together(found: list[list[tuple[float, float]]]) -> dict[str, float]:
    """Return the CPU seconds of all ranks a step, and the wall-clock seconds of the slowest, from each rank's steps."""
    steps = len(found[0])
    cpu = sum(cpu for rank in found for cpu, _ in rank) / steps
    return {"cpu": cpu, "wall": max(sum(wall for _, wall in rank) for rank in found) / steps}
