"""Checkpoints that survive a kill at any moment.

A checkpoint is a folder ``step-XXXXXXXX``. All ranks write it under a temporary name, flush it and compute its checksums
(checksums.json). Rank 0 renames it when every rank is done, and then replaces the pointer ``latest`` atomically.
DeepSpeed's own pointer is not used, because its rank 0 moves it without waiting for the others: in a test, a rank killed
in the middle of a write left the pointer on a truncated file.
"""

from __future__ import annotations

import io
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

from infra import distributed, random_streams
from infra.errors import UserError
from infra.files import (
    atomic_write,
    flush_folder,
    open_file,
    read_object,
    read_text,
    regular_file,
    sha256_of,
    write_json,
)  # fmt: skip
from pretrain.engine.engine import load_engine, load_scaler_state, save_engine, scaler_state
from pretrain.engine.partitions import layout
from pretrain.engine.reshard import load_resharded
from pretrain.run.intact import read_state, refusal
from pretrain.run.intact import verify_checkpoint as verify_checkpoint
from pretrain.run.newest import newest_first
from pretrain.run.newest import newest_step as newest_step
from pretrain.run.newest import step_folder as step_folder

BEST = "best"
UNFINISHED, DAMAGED = ".unfinished-", "damaged-"  # before a checkpoint's name


class CheckpointFailed(RuntimeError):
    """A checkpoint could not be written. Raised on every rank; the last good checkpoint is unchanged."""


