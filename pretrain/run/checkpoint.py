"""Checkpoints that survive a kill at any moment.

A checkpoint is a folder ``step-XXXXXXXX``. It is written under a temporary name by all ranks, flushed and summed
(checksums.json), and renamed by rank 0 once every rank is done; only then does the pointer ``latest`` move, by an
atomic replace. DeepSpeed's own pointer is not used: rank 0 moves it without waiting for the others (measured: a rank
killed in mid-write leaves it naming a truncated shard).
"""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from infra import distributed
from infra.errors import UserError
from infra.files import atomic_write, flush_folder, sha256_of, write_json
from pretrain.engine.engine import load_engine, load_scaler_state, save_engine, scaler_state
from pretrain.engine.partitions import layout
from pretrain.engine.reshard import load_resharded

PREFIX, BEST = "step-", "best"
UNFINISHED, DAMAGED = ".unfinished-", "damaged-"


class CheckpointFailed(RuntimeError):
    """A checkpoint could not be written; raised on every rank, with the last good one as it was."""


def step_folder(checkpoints: Path, step: int) -> Path:
    """``checkpoints/step-00000120``."""
    return checkpoints / f"{PREFIX}{step:08d}"


def save_checkpoint(
    checkpoints: Path, step: int, engine: Any, state: dict[str, Any], write_rest: Callable[[Path], None]
) -> Path:
    """Write the state after ``step`` steps; collective. ``write_rest(folder)`` adds rank 0's files (the encoder).

    ``state`` (plain JSON values, the same on every rank) comes back from ``load_checkpoint``. CheckpointFailed where any
    rank cannot write (a full disk): what was written of it is removed, older checkpoints stay.
    """
    final = step_folder(checkpoints, step)
    temporary = checkpoints / f"{UNFINISHED}{final.name}"
    with _on_all_ranks(temporary):
        if distributed.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    with _on_all_ranks(temporary):
        save_engine(engine, checkpoints, temporary.name)
        _write_random_state(temporary)
        if distributed.is_main():
            shape = {"world_size": distributed.world_size(), "zero_stage": int(engine.zero_optimization_stage())}
            form = {"layout": layout(engine), "loss_scaler": scaler_state(engine)}
            write_json(temporary / "state.json", {**state, **shape, **form, "step": step})
            write_rest(temporary)
    _write_checksums(temporary)
    with _on_all_ranks(temporary):
        if distributed.is_main():
            if final.exists():
                # Left by a run that was stopped after this step and resumed from an earlier one; the new one is the same.
                shutil.rmtree(final)
            temporary.rename(final)
            flush_folder(checkpoints)
            _point_to(checkpoints, "latest", final)
            flush_folder(checkpoints)
    return final


@contextmanager
def _on_all_ranks(temporary: Path) -> Iterator[None]:
    """A barrier behind what is done within; what any rank cannot write stops all of them. Collective."""
    problem = ""
    try:
        yield
    except OSError as error:
        problem = f"rank {distributed.rank()} on {socket.gethostname()}: {' '.join(str(error).split())[:200]}"
    problems = _gather(problem)
    if any(problems):
        checkpoints, name = temporary.parent, temporary.name.removeprefix(UNFINISHED)
        newest = newest_step(checkpoints)
        free = _free_space(checkpoints)
        dist.barrier()  # no rank looks at the disk while it is cleaned
        if distributed.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointFailed(
            f"checkpoint {name} cannot be written to {checkpoints} ({next(filter(None, problems))}; {free}); "
            + (f"step {newest} is the last good one; " if newest is not None else "there is none yet; ")
            + "make room or lower checkpoint.keep, then start the same command again"
        )


def _gather(text: str) -> list[str]:
    """Every rank's text, by rank. Collective."""
    every: list[Any] = [None] * distributed.world_size()
    dist.all_gather_object(every, text)
    return every


