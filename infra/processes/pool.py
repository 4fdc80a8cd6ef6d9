"""A function over many tasks in worker processes that do not import the caller's script, which needs no guard therefore."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    pipe: Connection
    task: int = -1  # number of the task that it works on

    def close(self) -> None:
        """End the process, which waits for a task or is not needed any more."""
        self.pipe.close()
        self.process.kill()
        self.process.wait()


def map_in_processes(function: Callable[[Any], Any], tasks: Sequence[Any], processes: int) -> Iterator[Any]:
    """Yield ``function(task)`` of each task, in the order of the tasks.

    Args:
        function: a function of a module, which the workers import.
        tasks: its arguments; they and the results are pickled.
        processes: number of workers. They end with this process, whatever ends it.

    Raises:
        RuntimeError: if a worker dies. An error that ``function`` raises is raised here.
    """
    results: dict[int, Any] = {}
    with ExitStack() as stack:
        workers = [_start(function) for _ in range(min(processes, len(tasks)))]
        for worker in workers:
            stack.callback(worker.close)
        left = iter(range(len(tasks)))
        for worker in workers:
            _give(worker, tasks, left)
        for number in range(len(tasks)):
            while number not in results:
                for pipe in wait([worker.pipe for worker in workers if worker.task >= 0]):
                    worker = next(worker for worker in workers if worker.pipe is pipe)
                    results[worker.task] = _result(worker)
                    _give(worker, tasks, left)
            yield results.pop(number)


def _start(function: Callable[[Any], Any]) -> _Worker:
    own_end, worker_end = Pipe()
    command = [sys.executable, "-c", "from infra.processes.pool import serve; serve()", str(worker_end.fileno())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(command, pass_fds=[worker_end.fileno()], env=environment, stdin=subprocess.DEVNULL)
    worker_end.close()
    own_end.send(function)
    return _Worker(process, own_end)


def _give(worker: _Worker, tasks: Sequence[Any], left: Iterator[int]) -> None:
    worker.task = next(left, -1)
    if worker.task >= 0:
        worker.pipe.send(tasks[worker.task])


def _result(worker: _Worker) -> Any:
    try:
        error, result = worker.pipe.recv()
    except EOFError:
        status = worker.process.wait()
        raise RuntimeError(f"a worker process has died (status {status}); is there enough memory?") from None
    if error is not None:
        raise error
    return result


def serve() -> None:
    """Be a worker: compute the function for every task that arrives, until the pipe is closed."""
    pipe = Connection(int(sys.argv[1]))
    try:
        function = pipe.recv()
        while True:
            task = pipe.recv()
            try:
                error, result = None, function(task)
            except Exception as raised:
                error, result = raised, None
            pipe.send((error, result))
    except (EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        return  # the other process has ended or has been interrupted
