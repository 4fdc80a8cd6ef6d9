"""Steps whose loss or gradient is not finite: their scans are listed in a file; the step is skipped or the run stops."""

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
    """Counts the skipped steps of a run, restarts included; ``train.max_skipped_steps`` is the most."""

    def __init__(self, plan: Plan, count: int) -> None:
        self.count, self._plan = count, plan

    def skip(self, engine: Any, step: int, batch: dict[str, torch.Tensor], error: NotFinite) -> str:
        """Skip a step and return the message to print. Collective.

        The weights are those before the step on every rank; the learning rate's schedule advances. Raises NotFinite, naming
        the file that lists the batch's scans, if the run may skip no further step.
        """
        path = self._write_scans(step, batch, error)
        limit = self._plan.recipe.train.max_skipped_steps
        if self.count >= limit:
            after = f" after {self.count} skipped steps (train.max_skipped_steps={limit})" if limit else ""
            raise NotFinite(
                f"{error}{after}; no weight was changed; check the batch's scans, listed in {path}, or lower optimizer.lr"
            )
        self.count += 1
        engine.module.zero_grad()  # ZeRO stage 0 has not cleared the gradient
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", UserWarning
            )  # silence torch's warning about the order of scheduler and optimizer
            engine.lr_scheduler.step()
        return f"{error}; step skipped ({self.count} of at most {limit}); its scans are listed in {path}"

    def _write_scans(self, step: int, batch: dict[str, torch.Tensor], error: NotFinite) -> Path:
        own_keys = self._plan.manifest.scans["key"].iloc[batch["scan"].cpu().numpy()].tolist()
        keys: list[Any] = [own_keys]
        if distributed.world_size() > 1:
            keys = [None] * distributed.world_size()
            torch.distributed.all_gather_object(keys, own_keys)
        path = Path(self._plan.recipe.run.output) / f"not-finite-step-{step:08d}.json"
        if distributed.is_main():
            scans = {f"rank {rank}": rank_keys for rank, rank_keys in enumerate(keys)}
            write_json(path, {"step": step, "error": str(error), "scans": scans})
        return path
