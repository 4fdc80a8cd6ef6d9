"""How good the encoder is while it trains: probes on held-out participants, and signs of collapse.

Every so many epochs the ranks encode the monitor split's scans, unaugmented, each its share, and embed two augmented
views of some of them, the same views each time. Rank 0 fits the probes (pretrain.run.online_probes). The best checkpoint by
the first task is kept (``checkpoints/best``). Nothing here moves the training: no random state is drawn from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from data_pipeline.loading.loader import TwoViewLoader, volumes
from data_pipeline.storage.manifest import Manifest
from infra import distributed, watchdog
from pretrain.engine.ema import Average
from pretrain.losses.proxies import proxy_columns
from pretrain.run import checkpoint
from pretrain.run.log import RunLog
from pretrain.run.online_probes import Watched, missing_split, probe_figures, score_of, view_figures
from pretrain.run.plan import Plan

Array = np.ndarray[Any, np.dtype[Any]]


class OnlineMonitor:
    """``monitor(steps done, log)``: whether the encoder is the best so far. Collective: every rank calls it."""

    def __init__(
        self,
        plan: Plan,
        engine: Any,
        average: Average | None,
        device: torch.device,
        dtype: torch.dtype,
        augment_on: str,
    ) -> None:
        # Where there is a moving average it is the encoder that is judged, as it is the one that is exported.
        self._plan, self._engine, self._average, self._augment_on = plan, engine, average, augment_on
        self._device, self._dtype = device, dtype
        self._watched = plan.watched
        if distributed.is_main():
            missing = missing_split(plan.recipe.monitor, plan.manifest)
            notes = [f"no monitor: {missing}"] if missing else []
            for text in notes + (self._watched.left_out if self._watched else []):
                print(f"pretrain: {text}", flush=True)

    def __call__(self, done: int, log: RunLog | None) -> bool:
        """Look where it is time, tell ``log`` (rank 0's) what was found."""
        watched, settings = self._watched, self._plan.recipe.monitor
        if watched is None or not watched.tasks:
            return False
        if done % watched.every_steps and done != self._plan.total_steps:
            return False
        watchdog.phase(f"the monitor's look after {done} steps", slow=True)
        averaged = (
            self._average.network(self._plan.recipe.encoder, self._device, self._dtype) if self._average else None
        )
        features = encode(
            self._engine, self._plan.manifest, watched.rows, self._device, self._dtype, settings.batch, averaged
        )
        views = self._embed_views(watched)
        better = False
        if log:
            figures = {**probe_figures(features, watched), **({} if views is None else view_figures(views))}
            log.monitor(done - 1, figures, self._alarm(figures))
            better = self._keep_best(done, watched, figures)
        return distributed.reduce_scalars([float(better)])[0] > 0

    def _alarm(self, figures: dict[str, float]) -> str:
        limit, found = self._plan.recipe.monitor.collapse_below, figures.get("monitor/embedding_std")
        if found is None or found >= limit:
            return ""
        return (
            f"the embeddings of all scans are nearly the same (embedding_std {found:.3g}, monitor.collapse_below {limit:g}); "
            "lower optimizer.lr, or look at loss.temperature and the augmentation"
        )

    def _keep_best(self, done: int, watched: Watched, figures: dict[str, float]) -> bool:
        """Rank 0 only. A best by another task (the recipe's may be changed) counts no more."""
        folder = Path(self._plan.recipe.run.output) / "checkpoints"
        name, sign = score_of(watched.tasks[0])
        known = checkpoint.read_best(folder)
        if (
            known
            and known.get("figure") == name
            and known["step"] < done
            and sign * (figures[name] - known["score"]) <= 0
        ):
            return False
        checkpoint.note_best(folder, done, name, figures[name])
        return True

    def _embed_views(self, watched: Watched) -> torch.Tensor | None:
        """Embeddings (2, n, P) of two views of some watched scans, float32 on the CPU, the same on all ranks. Collective."""
        recipe, world = self._plan.recipe, distributed.world_size()
        scans = min(recipe.monitor.view_scans, len(watched.rows))
        batch = min(recipe.monitor.batch, scans // world)
        steps = scans // (batch * world) if batch else 0
        if steps * batch * world < 2:
            return None
        rows = watched.rows[: steps * batch * world]
        loader = TwoViewLoader(
            self._plan.manifest, rows=rows, global_batch=batch * world, rank=distributed.rank(), world_size=world,
            seed=recipe.run.seed, augmentation=self._plan.augmentation, device=self._augment_on,
            proxies=proxy_columns(recipe.loss.proxies), threads=recipe.data.threads,
        )  # fmt: skip
        module, parts = self._engine.module, []
        training = module.training
        module.eval()
        try:
            with torch.no_grad():
                for _ in range(steps):
                    views = next(loader)["views"].to(self._device, self._dtype)
                    parts.append(module(views)[0].float().transpose(0, 1))
        finally:
            module.train(training)
            loader.close()
        return gather_rows(torch.cat(parts)).cpu().transpose(0, 1)


def encode(
    engine: Any, manifest: Manifest, rows: Array, device: torch.device, dtype: torch.dtype, batch: int,
    encoder: nn.Module | None = None,
) -> Array:  # fmt: skip
    """Features (n, F) of the encoder in evaluation mode, the ranks encoding a share each; the same on all. Collective.

    ``encoder``: another network than the engine's own, as its moving average. Every rank makes as many passes: under
    ZeRO 3 each is a collective.
    """
    world, rank = distributed.world_size(), distributed.rank()
    share = -(-len(rows) // world)
    padded = np.resize(rows, share * world)[rank * share : (rank + 1) * share]
    training, encoder = engine.module.training, encoder or engine.module.encoder
    engine.module.eval()
    parts = []
    with torch.no_grad():
        for _, scans in volumes(manifest, padded, batch):
            parts.append(encoder(scans.to(device, dtype)).float())
    engine.module.train(training)
    features: Array = gather_rows(torch.cat(parts))[: len(rows)].cpu().numpy()
    return features


def gather_rows(mine: torch.Tensor) -> torch.Tensor:
    """Every rank's rows, by rank. Collective."""
    if distributed.world_size() == 1:
        return mine
    every = [torch.empty_like(mine, memory_format=torch.contiguous_format) for _ in range(distributed.world_size())]
    dist.all_gather(every, mine.contiguous())
    return torch.cat(every)
