"""How good the encoder is while it trains: a probe of a proxy on held-out participants, and signs of collapse.

Every so many epochs the ranks encode the monitor split's scans, unaugmented, each its share; rank 0 fits a
ridge probe by folds of participants. The best encoder by that probe is kept (`checkpoints/best`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from data_pipeline.loader import volumes
from data_pipeline.manifest import Manifest
from infra import distributed
from infra.errors import UserError
from pretrain.config import Monitor

Array = np.ndarray[Any, np.dtype[Any]]
FOLDS = 5
STRENGTHS = (1.0, 10.0, 100.0, 1000.0, 10000.0)


@dataclass(frozen=True)
class Watched:
    """Which scans are watched, and what is asked of them."""

    rows: Array
    labels: Array
    groups: Array
    every_steps: int


def watched_scans(settings: Monitor, manifest: Manifest, steps_per_epoch: float, seed: int) -> Watched | None:
    """The monitor's scans; None where it is off or the split is not there. UserError where they cannot be used."""
    if settings.every_epochs == 0 or settings.split not in set(manifest.scans["split"]):
        return None
    rows = manifest.rows(split=settings.split)
    labels = manifest.proxies([settings.proxy], rows)[:, 0]
    rows, labels = rows[np.isfinite(labels)], labels[np.isfinite(labels)]
    groups = manifest.subjects()[rows]
    if len(np.unique(groups)) < 2 * FOLDS:
        return None
    if len(np.unique(labels)) < 3:
        raise UserError(f"monitor.proxy={settings.proxy!r} is no number to be predicted; choose age or another one")
    if len(rows) > settings.max_scans:
        chosen = np.sort(
            np.random.Generator(np.random.Philox(key=[seed, 0x0B5])).permutation(len(rows))[: settings.max_scans]
        )
        rows, labels, groups = rows[chosen], labels[chosen], groups[chosen]
    return Watched(rows, labels, groups, max(1, round(settings.every_epochs * steps_per_epoch)))


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
    mine = torch.cat(parts).contiguous()
    if world > 1:
        every = [torch.empty_like(mine) for _ in range(world)]
        dist.all_gather(every, mine)
        mine = torch.cat(every)
    features: Array = mine[: len(rows)].cpu().numpy()
    return features


def probe_figures(features: Array, watched: Watched, proxy: str) -> dict[str, float]:
    """Mean absolute error and R² of a ridge probe, out of fold, and the features' spread.

    Folds are by participant, the penalty is chosen inside each. The spread is the mean over features of their standard
    deviation across scans, divided by their root mean square: near 0, all scans look alike to the encoder.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    answers = np.empty(len(watched.labels))
    for fit, ask in GroupKFold(FOLDS, shuffle=True, random_state=0).split(features, watched.labels, watched.groups):
        model = make_pipeline(StandardScaler(), RidgeCV(STRENGTHS))
        answers[ask] = model.fit(features[fit], watched.labels[fit]).predict(features[ask])
    residual = watched.labels - answers
    size = float(np.sqrt(np.square(features).mean())) or 1.0
    return {
        f"monitor/{proxy}_mae": float(np.abs(residual).mean()),
        f"monitor/{proxy}_r2": float(1.0 - np.square(residual).mean() / watched.labels.var()),
        "monitor/spread": float(features.std(axis=0).mean()) / size,
    }
