"""The online monitor: probes on held-out participants during training, and signs of collapse.

Every ``monitor.every_epochs`` epochs the ranks encode the unaugmented scans of the monitor split, each rank a share, and
embed two augmented views of some of them, always the same views. Rank 0 fits the probes (pretrain.run.online_probes). The
checkpoint that is best by the first task is kept (``checkpoints/best``). The monitor does not influence the training: it
draws no random numbers from the training's generators.

n = watched scans, F = encoder features, P = size of the projector's output.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from data_pipeline.loading.loader import TwoViewLoader, volumes
from data_pipeline.storage.manifest import Manifest
from infra import distributed, watchdog
from pretrain.engine.ema import Average
from pretrain.losses.proxies import proxy_columns
from pretrain.run import checkpoint
from pretrain.run.log import RunLog
from pretrain.run.online_probes import Watched, missing_split, probe_metrics, score_of, view_metrics
from pretrain.run.plan import Plan
from pretrain.weights.layers import intermediate_features


class OnlineMonitor:
    """``monitor(steps_done, log)`` returns whether the encoder is the best so far. Collective."""

    def __init__(
        self,
        plan: Plan,
        engine: Any,
        average: Average | None,
        device: torch.device,
        dtype: torch.dtype,
        augment_on: str,
    ) -> None:
        # A moving average, if there is one, is monitored instead of the encoder, because it is what is exported.
        self._plan, self._engine, self._average, self._augment_on = plan, engine, average, augment_on
        self._device, self._dtype = device, dtype
        self._watched = plan.watched
        if distributed.is_main():
            missing = missing_split(plan.recipe.monitor, plan.manifest)
            notes = [f"no monitor: {missing}"] if missing else []
            for text in notes + (self._watched.left_out if self._watched else []):
                print(f"pretrain: {text}", flush=True)

    def __call__(self, steps_done: int, log: RunLog | None) -> bool:
        """If it is time, evaluate the encoder and report to ``log`` (rank 0's; None elsewhere)."""
        watched, settings = self._watched, self._plan.recipe.monitor
        if watched is None or not watched.tasks:
            return False
        if steps_done % watched.every_steps and steps_done != self._plan.total_steps:
            return False
        watchdog.phase(f"the monitor's look after {steps_done} steps", slow=True)
        averaged = (
            self._average.network(self._plan.recipe.encoder, self._device, self._dtype) if self._average else None
        )
        features = encode(
            self._engine, self._plan.manifest, watched.rows, device=self._device, dtype=self._dtype,
            batch=settings.batch, encoder=averaged, pooling=settings.pooling,
        )  # fmt: skip
        views = self._embed_views(watched)
        better = False
        if log:
            metrics = {**probe_metrics(features, watched), **({} if views is None else view_metrics(views))}
            log.monitor(steps_done - 1, metrics, self._alarm(metrics))
            better = self._keep_best(steps_done, watched, metrics)
        return distributed.reduce_scalars([float(better)])[0] > 0

    def _alarm(self, metrics: dict[str, float]) -> str:
        limit, spread = self._plan.recipe.monitor.collapse_below, metrics.get("monitor/embedding_std")
        if spread is None or spread >= limit:
            return ""
        return (
            f"the embeddings of all scans are nearly equal (embedding_std {spread:.3g}, monitor.collapse_below {limit:g}); "
            "lower optimizer.lr, or check loss.temperature and the augmentation"
        )

    def _keep_best(self, steps_done: int, watched: Watched, metrics: dict[str, float]) -> bool:
        """Note the encoder's score if it is the best so far by the first task, and return whether it is. Rank 0 only.

        A score of another task is ignored: the recipe's tasks may have changed since.
        """
        folder = Path(self._plan.recipe.run.output) / "checkpoints"
        metric, sign = score_of(watched.tasks[0])
        best = checkpoint.read_best(folder)
        comparable = best if best and best["metric"] == metric and best["step"] < steps_done else None
        if comparable and sign * (metrics[metric] - comparable["score"]) <= 0:
            return False
        checkpoint.note_best(folder, steps_done, metric, metrics[metric])
        return True

    def _embed_views(self, watched: Watched) -> torch.Tensor | None:
        """Return embeddings (2, n, P) of two views of some watched scans, float32 on the CPU, on all ranks. Collective.

        None if there are fewer than two such scans.
        """
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
        module, embeddings = self._engine.module, []
        training = module.training
        module.eval()
        try:
            with torch.no_grad():
                for _ in range(steps):
                    views = next(loader)["views"].to(self._device, self._dtype)
                    embeddings.append(module(views)[0].float().transpose(0, 1))
        finally:
            module.train(training)
            loader.close()
        return gather_rows(torch.cat(embeddings)).cpu().transpose(0, 1)


def encode(
    engine: Any, manifest: Manifest, rows: NDArray[np.int64], *, device: torch.device, dtype: torch.dtype, batch: int,
    encoder: nn.Module | None = None, pooling: str = "mean",
) -> NDArray[np.float32]:  # fmt: skip
    """Return the features (n, F) of scans from the encoder in evaluation mode, on all ranks. Collective.

    Each rank encodes a share, in the same number of passes: under ZeRO stage 3 each pass is a collective.

    Args:
        engine: the DeepSpeed engine.
        manifest: the manifest of the scans.
        rows: row numbers (n,) of the scans.
        device: this rank's device.
        dtype: type of the network's input.
        batch: scans per pass.
        encoder: a network to use instead of the engine's, such as its moving average.
        pooling: of the encoder's last map; ``mean``: the encoder's own features.
    """
    world, rank = distributed.world_size(), distributed.rank()
    share = -(-len(rows) // world)
    padded = np.resize(rows, share * world)[rank * share : (rank + 1) * share]
    training, encoder = engine.module.training, encoder or engine.module.encoder
    compute = intermediate_features(encoder, None, (pooling,))
    engine.module.eval()
    with torch.no_grad():
        own = [compute(scans.to(device, dtype)).float() for _, scans in volumes(manifest, padded, batch)]
    engine.module.train(training)
    features: NDArray[np.float32] = gather_rows(torch.cat(own))[: len(rows)].cpu().numpy()
    return features


def gather_rows(own: torch.Tensor) -> torch.Tensor:
    """Concatenate the rows (n, ...) of all R ranks to (R n, ...), ordered by rank; n is the same on all ranks. Collective."""
    if distributed.world_size() == 1:
        return own
    all_rows = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(distributed.world_size())]
    dist.all_gather(all_rows, own.contiguous())
    return torch.cat(all_rows)
