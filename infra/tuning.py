"""Searches by Ray Tune that survive their driver: what has finished is on disk and is never run again.

Every result lies in a file of its own beside Tune's, written whole or not at all, so that a finished trial counts even
where Tune's own state, saved every second, is older. ``storage`` must be one folder for all nodes of a cluster.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from infra.progress import Progress
from infra.ray_cluster import import_ray, import_tune, train_torch

Point = dict[str, Any]


def tune_grid(
    trainable: Callable[[Point, dict[str, Any]], dict[str, Any]],
    points: Sequence[Point],
    *,
    data: dict[str, Any],
    storage: Path,
    name: str,
    concurrency: int | None = None,
    resources: dict[str, float] | None = None,
    title: str = "tuning",
) -> list[dict[str, Any]]:
    """Run ``trainable(point, data)`` for every point as a trial of Ray Tune; the results in the order of the points.

    ``data`` is sent once and shared by all trials; results may hold arrays. An unfinished search of the same name in
    ``storage`` is continued: finished trials are not run again. RuntimeError with the cause where a trial fails.
    """
    import_ray()
    tune = import_tune()
    results = _results_folder(storage, name)
    if all((results / f"{index}.pkl").is_file() for index in range(len(points))):
        return [pickle.loads((results / f"{index}.pkl").read_bytes()) for index in range(len(points))]
    wrapped = tune.with_resources(
        tune.with_parameters(
            _grid_class(tune), function=trainable, data={"points": list(points), "given": data}, out=str(results)
        ),
        resources or {"cpu": 1},
    )
    space = {"index": tune.grid_search(list(range(len(points))))}
    config = tune.TuneConfig(reuse_actors=True, max_concurrent_trials=concurrency)
    grid = _run(tune, wrapped, space, config, storage, name, len(points), title)
    _raise_first(grid, name, len(points))
    return [pickle.loads((results / f"{index}.pkl").read_bytes()) for index in range(len(points))]


def tune_search(
    trainable: Callable[[Point, dict[str, Any]], Iterator[dict[str, float]]],
    space: dict[str, tuple[Any, ...]],
    *,
    data: dict[str, Any],
    samples: int,
    storage: Path,
    name: str,
    seed: int,
    halving: int | None = None,
    resources: dict[str, float] | None = None,
    concurrency: int | None = None,
    title: str = "tuning",
) -> list[dict[str, Any]]:
    """Search ``space`` with Optuna's TPE for the highest ``score``; a record for every trial that came to one.

    ``trainable(point, data)`` yields {"score": …, …} as it goes, once an epoch say. ``halving``: ASHA stops the worse
    trials from so many yields on; None lets all finish. A record holds the point, ``scores`` (each yield's), ``best``
    (place of the highest) and ``done``, False where ASHA stopped the trial. ``space``: name -> ("choice", values),
    ("loguniform", low, high) or ("uniform", low, high). Continued after a kill as ``tune_grid`` is.
    """
    import_ray()
    tune = import_tune()
    from_results = _results_folder(storage, name)
    finished = from_results / "finished.json"
    if not finished.is_file():
        wrapped = tune.with_resources(
            tune.with_parameters(_search_class(tune), function=trainable, data=data, out=str(from_results)),
            resources or {"cpu": 1},
        )
        config = tune.TuneConfig(
            metric="score", mode="max", num_samples=samples, reuse_actors=True, max_concurrent_trials=concurrency,
            search_alg=tune.search.optuna.OptunaSearch(seed=seed),
            scheduler=None if halving is None else tune.schedulers.ASHAScheduler(
                time_attr="training_iteration", grace_period=halving, max_t=100_000, reduction_factor=3
            ),
        )  # fmt: skip
        domains = {key: getattr(tune, kind)(*bounds) for key, (kind, *bounds) in space.items()}
        grid = _run(tune, wrapped, domains, config, storage, name, samples, title)
        _raise_first(grid, name, samples)
        _write(finished, b"{}")
    records = [json.loads(path.read_text()) for path in sorted(from_results.glob("trial-*.json"))]
    return [record for record in records if record["scores"]]


def train_ranks(
    function: Callable[..., dict[str, Any]],
    data: dict[str, Any],
    *,
    ranks: int,
    storage: Path,
    name: str,
    gpus: float = 0,
    cpus: float = 1,
) -> dict[str, Any]:
    """``function(data, rank, world_size)`` in ``ranks`` processes of one torch process group (Ray Train); rank 0's result.

    Done once: the result lies in ``storage``, and is read from there afterwards.
    """
    target = _results_folder(storage, name) / "0.pkl"
    if not target.is_file():
        train_torch(_write_result, (function, data, str(target)), ranks=ranks, storage=storage.resolve(), name=name,
                    gpus=gpus, cpus=cpus)  # fmt: skip
    result: dict[str, Any] = pickle.loads(target.read_bytes())
    return result


def _write_result(arguments: tuple[Any, ...], rank: int, world_size: int) -> None:
    function, data, target = arguments
    result = function(data, rank, world_size)
    if rank == 0:
        _write(Path(target), pickle.dumps(result))


def _run(
    tune: Any, wrapped: Any, space: Any, config: Any, storage: Path, name: str, count: int, title: str
) -> Any:  # fmt: skip
    folder = storage.resolve()
    callback = _progress_callback(tune)
    callback.progress = Progress(count, "trials", title)
    if tune.Tuner.can_restore(str(folder / name)):
        tuner = tune.Tuner.restore(str(folder / name), wrapped, resume_errored=True)
    else:
        tuner = tune.Tuner(
            wrapped,
            param_space=space,
            tune_config=config,
            run_config=tune.RunConfig(
                name=name, storage_path=str(folder), verbose=0, callbacks=[callback], log_to_file=False,
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        )  # fmt: skip
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")
    with callback.progress:
        return tuner.fit()


def _raise_first(grid: Any, name: str, count: int) -> None:
    if grid.num_errors:
        raise RuntimeError(f"{name}: {grid.num_errors} of {count} trials failed; the first: {grid.errors[0]}")


def _results_folder(storage: Path, name: str) -> Path:
    folder = storage.resolve() / f"{name}-results"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write(target: Path, content: bytes) -> None:
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(target)


def _grid_class(tune: Any) -> type[Any]:
    class Trial(tune.Trainable):  # type: ignore[misc]
        """One point; an actor takes point after point (reuse_actors), which spares a process start each."""

        def setup(self, config: Point, function: Any, data: dict[str, Any], out: str) -> None:
            self.function, self.points, self.data = function, data["points"], data["given"]
            self.out, self.index = Path(out), config["index"]

        def reset_config(self, new_config: Point) -> bool:
            self.index = new_config["index"]
            return True

        def step(self) -> dict[str, Any]:
            # Arrays do not belong in Tune's own result files; they go to one of their own, whole or not at all.
            target = self.out / f"{self.index}.pkl"
            if not target.exists():
                _write(target, pickle.dumps(self.function(self.points[self.index], self.data)))
            return {"done": True}

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            return None

        def load_checkpoint(self, checkpoint: Any) -> None:
            return None

    return Trial


def _search_class(tune: Any) -> type[Any]:
    class Trial(tune.Trainable):  # type: ignore[misc]
        """One drawn point, a step for every yield; the record of a point that is done answers in its place."""

        def setup(self, config: Point, function: Any, data: dict[str, Any], out: str) -> None:
            self.function, self.data, self.out = function, data, Path(out)
            self.begin(config)

        def begin(self, config: Point) -> None:
            self.point = dict(config)
            digest = hashlib.sha256(json.dumps(self.point, sort_keys=True).encode()).hexdigest()[:16]
            self.target = self.out / f"trial-{digest}.json"
            known = json.loads(self.target.read_text()) if self.target.is_file() else None
            if known and known["done"]:
                self.record, self.steps = known, iter([{"score": score} for score in known["scores"]])
            else:
                self.record = {"point": self.point, "scores": [], "done": False}
                self.steps = self.function(self.point, self.data)

        def reset_config(self, new_config: Point) -> bool:
            self.begin(new_config)
            return True

        def step(self) -> dict[str, Any]:
            found = next(self.steps, None)
            if found is None:
                if not self.record["done"]:
                    self.record["done"] = True
                    _write(self.target, json.dumps(self.record).encode())
                return {"score": self.record["scores"][-1], "done": True}
            if not self.record["done"]:
                self.record["scores"].append(float(found["score"]))
                _write(self.target, json.dumps(self.record).encode())
            return {**found, "done": False}

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            return None

        def load_checkpoint(self, checkpoint: Any) -> None:
            return None

    return Trial


def _progress_callback(tune: Any) -> Any:
    class Count(tune.Callback):  # type: ignore[misc]
        """Tells the progress line of every finished trial."""

        progress: Progress | None = None

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            if self.progress:
                self.progress.advance()

        def __getstate__(self) -> dict[str, Any]:
            return {}  # Tune keeps a copy of its callbacks on disk, where a terminal has no place

    return Count()
