"""Connect to Ray and run tasks. The only module that imports ray; searches with Ray Tune are in ``infra.tuning``.

Without ``RAY_ADDRESS`` a session starts a local cluster, with little memory and no dashboard, and stops it at the end. With
``RAY_ADDRESS`` it joins the running cluster and leaves it running.

A local cluster takes about ten seconds to start and to stop. Work that is done sooner runs in this process instead, one task
after another, by the same functions and with as many threads as in a worker, so that its results are the same.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from infra.distributed import loopback_of_gloo
from infra.errors import OPTIONAL_WHOLE, UserError, check_arguments
from infra.files import short_temporary_folder
from infra.internals import internal, replaced_internal
from infra.lean_imports import quiet_imports
from infra.processes.allowance import usable_cores
from infra.processes.unchanged import unchanged_environment, unchanged_handlers

OBJECT_STORE_BYTES = 200 * 2**20
# What a local cluster costs: seconds to start and stop, and the bytes of images that one core reads meanwhile.
START_SECONDS, SMALL_BYTES = 10.0, 40 * 2**20
# One thread per worker: workers share the cores, and linear algebra on arrays of this size is not faster with more.
WORKER_THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


# No usage reports, and no messages about accelerators.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
# Ray's default of 15 gives its workers next to no time on cores that anything else uses; a search then takes minutes.
PRIORITY = {"RAY_worker_niceness": "0"}
# Ray's processes then listen on 127.0.0.1 only, if that is the address of their node.
ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# Environment variable: nodes of the cluster of RAY_ADDRESS for which a session waits, at most NODES_SECONDS.
EXPECTED_NODES, NODES_SECONDS = "YAWARE_RAY_NODES", 90.0


def import_ray() -> Any:
    """Import ray with usage reports and messages about accelerators switched off."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # In a notebook, Ray asks for ipywidgets; the project draws its own progress.
    logging.getLogger("ray.widgets.util").setLevel(logging.ERROR)
    with quiet_imports():
        import ray

    return ray


def check_workers(workers: Any) -> None:
    """Raise UserError unless ``workers`` is a number of CPUs, at least 1, or None, which stands for all."""
    check_arguments(OPTIONAL_WHOLE, workers=workers)
    if workers is not None and workers < 1:
        raise UserError(f"workers={workers} must be at least 1; leave it out for all cores")


@contextmanager
def session(workers: int | None = None) -> Iterator[Any]:
    """Connect to the cluster of ``RAY_ADDRESS``, or to a local one with ``workers`` CPUs (default: all). Yield ``ray``.

    A session inside another session uses the same cluster. Afterwards ``os.environ``, ``sys.excepthook`` and the handler of
    SIGTERM, which Ray changes, are as before. Raises UserError if the cluster of ``RAY_ADDRESS`` does not answer or rejects
    the connection.
    """
    check_workers(workers)
    with unchanged_environment(), unchanged_handlers(), _session(workers) as ray:
        yield ray


@contextmanager
def _session(workers: int | None) -> Iterator[Any]:
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    address = os.environ.get("RAY_ADDRESS")
    one_host = {} if address else loopback_of_gloo()
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": {"env_vars": {**WORKER_THREADS, **one_host}},
    }
    if address:
        _check_reachable(address)
        try:
            ray.init(address=address, **options)
        except ConnectionError as error:
            raise UserError(
                f"RAY_ADDRESS={address}: cannot join this cluster ({_first_line(error.__cause__ or error)}); if it requires "
                "a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
            ) from None
        try:
            _await_nodes(ray, int(os.environ.get(EXPECTED_NODES) or 1))
            yield ray
        finally:
            ray.shutdown()
        return
    os.environ.setdefault("RAY_TMPDIR", str(short_temporary_folder("RAY_TMPDIR")))
    for name, value in PRIORITY.items():
        os.environ.setdefault(name, value)
    with _guarded():
        try:
            with _on_loopback(ray):
                ray.init(
                    address="local", num_cpus=workers or usable_cores(), include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES, **options,
                )  # fmt: skip
            yield ray
        finally:
            ray.shutdown()


@contextmanager
def _guarded() -> Iterator[None]:
    """End the processes of a Ray cluster that starts in the block after the block, or when this process is killed in it."""
    from infra.processes.guard import guard_session

    guard = guard_session()
    try:
        yield
    finally:
        if guard.stdin:
            guard.stdin.close()
        guard.wait()


@contextmanager
def _on_loopback(ray: Any) -> Iterator[None]:
    """Let a local cluster that starts within the block listen on 127.0.0.1 only, where no other host reaches it.

    Ray listens on all addresses unless the address of its node is 127.0.0.1. It replaces that address by the host's own, also
    in ``_node_ip_address``, unless it is told that the platform has no clusters, as on macOS.

    Raises LibraryChanged if Ray has no such switch: the cluster would be open to other hosts.
    """
    constants = internal("ray", internal("ray", ray, "_private"), "ray_constants")
    variable = str(internal("ray", constants, "ENABLE_RAY_CLUSTERS_ENV_VAR"))
    before = os.environ.get(variable)
    os.environ[variable] = "0"
    try:
        with replaced_internal("ray", constants, "ENABLE_RAY_CLUSTER", False):
            yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


_cluster_on_demand: Callable[[], Any] | None = None


@contextmanager
def session_on_demand(workers: int | None = None) -> Iterator[None]:
    """As `session`, but a local cluster starts when `connect` is called for the first time within the block."""
    global _cluster_on_demand
    check_workers(workers)
    if _cluster_on_demand:
        yield
    elif os.environ.get("RAY_ADDRESS"):
        with session(workers):
            yield
    else:
        with ExitStack() as stack:
            _cluster_on_demand = lambda: stack.enter_context(session(workers))  # noqa: E731
            try:
                yield
            finally:
                _cluster_on_demand = None


