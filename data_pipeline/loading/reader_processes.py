"""Reader processes: they read, check, decode and draw ahead of the training process, with bounded memory.

Each process has its own pipe and its own block of shared memory and shares no lock, so a process that is killed at any moment
leaves nothing locked: its end of the pipe closes, and a new process takes its place and is sent the outstanding steps again.
Samples depend only on the step, so the batches are the same as without the failure. (DALI's own worker pool shares queues; a
worker killed while it holds their lock leaves the trainer waiting forever.)

Memory: ``depth + 1`` steps of count x ``source.sample_bytes`` in all processes together. A process is never sent more steps
than that. The memory is anonymous (memfd) and is freed with the last process that maps it, however that process ends.
"""

from __future__ import annotations

import math
import mmap
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from typing import Any

import numpy as np

from data_pipeline.loading.source import Sample, Source, sample_bytes
from infra.errors import LoaderError
from infra.processes.pool import importing_environment

MAX_DEATHS = 3  # of reader processes between two batches; more have a lasting cause
ALIGNMENT = 64  # bytes
# A terminal (Ctrl-C) and SLURM send these to all processes of a job. The training process handles them: it saves and closes
# the pipes, at which the reader processes end.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass
class _Reader:
    process: subprocess.Popen[bytes]
    pipe: Connection
    memory: mmap.mmap
    positions: list[int]
    pending: list[int] = field(default_factory=list)  # steps that were requested and not yet received


class ReaderProcesses:
    """Processes that read the samples of consecutive steps, ``depth`` steps ahead.

    The arrays that ``get`` returns are in shared memory and valid until the next ``get``.

    Args:
        source: produces the samples; it is pickled to every process.
        workers: number of processes; each reads every ``workers``-th sample of a step.
        first_step: the first step.
        depth: how many steps are read ahead.
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
                self._request(step)
        except BaseException:
            self.close()
            raise

    @property
    def bytes(self) -> int:
        """Total shared memory in bytes."""
        return self._slots * sum(self._slot_bytes)

    @property
    def pids(self) -> list[int]:
        """Process ids."""
        return [reader.process.pid for reader in self._readers]

    def get(self, step: int) -> list[Sample]:
        """Return the samples of the next step. Raises LoaderError if a process fails, or if processes keep dying."""
        assert step == self._step, f"step {step} was requested, the next is {self._step}"
        # The previous step's slot is free now; reuse the slot for the furthest prefetched step.
        self._request(step + self._slots - 1)
        samples: dict[int, Sample] = {}
        for number in range(len(self._readers)):
            samples.update(zip(self._shares[number], self._receive(number, step), strict=True))
        self._step += 1
        self._deaths = 0
        return [samples[position] for position in range(len(samples))]

    def close(self) -> None:
        """Stop the processes."""
        for reader in self._readers:
            reader.pipe.close()
            reader.process.kill()
        for reader in self._readers:
            reader.process.wait()
        self._readers = []

    def _request(self, step: int) -> None:
        for number, reader in enumerate(self._readers):
            reader.pending.append(step)
            try:
                reader.pipe.send(step)
            except OSError:
                self._replace(number)

    def _receive(self, number: int, step: int) -> list[Sample]:
        while True:
            reader = self._readers[number]
            try:
                answered, answer = pickle.loads(reader.pipe.recv_bytes())
            except (EOFError, OSError):
                self._replace(number)
                continue
            if isinstance(answer, str):
                raise LoaderError(answer)
            assert answered == step == reader.pending.pop(0), f"step {step} was expected, a reader sent {answered}"
            return [
                Sample(row, bad, shown, [_array_at(reader.memory, *location) for location in locations])
                for row, bad, shown, locations in answer
            ]

    def _replace(self, number: int) -> None:
        """Start a new process in place of a dead one and request its pending steps again."""
        dead = self._readers[number]
        dead.pipe.close()
        dead.process.kill()
        cause = _describe_exit(dead.process.wait())
        self._deaths += 1
        if self._deaths > MAX_DEATHS:
            raise LoaderError(
                f"reader processes died {self._deaths} times at one batch (the last {cause}); if memory ran out, lower "
                "data.workers or data.prefetch"
            )
        print(f"data: a reader process was lost ({cause}) and is started again; no scan is lost", file=sys.stderr)
        pending = dead.pending
        # Arrays of earlier samples refer to the old memory and keep it alive.
        self._readers[number] = self._start(number)
        for step in pending:
            self._readers[number].pending.append(step)
            try:
                self._readers[number].pipe.send(step)
            except OSError:
                self._readers[number].pending = pending
                self._replace(number)
                return

    def _start(self, number: int) -> _Reader:
        size = max(mmap.PAGESIZE, self._slots * self._slot_bytes[number])
        handle = os.memfd_create("yaware-reader")
        os.ftruncate(handle, size)
        own_end, reader_end = Pipe()
        fds = (reader_end.fileno(), handle)
        command = [
            sys.executable,
            "-c",
            "from data_pipeline.loading.reader_processes import serve; serve()",
            *map(str, fds),
            str(size),
        ]
        with _blocked(SIGNALS):  # the process inherits the mask, until it ignores them
            process = subprocess.Popen(command, pass_fds=fds, env=importing_environment(), stdin=subprocess.DEVNULL)
        memory = mmap.mmap(handle, size)
        os.close(handle)
        reader_end.close()
        reader = _Reader(process, own_end, memory, self._shares[number])
        with suppress(OSError):  # the process has died already; the next send or receive notices it
            own_end.send((self._source, reader.positions, self._slots, self._slot_bytes[number]))
        return reader


@contextmanager
def _blocked(signals: Sequence[signal.Signals]) -> Iterator[None]:
    """Hold signals back from this thread within the block; they arrive at its end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve() -> None:
    """Run a reader process: receive steps from the pipe and write arrays to shared memory until the pipe is closed."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    pipe_handle, memory_handle, size = map(int, sys.argv[1:4])
    memory = mmap.mmap(memory_handle, size)
    pipe = Connection(pipe_handle)
    try:
        source, positions, slots, slot_bytes = pipe.recv()
        while True:
            step = pipe.recv()
            start = (step % slots) * slot_bytes
            pipe.send_bytes(pickle.dumps((step, _answer(source, step, positions, memory, start))))
    except (EOFError, OSError):
        os._exit(0)  # the training process ended or closed the loader


def _answer(source: Source, step: int, positions: Sequence[int], memory: mmap.mmap, start: int) -> Any:
    """Write a step's samples to memory from ``start`` on; return their rows and array locations, or an error's text."""
    try:
        answer = []
        for row, bad, shown, arrays in source.samples(step, positions):
            locations = []
            for array in arrays:
                location = (start, array.shape, array.dtype.str)
                _array_at(memory, *location)[...] = array
                locations.append(location)
                start += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
            answer.append((row, bad, shown, locations))
        return answer
    except LoaderError as error:
        return str(error)
    except Exception as error:
        return f"step {step}: a reader process failed: {type(error).__name__}: {' '.join(str(error).split())}"


def _array_at(memory: mmap.mmap, start: int, shape: tuple[int, ...], dtype: str) -> Any:
    return np.frombuffer(memory, dtype, math.prod(shape), start).reshape(shape)


def _describe_exit(status: int) -> str:
    return f"by signal {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
