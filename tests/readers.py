"""The reader processes of a loader."""

from __future__ import annotations

from data_pipeline import TwoViewLoader


def reader_pids(loader: TwoViewLoader) -> list[int]:
    """Return the process ids of the reader processes; they run after the first ``next``."""
    return list(loader._readers.pids)
