"""Features of many scans: decoded by threads in the background, encoded in batches, in the order of the scans.

Threads suffice, because gzip, zstd, NumPy and SciPy release Python's global lock: two threads read 3.7 gzipped scans of
1.5 mm per second, two processes 3.1 (1.1 each if the scans are resampled; measured on two busy cores).
"""

from __future__ import annotations

import io
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn

from data_pipeline.volume.errors import BadScan
from infra.errors import UserError
from infra.lean_imports import is_own_process
from infra.processes.allowance import usable_cores
from infra.processes.kept_memory import keep_freed_memory
from infra.progress import Progress
from pretrain.encoders.cpu_speed import fast_layout, scans_of_a_batch
from pretrain.weights.layers import Block, features_of_blocks, intermediate_features
from pretrain.weights.readouts import Readouts
from pretrain.weights.scan_source import ScanSource

BATCH_SIZE = 8  # most scans of a batch if the caller gives no number
MOST_WORKERS = 8  # upper limit of the default number of threads
Features = Callable[[torch.Tensor], torch.Tensor]  # (B, 1, D, H, W) -> (B, F)


@dataclass(frozen=True)
class FeatureBatch:
    """Features of some scans, by their positions, and the reasons why others could not be read."""

    positions: list[int]
    features: NDArray[np.float32]  # (len(positions), F), then the columns of readouts if they were asked for
    unreadable: dict[int, str]


def embed_source(
    network: nn.Module, source: ScanSource, positions: Sequence[int], *, layer: str | None = None,
    pooling: str | Sequence[str] = "mean", device: str | torch.device | None = None, batch_size: int | None = None,
    workers: int | None = None, progress: bool | TextIO = True, readouts: Readouts | None = None,
) -> Generator[FeatureBatch, None, None]:  # fmt: skip
    """Yield the features of a source's scans at some positions, in their order; arguments as ``Encoder.embed``.

    ``progress`` may be the stream to show it on. With ``readouts`` their columns (``Readouts.columns``) follow the features.
    The network is moved to the device in evaluation mode; when the generator ends or is closed, the network is moved back and
    the reading threads have ended.

    Raises UserError if the layer, pooling, batch size, device or number of workers is not possible.
    """
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size={batch_size} is too small; give 1 or more")
    poolings = (pooling,) if isinstance(pooling, str) else tuple(pooling)
    compute = _finite(intermediate_features(network, layer, poolings))
    if readouts is not None:
        compute = _with_readouts(network, (layer, poolings), readouts)
    target, threads = choose_device(device), default_workers(workers)
    if target.type == "cpu" and is_own_process():
        keep_freed_memory()
    stream = progress if not isinstance(progress, bool) else sys.stderr if progress else io.StringIO()
    with (
        _on_device(network, target),
        Progress(len(source.names), "scans", "embedding", len(source.names) - len(positions), stream) as shown,
    ):
        for batch in _batches(compute, source, positions, target, batch_size=batch_size, workers=threads):
            yield batch
            shown.advance(len(batch.positions) + len(batch.unreadable))


def embed_table(
    network: nn.Module, source: ScanSource, *, stop_at_unreadable: bool = False, **options: Any
) -> tuple[pd.DataFrame, dict[str, str]]:
    """Return the features of all scans of a source as a table, and the reason of each scan that cannot be read.

    ``options`` are those of ``embed_source``. Raises UserError at the first unreadable scan if ``stop_at_unreadable``.
    """
    names, parts, unreadable = list[str](), list[NDArray[np.float32]](), dict[str, str]()
    with closing(embed_source(network, source, range(len(source.names)), **options)) as batches:
        for batch in batches:
            unreadable |= {source.names[position]: reason for position, reason in batch.unreadable.items()}
            if unreadable and stop_at_unreadable:
                raise UserError(": ".join(next(iter(unreadable.items()))))
            if batch.positions:
                names += [source.names[position] for position in batch.positions]
                parts.append(batch.features)
    features = np.concatenate(parts) if parts else np.empty((0, 0), np.float32)
    return feature_table(names, features, source.index, options.get("readouts")), unreadable


def feature_table(
    names: Sequence[str], features: NDArray[np.float32], index: str, readouts: Readouts | None = None
) -> pd.DataFrame:
    """Return features (n, F) as a table: columns ``f0``, ``f1``, ...; ``names`` as the index, which is named ``index``.

    With ``readouts`` the last columns are theirs and have their names.
    """
    last = readouts.columns if readouts is not None and features.shape[1] else []
    columns = [*(f"f{number}" for number in range(features.shape[1] - len(last))), *last]
    table = pd.DataFrame(features, index=list(names), columns=columns)
    table.index.name = index
    return table