def connect() -> Any:
    """Return ``ray``; start the cluster of a surrounding `session_on_demand` if it has not been started."""
    ray = import_ray()
    if not ray.is_initialized() and _cluster_on_demand:
        _cluster_on_demand()
    return ray


def has_cluster() -> bool:
    """Return whether a cluster is there: one that runs, or that of ``RAY_ADDRESS``."""
    return bool(os.environ.get("RAY_ADDRESS")) or ("ray" in sys.modules and sys.modules["ray"].is_initialized())


def is_worker() -> bool:
    """Whether this process is a Ray worker, which runs tasks."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return False
    worker = internal("ray", internal("ray", internal("ray", ray, "_private"), "worker"), "global_worker")
    return bool(internal("ray", worker, "mode") == ray.WORKER_MODE)


def is_small(total_bytes: float, workers: int | None) -> bool:
    """Return whether to read this many bytes of images in this process: no cluster is there or asked for by ``workers``."""
    return total_bytes <= SMALL_BYTES and workers is None and not has_cluster()


@contextmanager
def one_thread() -> Iterator[None]:
    """Let linear algebra use one thread within the block, as in a Ray worker."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        yield


def _check_reachable(address: str) -> None:
    """Raise UserError if nothing listens on ``address``. Ray itself would retry for minutes and log each attempt."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "://" in host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise UserError(
            f"RAY_ADDRESS={address}: no Ray cluster answers ({error}); start the cluster or unset the variable"
        ) from None


def _await_nodes(ray: Any, expected: int) -> None:
    """Wait until a cluster has as many nodes as expected, and say how many have come after NODES_SECONDS at the latest."""
    limit = time.monotonic() + NODES_SECONDS
    while (nodes := sum(node["Alive"] for node in ray.nodes())) < expected and time.monotonic() < limit:
        time.sleep(0.2)
    if expected > 1:
        later = "" if nodes >= expected else f" after {NODES_SECONDS:.0f} s; the others may join later"
        print(f"ray: {nodes} of {expected} nodes{later}", flush=True)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]


def map_unordered(
    function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], *, in_flight: int, retries: int = 3,
    in_process: bool = False, resources: Mapping[str, float] | None = None,
) -> Iterator[tuple[int, Any]]:  # fmt: skip
    """Run ``function(*arguments[i])`` for every i as Ray tasks; yield (i, result) in the order of completion.

    Args:
        function: what to run; a module-level function.
        arguments: one tuple of arguments for each task.
        in_flight: how many tasks are submitted at a time.
        retries: how often a task runs again after its worker process has died.
        in_process: run the tasks in this process, in order.
        resources: of each task beside its CPU: ``num_gpus`` (a share is possible) and ``memory`` (bytes).

    Raises:
        UserError: if the workers of a task die at every attempt.
        Exception: any exception of ``function``.
    """
    if in_process:
        with one_thread():
            yield from ((index, function(*task_arguments)) for index, task_arguments in enumerate(arguments))
        return
    ray = connect()
    needed = {name: amount for name, amount in (resources or {}).items() if amount}
    task = ray.remote(num_cpus=1, max_retries=retries, **needed)(function)
    waiting: dict[Any, int] = {}
    try:
        for index, task_arguments in enumerate(arguments):
            if len(waiting) >= in_flight:
                yield _next(ray, waiting)
            waiting[task.remote(*task_arguments)] = index
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
            f"a Ray worker died at every attempt of the same task ({_first_line(error)}); free memory or set fewer "
            "--workers, then run the same command again: it continues where it stopped"
        ) from None


def import_tune() -> Any:
    """Import Ray Tune with Optuna's search and the schedulers; connect as `connect` does."""
    connect()
    from ray import tune
    from ray.tune import schedulers, search  # noqa: F401 - attributes of tune
    from ray.tune.search import optuna  # noqa: F401

    logging.getLogger("optuna").setLevel(logging.WARNING)  # by default it logs every study
    return tune


def gpus() -> float:
    """Return the number of GPUs of the connected cluster."""
    return float(connect().cluster_resources().get("GPU", 0))


def node_memory() -> float:
    """Return the bytes of memory that tasks of the largest node of the connected cluster can have."""
    return max(float(node["Resources"].get("memory", 0)) for node in connect().nodes() if node["Alive"])


def train_torch(
    function: Callable[[Any, int, int], None], argument: Any, *, ranks: int, storage: Path, name: str, gpus: float, cpus: float
) -> None:  # fmt: skip
    """Run ``function(argument, rank, world_size)`` in ``ranks`` Ray Train workers that form a torch process group.

    Each worker gets ``cpus`` CPUs and ``gpus`` GPUs. Raises RuntimeError with the cause if a worker fails.
    """
    connect()
    from ray import train
    from ray.train.torch import TorchTrainer

    def run_worker(config: dict[str, Any]) -> None:
        """Call ``function`` with the rank of this worker."""
        context = train.get_context()
        function(config["argument"], context.get_world_rank(), context.get_world_size())

    resources = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
    trainer = TorchTrainer(
        run_worker,
        train_loop_config={"argument": argument},
        scaling_config=train.ScalingConfig(num_workers=ranks, use_gpu=gpus > 0, resources_per_worker=resources),
        run_config=train.RunConfig(name=name, storage_path=str(storage)),
    )
    result = trainer.fit()
    if getattr(result, "error", None):
        raise RuntimeError(f"{name}: {result.error}")
