"""Where grids are searched that may run in this process: here, or in Ray Tune."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from infra import ray_cluster
from infra.errors import UserError

PLACES = ("auto", "ray", "here")
_place = "auto"


@contextmanager
def searching(where: str) -> Iterator[None]:
    """Within the block, search grids (`infra.tuning.tune_grid`) in this process (``here``), in Ray (``ray``), or ``auto``.

    ``auto`` begins in this process if no cluster is there, and hands over to Ray what would take longer than Ray's start.
    The results are the same. Raises UserError if ``where`` is none of these.
    """
    global _place
    if where not in PLACES:
        raise UserError(f"search={where!r:.80} is not known; allowed: {', '.join(PLACES)}")
    before, _place = _place, where
    try:
        yield
    finally:
        _place = before


def search_place() -> str:
    """Return where a grid is searched that may run in this process: ``here``, ``ray`` or ``auto``; see `searching`."""
    return "ray" if _place == "auto" and ray_cluster.has_cluster() else _place