def default_workers(workers: int | None) -> int:
    """Return the number of reading threads: ``workers``, or one per core and at most ``MOST_WORKERS`` if it is None.

    Raises UserError if ``workers`` is negative.
    """
    if workers is not None and workers < 0:
        raise UserError(f"workers={workers} is too small; give 0 or more")
    return min(MOST_WORKERS, usable_cores()) if workers is None else workers


def choose_device(device: str | torch.device | None) -> torch.device:
    """Return a device to compute on; None is the GPU if there is one. Raises UserError if it does not exist here."""
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"device={str(device)!r} cannot be used here ({reason}); give cpu or cuda") from None
    return chosen


def _with_readouts(network: nn.Module, block: Block, readouts: Readouts) -> Features:
    """Return a function from volumes to the features of a block and the columns of readouts, in one forward pass."""
    compute = features_of_blocks(network, [block, (readouts.layer, readouts.pooling)])

    def features(volumes_B1DHW: torch.Tensor) -> torch.Tensor:
        """Return features and readouts (B, F + columns) on the CPU."""
        own, theirs = (values.float().cpu() for values in compute(volumes_B1DHW))
        _check_finite(own)
        columns = np.array(readouts.table(theirs.numpy()), np.float32)
        return torch.cat([own, torch.from_numpy(columns)], dim=1)

    return features


def _finite(compute: Features) -> Features:
    """Return the same function, which raises UserError if a feature is NaN or infinite."""

    def features(volumes_B1DHW: torch.Tensor) -> torch.Tensor:
        """Return features (B, F)."""
        values = compute(volumes_B1DHW)
        _check_finite(values)
        return values

    return features


def _check_finite(features_BF: torch.Tensor) -> None:
    wrong = int((~torch.isfinite(features_BF).flatten(1).all(dim=1)).sum())
    if wrong:
        raise UserError(
            f"the encoder's features of {wrong} of {len(features_BF)} scans are NaN or infinite: its weights are damaged or "
            "too large; export the encoder again"
        )


def _batches(
    compute: Features,
    source: ScanSource,
    positions: Sequence[int],
    device: torch.device,
    *,
    batch_size: int | None,
    workers: int,
) -> Iterator[FeatureBatch]:
    volumes: list[NDArray[np.float32]] = []
    taken, unreadable = list[int](), dict[int, str]()
    size = batch_size or BATCH_SIZE
    ahead = max(2 * workers, size)
    for number, (position, volume) in enumerate(_read_ahead(source, positions, workers, ahead), 1):
        if isinstance(volume, str):
            unreadable[position] = volume
        else:
            taken.append(position)
            volumes.append(volume)
            size = batch_size or scans_of_a_batch(device, volume.size, BATCH_SIZE)
        if len(volumes) == size or number == len(positions):
            yield FeatureBatch(taken, _encode(compute, volumes, device), unreadable)
            volumes, taken, unreadable = [], [], {}


def _encode(compute: Features, volumes: list[NDArray[np.float32]], device: torch.device) -> NDArray[np.float32]:
    """Features (B, F) in full float32; (0, 0) of no volumes.

    TensorFloat-32, which cuDNN uses by default on newer GPUs, would make features depend on the batch.
    """
    if not volumes:
        return np.empty((0, 0), np.float32)
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.no_grad():
            batch_B1DHW = torch.from_numpy(np.stack(volumes)[:, None]).to(device)
            features: NDArray[np.float32] = compute(batch_B1DHW).float().cpu().numpy()
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
    return features


@contextmanager
def _on_device(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Put a network on ``device`` in evaluation mode, in the layout that is faster there; restore all at the end."""
    before, training = next(network.parameters()).device, network.training
    network.eval().to(device)
    try:
        with fast_layout(network, device):
            yield
    finally:
        network.train(training).to(before)


def _read_ahead(
    source: ScanSource, positions: Sequence[int], workers: int, ahead: int
) -> Iterator[tuple[int, NDArray[np.float32] | str]]:
    """Each position with its voxels, or with the reason why they cannot be used; at most ``ahead`` are decoded early."""
    if workers == 0:
        for position in positions:
            yield position, _read(source, position)
        return
    pending: deque[tuple[int, Future[NDArray[np.float32] | str]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="scans")
    try:
        for position in positions:
            pending.append((position, pool.submit(_read, source, position)))
            if len(pending) > ahead:
                first, result = pending.popleft()
                yield first, result.result()
        while pending:
            first, result = pending.popleft()
            yield first, result.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _read(source: ScanSource, position: int) -> NDArray[np.float32] | str:
    try:
        return source.read(position)
    except BadScan as error:
        return str(error)
