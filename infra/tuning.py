"""Grid and random searches with Ray Tune that can be resumed: a finished trial is never run again.

Each result is written atomically to a file of its own beside Tune's state. Tune saves its state once a second, so after a
kill it may miss trials that have finished; the files do not. All nodes of a cluster must see the folder ``storage``.

Tune pickles its state, and a pickle can run code when it is read. So ``storage`` must be a folder to which only the user can
write; this is checked before anything in it is read. The results themselves are not pickles (infra.trust.results).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from infra import ray_cluster
from infra.files import read_text
from infra.progress import Progress
from infra.ray_cluster import import_tune, train_torch
from infra.search_place import search_place
from infra.trust.owners import own_folder
from infra.trust.results import read_result, to_bytes

Point = dict[str, Any]
# Short points share a trial: Tune gives the next trial to a process that has just finished one, and ends the process that was
# started for it. With a point a trial, one process would do all.
SHORT_TRIALS_PER_CPU = 4


def tune_grid(
    trainable: Callable[[Point, dict[str, Any]], dict[str, Any]], points: Sequence[Point], *, data: dict[str, Any],
    storage: Path, name: str, concurrency: int | None = None, resources: dict[str, float] | None = None,
    in_process: bool = False, title: str = "tuning",
) -> list[dict[str, Any]]:  # fmt: skip
    """Run ``trainable(point, data)`` for every point in Ray Tune. Return the results in the order of the points.

    If ``storage`` has an unfinished search of the same name, only its unfinished points run.

    Args:
        trainable: a module-level function; its result is a dictionary of texts, numbers, lists and arrays. It may repeat
            entries of the point, which can be of any type.
        points: the grid.
        data: sent once and shared by all trials.
        storage: folder for results and Tune's state; only the user may be able to write to it.
        name: name of the search within ``storage``.
        concurrency: the most trials that run at a time; None leaves it to the resources.
        resources: Ray resources of a trial; by default one CPU.
        in_process: the points are short. Begin in this process; Tune takes over, with several points in a trial, when the rest
            would take longer here than Ray takes to start. `search_place.searching` keeps all here, or gives all to Tune.
        title: label of the progress line.

    Raises:
        RuntimeError: with the cause, if a trial fails.
        UserError: if others can write to ``storage``.
    """
    results = _results_folder(storage, name)
    files = [results / f"{index}.npz" for index in range(len(points))]
    place = search_place()
    if in_process and place != "ray":
        limit = float("inf") if place == "here" else ray_cluster.START_SECONDS
        _run_here(trainable, points, data, files, title=title, name=name, limit=limit)
    if not all(file.is_file() for file in files):
        _run_in_tune(trainable, points, data, results, storage=storage, name=name, concurrency=concurrency,
                     resources=resources, title=title, short=in_process)  # fmt: skip
    return [{**point, **read_result(file)} for point, file in zip(points, files, strict=True)]


def _run_here(
    trainable: Callable[[Point, dict[str, Any]], dict[str, Any]], points: Sequence[Point], data: dict[str, Any],
    files: Sequence[Path], *, title: str, name: str, limit: float,
) -> None:  # fmt: skip
    """Run the points that have no file, in order, until the rest would take longer than ``limit`` seconds."""
    missing = [index for index, file in enumerate(files) if not file.is_file()]
    if not missing:
        return
    started = time.monotonic()
    with Progress(len(points), "trials", title) as progress, ray_cluster.one_thread():
        progress.advance(len(points) - len(missing))
        for done, index in enumerate(missing, 1):
            try:
                result = trainable(points[index], data)
            except Exception as error:
                raise RuntimeError(f"{name}: a trial failed: {error}") from error
            _write(files[index], _stored(points[index], result))
            progress.advance()
            if (len(missing) - done) * (time.monotonic() - started) / done > limit:
                return


def _run_in_tune(
    trainable: Callable[[Point, dict[str, Any]], dict[str, Any]], points: Sequence[Point], data: dict[str, Any],
    results: Path, *, storage: Path, name: str, concurrency: int | None, resources: dict[str, float] | None, title: str,
    short: bool,
) -> None:  # fmt: skip
    """Run the points without a file in ``results``; a trial takes one, or every n-th if they are ``short``."""
    tune = import_tune()
    wrapped = tune.with_resources(
        tune.with_parameters(
            _grid_class(tune), function=trainable, data={"points": list(points), "shared": data}, out=str(results)
        ),
        resources or {"cpu": 1},
    )
    # A cluster without a CPU starts its nodes when there are trials.
    cpus = int(ray_cluster.connect().cluster_resources().get("CPU", len(points)))
    trials = min(len(points), SHORT_TRIALS_PER_CPU * cpus) if short else len(points)
    space = {"trial": tune.grid_search([[number, trials] for number in range(trials)])}
    config = tune.TuneConfig(reuse_actors=True, max_concurrent_trials=concurrency)
    # Of an unfinished search with another number of trials only the results are used.
    _run(tune, wrapped, space, config=config, storage=storage, name=f"{name}-{trials}", count=len(points), title=title)


def tune_search(
    trainable: Callable[[Point, dict[str, Any]], Iterator[dict[str, float]]], space: dict[str, tuple[Any, ...]], *,
    data: dict[str, Any], samples: int, storage: Path, name: str, seed: int, halving: int | None = None,
    resources: dict[str, float] | None = None, concurrency: int | None = None, title: str = "tuning",
) -> list[dict[str, Any]]:  # fmt: skip
    """Search ``space`` with Optuna's TPE sampler for the highest ``score``. Return a record of every trial with a score.

    A record holds ``point``, ``scores`` (one per yield) and ``done``, which is False if ASHA stopped the trial. A search
    that was killed is continued as in ``tune_grid``.

    Args:
        trainable: a generator function; ``trainable(point, data)`` yields {"score": ...}, for example once per epoch.
        space: name -> ("choice", values), ("loguniform", low, high) or ("uniform", low, high).
        data: sent once and shared by all trials.
        samples: the number of trials.
        storage: folder for results and Tune's state; only the user may be able to write to it.
        name: name of the search within ``storage``.
        seed: seed of the sampler.
        halving: the grace period of ASHA, in yields, after which it stops the worse trials; None lets all finish.
        resources: Ray resources of a trial; by default one CPU.
        concurrency: the most trials that run at a time; None leaves it to the resources.
        title: label of the progress line.

    Raises:
        RuntimeError: with the cause, if a trial fails.
        UserError: if others can write to ``storage``.
    """
    results = _results_folder(storage, name)
    tune = import_tune()
    finished = results / "finished.json"
    if not finished.is_file():
        wrapped = tune.with_resources(
            tune.with_parameters(_search_class(tune), function=trainable, data=data, out=str(results)),
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
        _run(tune, wrapped, domains, config=config, storage=storage, name=name, count=samples, title=title)
        _write(finished, b"{}")
    records = [json.loads(read_text(path)) for path in sorted(results.glob("trial-*.json"))]
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
    """Run ``function(data, rank, world_size)`` in ``ranks`` Ray Train processes. Return the result of rank 0.

    The processes form one torch process group; each gets ``cpus`` CPUs and ``gpus`` GPUs. The result is kept in
    ``storage``; a second call with the same name reads it from there. Raises RuntimeError if a process fails, and UserError if
    others can write to ``storage``.
    """
    target = _results_folder(storage, name) / "0.npz"
    if not target.is_file():
        train_torch(_write_result, (function, data, str(target)), ranks=ranks, storage=storage.resolve(), name=name,
                    gpus=gpus, cpus=cpus)  # fmt: skip
    result: dict[str, Any] = read_result(target)
    return result


def _write_result(arguments: tuple[Any, ...], rank: int, world_size: int) -> None:
    function, data, target = arguments
    result = function(data, rank, world_size)
    if rank == 0:
        _write(Path(target), to_bytes(result))


def _run(
    tune: Any, wrapped: Any, space: Any, *, config: Any, storage: Path, name: str, count: int, title: str
) -> None:  # fmt: skip
    """Run or resume a search of ``count`` trials. Raises RuntimeError with the first cause if trials failed."""
    folder = storage.resolve()
    callback = _progress_callback(tune)
    callback.count, callback.progress = count, Progress(count, "trials", title)
    if tune.Tuner.can_restore(str(folder / name)):
        tuner = tune.Tuner.restore(str(folder / name), wrapped, resume_errored=True)
    else:
        tuner = tune.Tuner(
            wrapped,
            param_space=space,
            tune_config=config,
            run_config=tune.RunConfig(
                name=name, storage_path=str(folder), verbose=0, callbacks=[callback], log_to_file=False,
                progress_reporter=tune.CLIReporter(),  # silent at verbose=0; the default one displays a widget in a notebook
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        )  # fmt: skip
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")
    with callback.progress:
        grid = tuner.fit()
    if grid.num_errors:
        raise RuntimeError(f"{name}: {grid.num_errors} of {len(grid)} trials failed; the first: {grid.errors[0]}")


def _results_folder(storage: Path, name: str) -> Path:
    """Return the folder of results of a search. Raises UserError if anybody else could have written in ``storage``."""
    folder = own_folder(storage.resolve()) / f"{name}-results"
    folder.mkdir(exist_ok=True, mode=0o700)
    return folder


def _stored(point: Point, result: dict[str, Any]) -> bytes:
    """Return the bytes of a result without the entries that it takes over from its point."""
    return to_bytes({key: value for key, value in result.items() if key not in point or value is not point[key]})


def _write(target: Path, content: bytes) -> None:
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(target)


def points_of(trial: Sequence[int], points: int) -> range:
    """Return the numbers of the points of a trial, (its number, the number of trials), among ``points``."""
    number, trials = trial
    return range(number, points, trials)


def _grid_class(tune: Any) -> type[Any]:
    class GridTrial(tune.Trainable):  # type: ignore[misc]
        """Some points of a grid. With ``reuse_actors`` a process runs many trials, which saves a process start for each."""

        def setup(self, config: Point, function: Any, data: dict[str, Any], out: str) -> None:
            """Store the function, its data, and which points are meant."""
            self.function, self.points, self.data = function, data["points"], data["shared"]
            self.out, self.trial = Path(out), config["trial"]

        def reset_config(self, new_config: Point) -> bool:
            """Switch to other points in the same process."""
            self.trial = new_config["trial"]
            return True

        def step(self) -> dict[str, Any]:
            """Compute the result of each point and write it, unless its file exists."""
            # Tune's own result files cannot hold arrays.
            faults = []
            for index in points_of(self.trial, len(self.points)):
                target, point = self.out / f"{index}.npz", self.points[index]
                try:
                    if not target.exists():
                        _write(target, _stored(point, self.function(point, self.data)))
                except Exception as error:  # the other points do not depend on this one
                    faults.append(error)
            if faults:
                raise faults[0]
            return {"done": True}

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            """Save nothing: a trial is resumed from its result file."""

        def load_checkpoint(self, checkpoint: Any) -> None:
            """Load nothing: see ``save_checkpoint``."""

    return GridTrial


def _search_class(tune: Any) -> type[Any]:
    class SampledTrial(tune.Trainable):  # type: ignore[misc]
        """One sampled point, with a step for each yield. A point that has a finished record replays its scores."""

        def setup(self, config: Point, function: Any, data: dict[str, Any], out: str) -> None:
            """Store the function and its data, and start the first point."""
            self.function, self.data, self.out = function, data, Path(out)
            self.begin(config)

        def begin(self, config: Point) -> None:
            """Start a point, from its record if it has finished before."""
            self.point = dict(config)
            digest = hashlib.sha256(json.dumps(self.point, sort_keys=True).encode()).hexdigest()[:16]
            self.target = self.out / f"trial-{digest}.json"
            stored = json.loads(read_text(self.target)) if self.target.exists() else None
            if stored and stored["done"]:
                self.record, self.steps = stored, iter([{"score": score} for score in stored["scores"]])
            else:
                self.record = {"point": self.point, "scores": [], "done": False}
                self.steps = self.function(self.point, self.data)

        def reset_config(self, new_config: Point) -> bool:
            """Switch to another point in the same process."""
            self.begin(new_config)
            return True

        def step(self) -> dict[str, Any]:
            """Take the next score of the function and add it to the record."""
            metrics = next(self.steps, None)
            if metrics is None:
                if not self.record["done"]:
                    self.record["done"] = True
                    _write(self.target, json.dumps(self.record).encode())
                return {"score": self.record["scores"][-1], "done": True}
            if not self.record["done"]:
                self.record["scores"].append(float(metrics["score"]))
                _write(self.target, json.dumps(self.record).encode())
            return {**metrics, "done": False}

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            """Save nothing: a trial is resumed from its result file."""

        def load_checkpoint(self, checkpoint: Any) -> None:
            """Load nothing: see ``save_checkpoint``."""

    return SampledTrial


def _progress_callback(tune: Any) -> Any:
    class Count(tune.Callback):  # type: ignore[misc]
        """Advance the progress line at every finished trial."""

        progress: Progress | None = None
        count = 0  # of all points

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            """Count the points of a finished trial."""
            if self.progress:
                points = trial.config.get("trial")
                self.progress.advance(1 if points is None else len(points_of(points, self.count)))

        def __getstate__(self) -> dict[str, Any]:
            return {}  # Tune pickles its callbacks to disk; a terminal cannot be pickled

    return Count()
