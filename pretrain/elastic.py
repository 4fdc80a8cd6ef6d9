"""A checkpoint on another number of ranks, or under another ZeRO stage, than it was written on.

DeepSpeed's files are cut by rank. Its own converter joins them into one file per parameter and state (the universal
checkpoint), which any number of ranks under any stage from 1 to 3 can load. Stage 0 is not cut: any number of ranks
loads it as it is, but the converter does not know it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from infra import distributed
from infra.errors import UserError
from pretrain.engine import convert_to_universal, load_engine, load_universal

WHOLE, CUT = "mp_rank_00_model_states.pt", "zero_pp_rank_{}_mp_rank_00_model_states.pt"


def check_stages(folder: Path, old: int, new: int) -> None:
    """UserError where a checkpoint of ZeRO stage ``old`` cannot go on under ``new``."""
    if (old == 0) != (new == 0):
        kind = "0" if old == 0 else "1, 2 or 3"
        raise UserError(
            f"{folder} was written under ZeRO stage {old}, this run has {new}; stage 0 has no universal checkpoint: "
            f"resume with --deepspeed.zero_optimization.stage={kind}"
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
        _name_for(joined, folder, int(engine.zero_optimization_stage()))
    dist.barrier()
    load_universal(engine, joined.parent, joined.name)
    dist.barrier()
    if distributed.is_main():
        shutil.rmtree(joined, ignore_errors=True)


def _name_for(joined: Path, folder: Path, stage: int) -> None:
    """Give the model's own file the name and form in which ``stage`` looks for it; the converter keeps the old stage's.

    Stages 1 and 2 read one file with whole weights, stage 3 one per rank with empty ones; the weights that count come
    from the joined files in either case.
    """
    whole, cut = joined / WHOLE, [joined / CUT.format(rank) for rank in range(distributed.world_size())]
    if (stage == 3 and cut[0].is_file()) or (stage < 3 and whole.is_file()):
        return
    source = folder / (WHOLE if stage == 3 else CUT.format(0))
    header = torch.load(source, map_location="cpu", weights_only=False)
    for name in header["module"]:
        path = joined / "zero" / name / "fp32.pt"
        if path.is_file():  # buffers have none
            weights = torch.load(path, map_location="cpu", weights_only=False)["param"]
            header["module"][name] = torch.empty(0) if stage == 3 else weights
    for path in cut if stage == 3 else [whole]:
        torch.save(header, path)
