"""Ray behind one door: a local cluster (or that of ``RAY_ADDRESS``), plain tasks, and Tune. The only module that imports ray.

A local cluster is started with little memory and no dashboard, and stopped when its session ends; a cluster that somebody
else started is attached to and never stopped.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra.errors import UserError
from infra.progress import Progress

OBJECT_STORE_BYTES = 200 * 2**20
# One thread a worker: the workers share the cores, and linear algebra of this size gains nothing from more.
WORKER_THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def import_ray() -> Any:
    """Ray without its usage report and its remarks about accelerators."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    import ray

    return ray


@contextmanager
def session(workers: int | None = None) -> Iterator[Any]:
    """Ray, connected: to ``RAY_ADDRESS`` where it is set, else to a local cluster of ``workers`` CPUs (default: all).

    A session inside a session uses the outer one's cluster.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": {"env_vars": WORKER_THREADS},
    }
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _check_answers(address)
        try:
            ray.init(address=address, **options)
        except ConnectionError as error:
            raise UserError(
                f"RAY_ADDRESS={address}: cannot join that cluster ({_first_line(error.__cause__ or error)}); where it was "
                "started with a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
            ) from None
    else:
        ray.init(
            address="local", num_cpus=workers or len(os.sched_getaffinity(0)), include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES, **options,
        )  # fmt: skip
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Ray itself would try for minutes, and log each try."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "://" in host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise UserError(
            f"RAY_ADDRESS={address}: no Ray cluster answers there ({error}); start it or unset it"
        ) from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]


def map_unordered(
    function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], *, in_flight: int, retries: int = 3
) -> Iterator[tuple[int, Any]]:
    """Run ``function(*arguments[i])`` as Ray tasks; yield (i, result) as they finish, at most ``in_flight`` at a time.

    A task whose worker process dies runs again, ``retries`` times, after which it is a UserError; what the function raises
    is raised here.
    """
    ray = import_ray()
    task = ray.remote(num_cpus=1, max_retries=retries)(function)
    waiting: dict[Any, int] = {}
    try:
        for index, given in enumerate(arguments):
            if len(waiting) >= in_flight:
                yield _next(ray, waiting)
            waiting[task.remote(*given)] = index
        while waiting:
            yield _next(ray, waiting)
    finally:
        for reference in waiting:
            ray.cancel(reference)


def _next(ray: Any, waiting: dict[Any, int]) -> tuple[int, Any]:
    (ready, *_), _ = ray.wait(list(waiting), num_returns=1)
    index = waiting.pop(ready)
    try:
        return index, ray.get(ready)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError) as error:
        raise UserError(
            f"a Ray worker died at the same task every time it was tried ({_first_line(error)}); "
            "free memory or give fewer --workers, and run the same command again: it goes on where it was"
        ) from None


def tune_grid(
    trainable: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]],
    points: Sequence[dict[str, Any]],
    *,
    data: dict[str, Any],
    storage: Path,
    name: str,
    concurrency: int | None = None,
    title: str = "tuning",
) -> list[dict[str, Any]]:
    """Run ``trainable(point, data)`` for every point as a trial of Ray Tune; the results in the order of the points.

    ``data`` is sent once and shared by all trials; results may hold arrays. An unfinished search of the same name in
    ``storage`` is continued: finished trials are not run again. RuntimeError with the cause where a trial fails.
    """
    ray = import_ray()
    from ray import tune

    folder = storage.resolve()
    results = folder / f"{name}-results"
    results.mkdir(parents=True, exist_ok=True)
    callback = _progress_callback(tune)
    callback.progress = Progress(len(points), "trials", title)
    wrapped = tune.with_resources(
        tune.with_parameters(_trial_class(tune), function=trainable, data=data, out=str(results)), {"cpu": 1}
    )
    settings = tune.RunConfig(
        name=name, storage_path=str(folder), verbose=0, callbacks=[callback], log_to_file=False,
        failure_config=tune.FailureConfig(max_failures=0),
    )  # fmt: skip
    if tune.Tuner.can_restore(str(folder / name)):
        tuner = tune.Tuner.restore(str(folder / name), wrapped, resume_errored=True)
    else:
        tuner = tune.Tuner(
            wrapped,
            param_space={"index": tune.grid_search(list(range(len(points)))), "points": list(points)},
            tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=concurrency),
            run_config=settings,
        )
    assert ray.is_initialized()
    with callback.progress:
        grid = tuner.fit()
    if grid.num_errors:
        raise RuntimeError(f"{name}: {grid.num_errors} of {len(points)} trials failed; the first: {grid.errors[0]}")
    return [pickle.loads((results / f"{index}.pkl").read_bytes()) for index in range(len(points))]


def _trial_class(tune: Any) -> type[Any]:
    class Trial(tune.Trainable):  # type: ignore[misc]
        """One point; an actor takes point after point (reuse_actors), which spares a process start each."""

        def setup(self, config: dict[str, Any], function: Any, data: dict[str, Any], out: str) -> None:
            self.function, self.data, self.out, self.index = function, data, Path(out), config["index"]

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.index = new_config["index"]
            return True

        def step(self) -> dict[str, Any]:
            # Arrays do not belong in Tune's own result files; they go to one of their own, whole or not at all.
            target = self.out / f"{self.index}.pkl"
            if not target.exists():
                result = self.function(self.config["points"][self.index], self.data)
                temporary = target.with_suffix(".tmp")
                temporary.write_bytes(pickle.dumps(result))
                temporary.replace(target)
            return {"done": True}

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