def _free_space(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB free there"
    except OSError as error:
        return str(error)


def resume(
    checkpoints: Path, engine: Any, how: str = "auto", fits: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any] | None:
    """What ``run.resume`` asks for: the run's own newest checkpoint, none, or one of another run. Collective.

    ``auto``: the run's own. ``never``: UserError where there is one. A path (a run's folder or one of its checkpoints) is
    where a new run begins; once it has checkpoints of its own, these go before. ``fits(state)`` raises UserError where
    another run's checkpoint is of no use to this one.
    """
    own = newest_step(checkpoints)
    if how == "never" and own is not None:
        raise UserError(
            f"{checkpoints} holds a checkpoint of step {own}; choose another run.output, or run.resume=auto"
        )
    if how in ("auto", "never") or own is not None:
        return load_checkpoint(checkpoints, engine)
    given = Path(how)
    folder = given if (given / "state.json").is_file() else None
    state = load_checkpoint(given.parent if folder else given / "checkpoints", engine, folder, own=False, fits=fits)
    if state is None:
        raise UserError(
            f"run.resume={how} is no checkpoint; give auto, never, a run's folder or its checkpoints/step-*"
        )
    return state


def load_checkpoint(
    checkpoints: Path, engine: Any, only: Path | None = None, own: bool = True,
    fits: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any] | None:  # fmt: skip
    """Load the newest checkpoint that verifies on every rank (or ``only`` that); None where there is none. Collective.

    Written on another number of ranks, or under another ZeRO stage, it is converted first (pretrain.engine.reshard). Damaged
    ones are passed over, and set aside where they are this run's ``own``; UserError where there are no others. The state
    comes back with ``folder``, where it was read.
    """
    damaged: dict[Path, str] = {}
    for folder in [only] if only else _newest_first(checkpoints):
        problems = _gather(verify_checkpoint(folder, distributed.rank(), distributed.world_size()) or "")
        if any(problems):
            damaged[folder] = next(filter(None, problems))
            if distributed.is_main():
                print(f"checkpoint {folder} is damaged ({damaged[folder]}); trying an older one", flush=True)
            continue
        if damaged and own and distributed.is_main():
            _set_aside(damaged, folder)
        state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if fits:
            fits(state)
        state["folder"] = str(folder)
        form, here = layout(engine), int(engine.zero_optimization_stage())
        stage, world_size = int(state.get("zero_stage", here)), int(state["world_size"])
        load_scaler_state(engine, state.get("loss_scaler"))
        same_ranks = world_size == distributed.world_size()
        if same_ranks and state.get("layout", form) == form and stage == here:
            load_engine(engine, folder.parent, folder.name)
            _read_random_state(folder)
            return state
        if distributed.is_main():
            print(f"checkpoint {folder.name} of {world_size} ranks under ZeRO {stage} is converted for "
                  f"{distributed.world_size()} under ZeRO {here}", flush=True)  # fmt: skip
        load_resharded(folder, stage, engine)
        if same_ranks:
            _read_random_state(folder)
        else:  # the old ranks' generators do not fit: new ones, the same whenever this resume is repeated
            torch.manual_seed(1_000_003 * int(state["step"]) + distributed.rank())
        return state
    if damaged:
        raise UserError(
            f"{only or checkpoints} holds no checkpoint that is whole ({'; '.join(damaged.values())}); bring one back from a "
            "copy, or choose another run.output to begin anew"
        )
    return None


def _set_aside(damaged: Iterable[Path], good: Path) -> None:
    """Out of the way of those that count, but not removed; ``latest`` names the good one. Rank 0 only."""
    for folder in damaged:
        aside = folder.with_name(f"{DAMAGED}{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    _point_to(good.parent, "latest", good)


def _point_to(checkpoints: Path, name: str, folder: Path) -> None:
    with atomic_write(checkpoints / name, "w") as pointer:
        pointer.write(folder.name + "\n")


def newest_step(checkpoints: Path) -> int | None:
    """The step that ``latest`` names, without verifying it; None where there is no checkpoint."""
    pointer = checkpoints / "latest"
    return int(pointer.read_text().strip().removeprefix(PREFIX)) if pointer.is_file() else None


def verify_checkpoint(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with every ``parts``-th file of a checkpoint, from ``part`` on; None where nothing is."""
    try:
        checksums: dict[str, str] = json.loads((folder / "checksums.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"checksums.json: {error}"
    for name in sorted(checksums)[part::parts]:
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256_of(folder / name) != checksums[name]:
            return f"{name} differs from its checksum"
    return None


def clean_checkpoints(checkpoints: Path, keep: int) -> None:
    """Remove what a killed run left unfinished and all but the ``keep`` newest checkpoints and the best. Rank 0 only."""
    for folder in checkpoints.glob(f"{UNFINISHED}*"):
        shutil.rmtree(folder, ignore_errors=True)
    pointer = checkpoints / BEST
    best = pointer.read_text().strip() if pointer.is_file() else None
    for folder in _newest_first(checkpoints)[keep:]:
        if folder.name == best:
            continue
        # Renamed first: a kill in mid-removal must not leave a folder that looks like a checkpoint.
        doomed = folder.with_name(f"{UNFINISHED}{folder.name}")
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def read_best(checkpoints: Path) -> dict[str, Any] | None:
    """Step and score of the best encoder so far, as ``note_best`` wrote them."""
    path = checkpoints / f"{BEST}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def note_best(checkpoints: Path, step: int, figure: str, score: float) -> None:
    """Keep the score (of ``figure``) of the encoder after ``step`` steps, the best so far. Rank 0 only."""
    write_json(checkpoints / f"{BEST}.json", {"step": step, "figure": figure, "score": score})


def point_to_best(checkpoints: Path, step: int) -> None:
    """Let the pointer ``best`` name a finished checkpoint. Rank 0 only."""
    _point_to(checkpoints, BEST, step_folder(checkpoints, step))


class Clock:
    """Says when ``minutes`` have gone by since the last checkpoint; None: never."""

    def __init__(self, minutes: float | None) -> None:
        self._seconds = None if minutes is None else 60.0 * minutes
        self.restart()

    def restart(self) -> None:
        """A checkpoint was written."""
        self._began = time.monotonic()

    def due(self) -> bool:
        """Whether the next is due."""
        return self._seconds is not None and time.monotonic() - self._began >= self._seconds


def _newest_first(checkpoints: Path) -> list[Path]:
    """Finished checkpoints, the one that ``latest`` names first, then older ones; newer ones than it last of all.

    A newer one than ``latest`` is whole but its pointer never moved; the pointer decides while it can be read.
    """
    folders = sorted(checkpoints.glob(f"{PREFIX}*"), reverse=True)
    newest = newest_step(checkpoints)
    if newest is None:
        return folders
    pointed = step_folder(checkpoints, newest)
    return [f for f in folders if f <= pointed] + [f for f in folders if f > pointed]


def _write_random_state(folder: Path) -> None:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    written = io.BytesIO()  # torch.save makes a RuntimeError of a full disk
    torch.save(states, written)
    (folder / f"random-{distributed.rank():05d}.pt").write_bytes(written.getbuffer())


def _read_random_state(folder: Path) -> None:
    states = torch.load(folder / f"random-{distributed.rank():05d}.pt", weights_only=True)
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _write_checksums(folder: Path) -> None:
    """Every rank flushes and sums its share of the files; rank 0 writes the list. Collective."""
    listed: list[list[str]] = [[]]
    if distributed.is_main():
        listed = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())]
    dist.broadcast_object_list(listed, src=0)
    share = listed[0][distributed.rank() :: distributed.world_size()]
    sums: dict[str, str] = {}
    with _on_all_ranks(folder):
        sums = {name: _flush_and_sum(folder / name) for name in share}
    gathered: list[Any] = [None] * distributed.world_size()
    dist.all_gather_object(gathered, sums)
    with _on_all_ranks(folder):
        if distributed.is_main():
            write_json(folder / "checksums.json", {name: digest for part in gathered for name, digest in part.items()})
            for inner in (path for path in folder.rglob("*") if path.is_dir()):
                flush_folder(inner)
            flush_folder(folder)


def _flush_and_sum(path: Path) -> str:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return sha256_of(path)
