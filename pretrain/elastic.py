"""A checkpoint on another number of ranks, or under another ZeRO stage, than it was written on.

DeepSpeed's files are cut by rank. Its own converter joins them into one file per parameter and state (the universal
checkpoint), which any number of ranks can load: under stage 1 or 2 what either wrote, under stage 3 what stage 3 wrote
(measured: one family's lacks files that the other looks for). Stage 0 is not cut: any number of ranks loads it as it is.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from infra import distributed
from infra.errors import UserError
from pretrain.engine import convert_to_universal, load_engine, load_universal

# Stages whose universal checkpoints DeepSpeed 0.19 loads into each other.
FAMILIES = ((0,), (1, 2), (3,))


def check_stages(folder: Path, old: int, new: int) -> None:
    """UserError where a checkpoint of ZeRO stage ``old`` cannot go on under ``new``."""
    family = next(stages for stages in FAMILIES if old in stages)
    if new not in family:
        allowed = " or ".join(map(str, family))
        raise UserError(
            f"{folder} was written under ZeRO stage {old}, this run has {new}, which DeepSpeed cannot convert it to; "
            f"resume with --deepspeed.zero_optimization.stage={allowed}"
        )


def load_elsewhere(folder: Path, stage: int, engine: Any) -> None:
    """Load checkpoint ``folder``, written under ZeRO ``stage``, whatever this run's ranks and stage. Collective."""
    check_stages(folder, stage, int(engine.zero_optimization_stage()))
    if stage == 0:
        load_engine(engine, folder.parent, folder.name)
        return
    joined = folder.parent / f".unfinished-universal-{folder.name}"
    if distributed.is_main():
        shutil.rmtree(joined, ignore_errors=True)
        convert_to_universal(folder, joined)
    dist.barrier()
    load_universal(engine, joined.parent, joined.name)
    dist.barrier()
    if distributed.is_main():
        shutil.rmtree(joined, ignore_errors=True)
