"""A function over many tasks in worker processes. They do not import the caller's script, so it needs no guard."""

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
        workers: list[_Worker] = []
        left = iter(range(len(tasks)))
        for _ in range(min(processes, len(tasks))):
            workers.append(_start())
            stack.callback(workers[-1].close)
            _send(workers[-1], function)
            _give(workers[-1], tasks, left)
        for number in range(len(tasks)):
            while number not in results:
                for pipe in wait([worker.pipe for worker in workers if worker.task >= 0]):
                    worker = next(worker for worker in workers if worker.pipe is pipe)
                    results[worker.task] = _result(worker)
                    _give(worker, tasks, left)
            yield results.pop(number)


def importing_environment() -> dict[str, str]:
    """Return the environment for a new Python that imports what this one can import."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _start() -> _Worker:
    own_end, worker_end = Pipe()
    command = [sys.executable, "-c", "from infra.processes.pool import serve; serve()", str(worker_end.fileno())]
    process = subprocess.Popen(
        command, pass_fds=[worker_end.fileno()], env=importing_environment(), stdin=subprocess.DEVNULL
    )
    worker_end.close()
    return _Worker(process, own_end)


def _give(worker: _Worker, tasks: Sequence[Any], left: Iterator[int]) -> None:
    worker.task = next(left, -1)
    if worker.task >= 0:
        _send(worker, tasks[worker.task])


def _send(worker: _Worker, content: Any) -> None:
    try:
        worker.pipe.send(content)
    except ConnectionError:
        raise _died(worker) from None


def _result(worker: _Worker) -> Any:
    try:
        error, result = worker.pipe.recv()
    except (EOFError, ConnectionError):
        raise _died(worker) from None
    if error is not None:
        raise error
    return result


def _died(worker: _Worker) -> RuntimeError:
    return RuntimeError(f"a worker process has died (status {worker.process.wait()}); is there enough memory?")


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
    except (EOFError, ConnectionError, KeyboardInterrupt):
        return  # the other process has ended or has been interrupted
