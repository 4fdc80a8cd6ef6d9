"""The features of one rank's scans in a file, so that a killed fit embeds only what is missing. F = features."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from infra.files import atomic_write, read_text
from pretrain.weights.embedding import embed_source
from pretrain.weights.scan_source import ScanSource

VALUE_BYTES = 4


class FeatureStore:
    """Rows of float32 features in a file, and a log of the batches in it.

    The log's first line says what the rows are features of. Each other line is the number of features and of rows after a
    batch. A batch without its line was interrupted and is cut off: features depend on the batch in their last digits, so a
    continued run makes the batches of an uninterrupted one.

    Args:
        path: the file; ``path`` with the ending ``.log`` is the log.
        header: JSON values that name encoder, scans and options. Rows of another header are discarded.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path, self._log = path, path.with_suffix(".log")
        self.width, self.rows = 0, 0
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(header, sort_keys=True)
        lines = read_text(self._log).split("\n") if self._log.exists() else []
        batches = [line for line in lines[1:-1] if line] if lines and lines[0] == text else []
        size = path.stat().st_size if path.is_file() else 0
        for line in batches:
            width, rows = map(int, line.split())
            if rows * width * VALUE_BYTES <= size:
                self.width, self.rows = width, rows
        if self.rows:
            with path.open("r+b") as stream:
                stream.truncate(self.rows * self.width * VALUE_BYTES)
        else:
            path.write_bytes(b"")
        with atomic_write(self._log, "w") as stream:
            stream.write(text + "\n" + (f"{self.width} {self.rows}\n" if self.rows else ""))

    def append(self, features: NDArray[np.float32]) -> None:
        """Add a batch of rows (n, F)."""
        with self.path.open("ab") as stream:
            stream.write(np.ascontiguousarray(features, "<f4").tobytes())
        self.width, self.rows = features.shape[1], self.rows + len(features)
        with self._log.open("a", encoding="utf-8") as log:
            log.write(f"{self.width} {self.rows}\n")

    def read(self) -> NDArray[np.float32]:
        """Return the features (rows, F) as a memory map; an empty array if there are none."""
        if not self.rows:
            return np.empty((0, self.width), np.float32)
        return np.memmap(self.path, "<f4", mode="r", shape=(self.rows, self.width))


def embed_scans(
    network: nn.Module, source: ScanSource, store: FeatureStore, on_batch: Callable[[], None], **options: Any
) -> None:
    """Add the features of a source's scans to a store, in their order, after those that it has. NaN for unreadable scans.

    Unreadable scans before the first readable one are written with it; if no scan can be read, nothing is written.

    Args:
        network: the encoder.
        source: this rank's scans.
        store: the store.
        on_batch: called after every batch.
        options: those of ``pretrain.weights.embedding.embed_source``.
    """
    positions = range(store.rows, len(source.names))
    if not positions:
        return
    expected = store.rows
    with closing(embed_source(network, source, positions, **options)) as batches:
        for batch in batches:
            last = max([*batch.positions, *batch.unreadable])
            if batch.positions:
                rows = np.full((last + 1 - expected, batch.features.shape[1]), np.nan, np.float32)
                rows[np.array(batch.positions) - expected] = batch.features
            elif store.width:
                rows = np.full((last + 1 - expected, store.width), np.nan, np.float32)
            else:
                continue
            store.append(rows)
            expected = last + 1
            on_batch()
