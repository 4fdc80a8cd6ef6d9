"""Nested cross-validation in this process, without a folder of results."""

from __future__ import annotations

from evaluation.protocols.nested_cv import NestedCVResult, PreparedTask, Probe, combine, parts_of, trial


def search_task(prepared: PreparedTask, probe: Probe) -> NestedCVResult:
    """Run nested cross-validation of a probe for one task."""
    data = {"tasks": {"": prepared}, "probe": probe}
    return combine([trial({"task": "", "part": part}, data) for part in parts_of(prepared)], prepared, probe)
