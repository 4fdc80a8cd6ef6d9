"""Reader processes: they read, check, decode and draw ahead of the training process, in bounded memory.

Each process has a pipe and a block of shared memory of its own and shares no lock with anyone, so that a process killed at
any moment leaves nothing locked: its end of the pipe closes, a new process takes its place and is asked again for what
was outstanding. Since samples are a pure function of the step, the batches are the same as if nothing had happened.
(DALI's own worker pool shares queues; one killed while it holds their lock leaves the trainer waiting for ever.)

Memory: ``depth + 1`` steps, each count x ``source.sample_bytes``, in all processes together; a process is never asked for
more. The memory is anonymous (memfd) and goes with the last process that maps it, however that ends.
"""

from __future__ import annotations

import math
import mmap
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from typing import Any

import numpy as np

from data_pipeline.loading.source import Sample, Source, sample_bytes
from infra.errors import LoaderError

MOST_DEATHS = 3  # of reader processes between two batches; more is no accident
_ALIGN = 64


@dataclass
class _Reader:
    process: subprocess.Popen[bytes]
    pipe: Connection
    memory: mmap.mmap
    places: list[int]
    waiting: list[int] = field(default_factory=list)  # steps asked for and not yet received


class ReaderProcesses:
    """``workers`` processes; ``get(step)`` gives the samples of one step after the other, read ``depth`` steps ahead.

    The arrays lie in shared memory and hold until the next ``get``.
    """

    def __init__(self, source: Source, *, workers: int, first_step: int, depth: int) -> None:
        self._source, self._slots, self._step = source, depth + 1, first_step
        count = source.count()
        self._shares = [list(range(number, count, workers)) for number in range(min(workers, count))]
        self._slot_bytes = [len(share) * sample_bytes(source.settings, source.shape) for share in self._shares]
        self._deaths = 0
        self._readers: list[_Reader] = []
        try:
            self._readers = [self._start(number) for number in range(len(self._shares))]
            for step in range(first_step, first_step + depth):
                self._ask(step)
        except BaseException:
            self.close()
            raise

    @property
    def bytes(self) -> int:
        """Shared memory in all, in bytes."""
        return self._slots * sum(self._slot_bytes)

    @property
    def pids(self) -> list[int]:
        """Process ids."""
        return [reader.process.pid for reader in self._readers]

    def get(self, step: int) -> list[Sample]:
        """The samples of the next step. LoaderError where a process fails, or dies again and again."""
        assert step == self._step, f"asked for step {step}, next is {self._step}"
        # The slot of the step before is free from here on, and is filled with the last of the steps ahead.
        self._ask(step + self._slots - 1)
        samples: dict[int, Sample] = {}
        for number in range(len(self._readers)):
            samples.update(zip(self._shares[number], self._receive(number, step), strict=True))
        self._step += 1
        self._deaths = 0
        return [samples[place] for place in range(len(samples))]

    def close(self) -> None:
        """Stop the processes."""
        for reader in self._readers:
            reader.pipe.close()
            reader.process.kill()
        for reader in self._readers:
            reader.process.wait()
        self._readers = []

    def _ask(self, step: int) -> None:
        for number, reader in enumerate(self._readers):
            reader.waiting.append(step)
            try:
                reader.pipe.send(step)
            except OSError:
                self._replace(number)

    def _receive(self, number: int, step: int) -> list[Sample]:
        while True:
            reader = self._readers[number]
            try:
                found, answer = pickle.loads(reader.pipe.recv_bytes())
            except (EOFError, OSError):
                self._replace(number)
                continue
            if isinstance(answer, str):
                raise LoaderError(answer)
            assert found == step == reader.waiting.pop(0), f"expected step {step}, a reader process gave {found}"
            return [Sample(row, bad, [_view(reader.memory, *where) for where in arrays]) for row, bad, arrays in answer]

    def _replace(self, number: int) -> None:
        dead = self._readers[number]
        dead.pipe.close()
        dead.process.kill()
        how = _how(dead.process.wait())
        self._deaths += 1
        if self._deaths > MOST_DEATHS:
            raise LoaderError(
                f"reader processes died {self._deaths} times at one batch (the last {how}); where memory ran out, lower "
                "data.workers or data.prefetch"
            )
        print(f"data: a reader process was lost ({how}) and is started again; no scan is lost", file=sys.stderr)
        waiting = dead.waiting
        # What earlier samples still show lies in the old memory, which lives as long as they do.
        self._readers[number] = self._start(number)
        for step in waiting:
            self._readers[number].waiting.append(step)
            try:
                self._readers[number].pipe.send(step)
            except OSError:
                self._readers[number].waiting = waiting
                self._replace(number)
                return

    def _start(self, number: int) -> _Reader:
        size = max(mmap.PAGESIZE, self._slots * self._slot_bytes[number])
        handle = os.memfd_create("yaware-reader")
        os.ftruncate(handle, size)
        here, there = Pipe()
        fds = (there.fileno(), handle)
        command = [
            sys.executable,
            "-c",
            "from data_pipeline.loading.reader_processes import serve; serve()",
            *map(str, fds),
            str(size),
        ]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        process = subprocess.Popen(command, pass_fds=fds, env=environment, stdin=subprocess.DEVNULL)
        memory = mmap.mmap(handle, size)
        os.close(handle)
        there.close()
        reader = _Reader(process, here, memory, self._shares[number])
        with suppress(OSError):  # it died at once; the next send or receive finds out
            here.send((self._source, reader.places, self._slots, self._slot_bytes[number]))
        return reader


def serve() -> None:
    """A reader process's life: steps come in by the pipe, arrays go out by memory, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the training process's to handle
    pipe_handle, memory_handle, size = map(int, sys.argv[1:4])
    memory = mmap.mmap(memory_handle, size)
    pipe = Connection(pipe_handle)
    try:
        source, places, slots, slot_bytes = pipe.recv()
        while True:
            step = pipe.recv()
            pipe.send_bytes(pickle.dumps((step, _answer(source, step, places, memory, (step % slots) * slot_bytes))))
    except (EOFError, OSError):
        os._exit(0)  # the training process has gone, or has closed the loader


def _answer(source: Source, step: int, places: Sequence[int], memory: mmap.mmap, start: int) -> Any:
    try:
        answer = []
        for row, bad, arrays in source.samples(step, places):
            where = []
            for array in arrays:
                place = (start, array.shape, array.dtype.str)
                _view(memory, *place)[...] = array
                where.append(place)
                start += -(-array.nbytes // _ALIGN) * _ALIGN
            answer.append((row, bad, where))
        return answer
    except LoaderError as error:
        return str(error)
    except Exception as error:
        return f"step {step}: a reader process failed: {type(error).__name__}: {' '.join(str(error).split())}"


def _view(memory: mmap.mmap, start: int, shape: tuple[int, ...], dtype: str) -> Any:
    return np.frombuffer(memory, dtype, math.prod(shape), start).reshape(shape)


def _how(status: int) -> str:
    return f"by signal {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