def save_checkpoint(
    checkpoints: Path, step: int, engine: Any, state: dict[str, Any], write_encoder: Callable[[Path], None]
) -> Path:
    """Write the state after ``step`` steps and return its folder. Collective.

    Args:
        checkpoints: the run's folder of checkpoints.
        step: steps done.
        engine: the DeepSpeed engine.
        state: JSON values, the same on every rank; ``load_checkpoint`` returns them.
        write_encoder: called on rank 0 with the folder, to add the encoder's files.

    Raises CheckpointFailed if any rank cannot write, for example to a full disk. The unfinished checkpoint is removed, older
    ones stay.
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
            ranks = {"world_size": distributed.world_size(), "zero_stage": int(engine.zero_optimization_stage())}
            engine_state = {"layout": layout(engine), "loss_scaler": scaler_state(engine)}
            write_json(temporary / "state.json", {**state, **ranks, **engine_state, "step": step})
            write_encoder(temporary)
    _write_checksums(temporary)
    with _on_all_ranks(temporary):
        if distributed.is_main():
            if final.exists():
                # An earlier attempt wrote this step before the run was resumed from an older one; both are equal.
                shutil.rmtree(final)
            temporary.rename(final)
            flush_folder(checkpoints)
            _point_to(checkpoints, "latest", final)
            flush_folder(checkpoints)
    return final


@contextmanager
def _on_all_ranks(temporary: Path) -> Iterator[None]:
    """Run the block, then a barrier; if any rank could not write, raise CheckpointFailed on all of them. Collective."""
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
        dist.barrier()  # all ranks have read the folder before it is cleaned
        if distributed.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointFailed(
            f"checkpoint {name} cannot be written to {checkpoints} ({next(filter(None, problems))}; {free}); "
            + (f"step {newest} is the last good one; " if newest is not None else "there is none yet; ")
            + "make room or lower checkpoint.keep, then start the same command again"
        )


def _gather(text: str) -> list[str]:
    """Return the texts of all ranks, ordered by rank. Collective."""
    texts: list[Any] = [None] * distributed.world_size()
    dist.all_gather_object(texts, text)
    return texts


def _free_space(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB free there"
    except OSError as error:
        return str(error)


def resume(
    checkpoints: Path, engine: Any, resume_from: str = "auto", fits: Callable[[dict[str, Any]], None] | None = None,
    *, trust: bool = False,
) -> dict[str, Any] | None:  # fmt: skip
    """Load the checkpoint that ``run.resume`` names; return its state, or None if the run starts anew. Collective.

    Args:
        checkpoints: the run's own folder of checkpoints.
        engine: the DeepSpeed engine.
        resume_from: "auto" loads the run's own newest checkpoint. "never" refuses a folder that has one. A path (a run's
            folder or one of its checkpoints) is where a new run starts; checkpoints of its own take precedence.
        fits: called with the state of another run's checkpoint; raises UserError if this run cannot use it.
        trust: whether a checkpoint of another user may be read.

    Raises UserError if there is no such checkpoint, if it is another user's or holds code, or if "never" finds one.
    """
    own = newest_step(checkpoints)
    if resume_from == "never" and own is not None:
        raise UserError(
            f"{checkpoints} holds a checkpoint of step {own}; choose another run.output, or run.resume=auto"
        )
    if resume_from in ("auto", "never") or own is not None:
        return load_checkpoint(checkpoints, engine, trust=trust)
    path = Path(resume_from)
    folder = path if (path / "state.json").exists() else None
    source = path.parent if folder else path / "checkpoints"
    state = load_checkpoint(source, engine, folder, own=False, fits=fits, trust=trust)
    if state is None:
        raise UserError(
            f"run.resume={resume_from} is not a checkpoint; use auto, never, a run's folder or one of its checkpoints/step-*"
        )
    return state


def load_checkpoint(
    checkpoints: Path, engine: Any, only: Path | None = None, own: bool = True,
    fits: Callable[[dict[str, Any]], None] | None = None, trust: bool = False,
) -> dict[str, Any] | None:  # fmt: skip
    """Load the newest intact checkpoint and return its state; None if there is no checkpoint. Collective.

    A checkpoint of another number of ranks or another ZeRO stage is converted (pretrain.engine.reshard). ``folder`` in the
    returned state is where it was read.

    Args:
        checkpoints: a folder of checkpoints.
        engine: the DeepSpeed engine.
        only: load this checkpoint and no other.
        own: whether the folder is this run's own; damaged checkpoints are then renamed to ``damaged-*``.
        fits: called with the state before loading; raises UserError if this run cannot use the checkpoint.
        trust: whether a checkpoint of another user may be read.

    Raises UserError if all checkpoints are damaged, or if the newest is another user's or holds code.
    """
    damaged: dict[Path, str] = {}
    rank_and_ranks = (distributed.rank(), distributed.world_size())
    for folder in [only] if only else newest_first(checkpoints):
        problems = _gather(verify_checkpoint(folder, *rank_and_ranks) or "")
        if any(problems):
            damaged[folder] = next(filter(None, problems))
            if distributed.is_main():
                print(f"checkpoint {folder} is damaged ({damaged[folder]}); trying an older one", flush=True)
            continue
        if any(refusals := _gather(refusal(folder, trust, *rank_and_ranks))):
            raise UserError(next(filter(None, refusals)))
        if damaged and own and distributed.is_main():
            _set_aside(damaged, folder)
        state = read_state(folder)
        if fits:
            fits(state)
        state["folder"] = str(folder)
        own_layout, own_stage = layout(engine), int(engine.zero_optimization_stage())
        stage, world_size = int(state.get("zero_stage", own_stage)), int(state["world_size"])
        load_scaler_state(engine, state.get("loss_scaler"))
        same_ranks = world_size == distributed.world_size()
        if same_ranks and state.get("layout", own_layout) == own_layout and stage == own_stage:
            load_engine(engine, folder.parent, folder.name)
            _read_random_state(folder)
            return state
        if distributed.is_main():
            print(f"checkpoint {folder.name} of {world_size} ranks under ZeRO {stage} is converted for "
                  f"{distributed.world_size()} under ZeRO {own_stage}", flush=True)  # fmt: skip
        load_resharded(folder, stage, engine)
        if same_ranks:
            _read_random_state(folder)
        else:  # the old ranks' random states do not fit; seed new ones, equal in every repetition of this resume
            torch.manual_seed(random_streams.resumed_seed(int(state["step"]), distributed.rank()))
        return state
    if damaged:
        raise UserError(
            f"{only or checkpoints} holds no intact checkpoint ({'; '.join(damaged.values())}); restore one from a copy, or "
            "choose another run.output to start anew"
        )
    return None


def _set_aside(damaged: Iterable[Path], good: Path) -> None:
    """Rename damaged checkpoints and point ``latest`` to the good one. Rank 0 only."""
    for folder in damaged:
        aside = folder.with_name(f"{DAMAGED}{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    _point_to(good.parent, "latest", good)


def _point_to(checkpoints: Path, name: str, folder: Path) -> None:
    with atomic_write(checkpoints / name, "w") as pointer:
        pointer.write(folder.name + "\n")


def clean_checkpoints(checkpoints: Path, keep: int) -> None:
    """Remove unfinished folders and all checkpoints but the ``keep`` newest and the best. Rank 0 only."""
    for folder in checkpoints.glob(f"{UNFINISHED}*"):
        print(f"removing {folder}, left by a job that was killed", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
    pointer = checkpoints / BEST
    best = read_text(pointer).strip() if pointer.exists() else None
    for folder in newest_first(checkpoints)[keep:]:
        if folder.name == best:
            continue
        # Rename first: a kill during the removal must not leave a folder that looks like a checkpoint.
        renamed = folder.with_name(f"{UNFINISHED}{folder.name}")
        folder.rename(renamed)
        shutil.rmtree(renamed, ignore_errors=True)


def read_best(checkpoints: Path) -> dict[str, Any] | None:
    """Return ``step``, ``metric`` (older files: ``figure``) and ``score`` of the best encoder so far; None if there is none.

    Raises UserError if the file is damaged.
    """
    path = checkpoints / f"{BEST}.json"
    best = read_object(path, "remove it") if path.exists() else None
    if best is not None and not ({"step", "score"} <= best.keys()):
        raise UserError(f"{path} has no step or no score; remove it")
    return best and {"step": best["step"], "metric": best.get("metric", best.get("figure")), "score": best["score"]}


def note_best(checkpoints: Path, step: int, metric: str, score: float) -> None:
    """Write the score of the encoder after ``step`` steps, the best so far by ``metric``. Rank 0 only."""
    write_json(checkpoints / f"{BEST}.json", {"step": step, "metric": metric, "score": score})


def point_to_best(checkpoints: Path, step: int) -> None:
    """Point ``best`` to a finished checkpoint. Rank 0 only."""
    _point_to(checkpoints, BEST, step_folder(checkpoints, step))


class Clock:
    """Tells when ``minutes`` have passed since the last checkpoint; None: never."""

    def __init__(self, minutes: float | None) -> None:
        self._seconds = None if minutes is None else 60.0 * minutes
        self.restart()

    def restart(self) -> None:
        """Start again: a checkpoint was written."""
        self._start = time.monotonic()

    def due(self) -> bool:
        """Return whether the next checkpoint is due."""
        return self._seconds is not None and time.monotonic() - self._start >= self._seconds


def _write_random_state(folder: Path) -> None:
    states = {"cpu": torch.get_rng_state()}
    if distributed.accelerator() == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    content = io.BytesIO()  # into memory, because torch.save reports a full disk as a RuntimeError
    torch.save(states, content)
    (folder / f"random-{distributed.rank():05d}.pt").write_bytes(content.getbuffer())


def _read_random_state(folder: Path) -> None:
    states = torch.load(regular_file(folder / f"random-{distributed.rank():05d}.pt"), weights_only=True)
    torch.set_rng_state(states["cpu"])
    if distributed.accelerator() == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _write_checksums(folder: Path) -> None:
    """Flush all files and write their checksums, each rank a share of the files. Collective."""
    names: list[list[str]] = [[]]
    if distributed.is_main():
        names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())]
    dist.broadcast_object_list(names, src=0)
    own_names = names[0][distributed.rank() :: distributed.world_size()]
    own_sums: dict[str, str] = {}
    with _on_all_ranks(folder):
        own_sums = {name: _flush_and_sum(folder / name) for name in own_names}
    all_sums: list[Any] = [None] * distributed.world_size()
    dist.all_gather_object(all_sums, own_sums)
    with _on_all_ranks(folder):
        if distributed.is_main():
            write_json(folder / "checksums.json", {name: digest for sums in all_sums for name, digest in sums.items()})
            for subfolder in (path for path in folder.rglob("*") if path.is_dir()):
                flush_folder(subfolder)
            flush_folder(folder)


def _flush_and_sum(path: Path) -> str:
    with open_file(path) as stream:
        os.fsync(stream.fileno())
    return sha256_of(path)
