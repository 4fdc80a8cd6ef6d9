"""Processes that are forked from one process with all imports, so that they start quickly."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

IMPORTED = [
    "pretrain.train", "deepspeed.runtime.zero.muon.muon_optimizer", "torch._inductor.compile_fx", "monai.networks.nets",
    "mlflow.store.tracking.sqlalchemy_store", "nvidia.dali.fn", "sklearn.linear_model", "sklearn.metrics",
    "tests.faults.rank_process",
]  # fmt: skip


def imported() -> ForkServerContext:
    """Return the context whose processes begin with IMPORTED.

    They have the environment variables of the first such start in this test process, not the present ones.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context
