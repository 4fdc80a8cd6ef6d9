"""Steps whose loss or gradient is not finite: the scans are written down, the step is left out or the run stops."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from infra import distributed
from infra.files import write_json
from pretrain.engine.engine import NotFinite
from pretrain.run.plan import Plan


class Skips:
    """Counts the steps that were left out; ``train.max_skipped_steps`` in a whole run, restarts included."""

    def __init__(self, plan: Plan, count: int) -> None:
        self.count, self._plan = count, plan

    def skip(self, engine: Any, step: int, batch: dict[str, torch.Tensor], error: NotFinite) -> str:
        """What to say of the step left out; NotFinite, with the file that lists its scans, once the run stops. Collective.

        The weights are as they were before the step on every rank; the learning rate's schedule goes on.
        """
        path = self._write_scans(step, batch, error)
        most = self._plan.recipe.train.max_skipped_steps
        if self.count >= most:
            after = f" after {self.count} skipped steps (train.max_skipped_steps={most})" if most else ""
            raise NotFinite(
                f"{error}{after}; no weight was changed, its scans are in {path}; lower optimizer.lr, or look at them"
            )
        self.count += 1
        engine.module.zero_grad()  # under ZeRO 0 the gradient is still there
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch wonders at a schedule whose first step was left out
            engine.lr_scheduler.step()
        return f"{error}; step skipped ({self.count} of at most {most}), its scans are in {path}"

    def _write_scans(self, step: int, batch: dict[str, torch.Tensor], error: NotFinite) -> Path:
        mine = self._plan.manifest.scans["key"].iloc[batch["scan"].cpu().numpy()].tolist()
        keys: list[Any] = [mine]
        if distributed.world_size() > 1:
            keys = [None] * distributed.world_size()
            torch.distributed.all_gather_object(keys, mine)
        path = Path(self._plan.recipe.run.output) / f"not-finite-step-{step:08d}.json"
        if distributed.is_main():
            scans = {f"rank {rank}": of_rank for rank, of_rank in enumerate(keys)}
            write_json(path, {"step": step, "error": str(error), "scans": scans})
        return path
