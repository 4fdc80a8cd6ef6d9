"""Before a job starts: do all ranks have the same recipe, data, code and packages, and do they see the same run folder?

Hosts may be started with different files or from different installations. Ranks that compute different things would train on
together, and the run folder would hold the recipe of rank 0 alone.
"""

from __future__ import annotations

import hashlib
import json
import platform
import socket
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from infra import distributed
from infra.errors import UserError
from infra.files import read_bytes
from infra.machine import code_version, package_version
from infra.settings import flatten, to_dict
from pretrain.config import Recipe
from pretrain.run.newest import newest_first, newest_step
from pretrain.run.plan import Plan, make_plan

# Keys that may differ between hosts: paths to the same data, and what only rank 0 uses. The shards are compared by the
# manifest's digest, the run's folder by a file in it.
MAY_DIFFER = ("run.output", "run.tracking_uri", "data.shards", "data.cache", "launch.")
PACKAGES = (
    "torch", "deepspeed", "numpy", "scipy", "pandas", "monai", "nibabel", "zstandard", "webdataset", "omegaconf", "pydantic",
    "nvidia-dali-cuda120", "nvidia-dali-cuda130",
)  # fmt: skip
SHARED_SECONDS = 10.0  # how long a network file system may take to show a new file to another host
SHOWN = 3  # differing keys that a message lists


def plan_together(recipe: Recipe | Plan | None, error: str = "") -> Plan:
    """Plan the run on every rank and return this rank's plan. Collective; the process group is there.

    Args:
        recipe: this rank's recipe, or its plan; None if it could not be read.
        error: why this rank has no recipe.

    Raises:
        UserError: on every rank, with the same text, if the ranks differ, if one of them cannot plan the run, or if they do
            not see the same ``run.output``.
    """
    settings = recipe.recipe if isinstance(recipe, Plan) else recipe
    if settings is not None and distributed.world_size() > 1:
        shared = settings
        _compare(lambda: facts(shared), error)
    else:
        _compare(dict, error)
    plan = recipe if isinstance(recipe, Plan) else None
    if plan is None and isinstance(recipe, Recipe):
        try:
            plan = make_plan(recipe, distributed.world_size())
        except UserError as problem:
            error = str(problem)
    _compare(lambda: {"data.shards": _shards(plan)} if plan else {}, error)
    assert plan is not None  # a rank without a plan has an error, which all ranks raise
    check_shared_folder(plan.recipe.run.output)
    return plan


def facts(recipe: Recipe) -> dict[str, Any]:
    """Return what must be equal on every rank: keys of the recipe, the code's version and those of packages."""
    keys = {key: value for key, value in flatten(to_dict(recipe)).items() if not key.startswith(MAY_DIFFER)}
    if recipe.run.resume not in ("auto", "never"):
        keys["run.resume"] = resumed(recipe.run.resume, Path(recipe.run.output))
    return {**keys, "the version of yaware": code_version(), "the version of Python": platform.python_version(),
            **{f"the version of {name}": package_version(name) for name in PACKAGES}}  # fmt: skip


def resumed(path: str, output: Path) -> str:
    """Return which checkpoint ``run.resume: PATH`` stands for on this host, in words that are equal for equal content.

    A path may lie on a disk of each host. The words have the step and a digest of the checkpoint's index (checksums.json with
    the digest of each file), its state.json, and the names and sizes of its files.
    """
    try:
        if newest_step(output / "checkpoints") is not None:
            return "not used, since run.output has a checkpoint"
        found = [Path(path)] if (Path(path) / "state.json").exists() else newest_first(Path(path) / "checkpoints")
        if not found:
            return "no checkpoint"
        folder = found[0]
        digest = hashlib.sha256()
        for name in ("checksums.json", "state.json"):
            digest.update(read_bytes(folder / name) if (folder / name).exists() else b"missing")
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                digest.update(f"{file.relative_to(folder)}\0{file.stat().st_size}\0".encode(errors="surrogateescape"))
    except (UserError, OSError) as error:
        return f"unreadable ({error})"
    return f"{folder.name} with digest {digest.hexdigest()[:12]}"


def check_shared_folder(output: str) -> None:
    """Raise UserError on every rank unless all of them see the file that rank 0 writes in ``output``. Collective."""
    if distributed.world_size() == 1:
        return
    folder, problem = Path(output).absolute(), ""
    name = f".shared-{distributed.broadcast(uuid.uuid4().hex)}"
    try:
        if distributed.is_main():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text("the ranks of a job look for this file\n", encoding="utf-8")
            except OSError as error:
                problem = f"run.output={output} cannot be written: {error}; choose another --run.output"
        _raise_first(_gather(problem))
        seen = distributed.is_main() or _appears(folder / name)
        places = _gather(None if seen else str(folder))
        writer = distributed.broadcast(f"{_here()} wrote a file in {folder}")
        missing = [place for place in places if place[1] is not None]
        if missing:
            rank_name, path = missing[0]
            raise UserError(
                f"run.output={output} is not the same folder on all hosts: {writer}, which {rank_name} does not see in {path}; "
                "choose a --run.output on a file system that all hosts share"
            )
    finally:
        if distributed.is_main():
            with suppress(OSError):
                (folder / name).unlink(missing_ok=True)


def _appears(path: Path) -> bool:
    """Wait for a file that another host has written."""
    limit = time.monotonic() + SHARED_SECONDS
    while True:
        with suppress(OSError):
            # Reading the folder makes a network file system ask its server again.
            if any(entry.name == path.name for entry in path.parent.iterdir()):
                return True
        if time.monotonic() > limit:
            return False
        time.sleep(0.1)


def _compare(collect: Callable[[], dict[str, Any]], error: str) -> None:
    """Raise UserError on every rank if one has an error, or if the ranks' facts differ. Collective."""
    own = {} if error else json.loads(json.dumps(collect(), default=str))
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
    reports = _gather((error, digest))
    _raise_first([(rank_name, problem) for rank_name, (problem, _) in reports])
    if len({digest for _, (_, digest) in reports}) > 1:
        everyone = _gather(own)
        (first, reference), *others = everyone
        for rank_name, other in others:
            different = [key for key in {**reference, **other} if reference.get(key) != other.get(key)]
            if different:
                shown = "; ".join(
                    f"{key} is {reference.get(key)!r} on {first} and {other.get(key)!r} on {rank_name}"
                    for key in different[:SHOWN]
                )
                more = f"; and {len(different) - SHOWN} more differ" if len(different) > SHOWN else ""
                raise UserError(
                    f"the ranks do not agree: {shown}{more}; start every host with the same recipe, overrides, shards and "
                    "installation"
                )


def _raise_first(problems: list[tuple[str, str]]) -> None:
    """Raise the first problem; the rank is named unless all ranks have the same problem."""
    reported = [(rank_name, problem) for rank_name, problem in problems if problem]
    if not reported:
        return
    rank_name, problem = reported[0]
    everywhere = len(reported) == len(problems) and len({text for _, text in reported}) == 1
    raise UserError(problem if everywhere else f"{rank_name}: {problem}")


def _gather(value: Any) -> list[tuple[str, Any]]:
    """Return name and value of every rank. Collective."""
    gathered: list[Any] = [None] * distributed.world_size()
    if distributed.world_size() == 1:
        return [(_here(), value)]
    dist.all_gather_object(gathered, (_here(), value))
    return gathered


def _here() -> str:
    return f"rank {distributed.rank()} ({socket.gethostname()})"


def _shards(plan: Plan) -> str:
    return f"shards of manifest {plan.manifest.digest[:12]}"
