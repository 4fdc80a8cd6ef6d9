"""Ray behind one door: a local cluster (or that of ``RAY_ADDRESS``) and plain tasks. The only module that imports ray.

Searches by Ray Tune are in ``infra.tuning``.

A local cluster is started with little memory and no dashboard, and stopped when its session ends; a cluster that somebody
else started is attached to and never stopped.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra.errors import UserError

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


def import_tune() -> Any:
    """Ray Tune, with Optuna's search and the schedulers."""
    import_ray()
    from ray import tune
    from ray.tune import schedulers, search  # noqa: F401 - attributes of tune
    from ray.tune.search import optuna  # noqa: F401

    logging.getLogger("optuna").setLevel(logging.WARNING)  # it would tell of every study
    return tune


def gpus() -> float:
    """GPUs of the cluster that is connected."""
    return float(import_ray().cluster_resources().get("GPU", 0))


def train_torch(
    function: Callable[[Any, int, int], None], argument: Any, *, ranks: int, storage: Path, name: str, gpus: float, cpus: float
) -> None:  # fmt: skip
    """Run ``function(argument, rank, world_size)`` in ``ranks`` workers of Ray Train, joined in a torch process group.

    RuntimeError with the cause where a worker fails.
    """
    import_ray()
    from ray import train
    from ray.train.torch import TorchTrainer

    def loop(config: dict[str, Any]) -> None:
        context = train.get_context()
        function(config["argument"], context.get_world_rank(), context.get_world_size())

    share = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
    trainer = TorchTrainer(
        loop,
        train_loop_config={"argument": argument},
        scaling_config=train.ScalingConfig(num_workers=ranks, use_gpu=gpus > 0, resources_per_worker=share),
        run_config=train.RunConfig(name=name, storage_path=str(storage)),
    )
    result = trainer.fit()
    if getattr(result, "error", None):
        raise RuntimeError(f"{name}: {result.error}")
