"""The trained network: encoder and projector. B = scans of this rank, F = encoder features, P = size of the projection."""

from __future__ import annotations

import torch
from torch import nn

from pretrain.config import Recipe
from pretrain.encoders import build_encoder
from pretrain.losses.temperature import Temperature


class Projector(nn.Sequential):
    """Linear, ReLU, Linear: (N, F) -> (N, P). The paper's sizes are 512 hidden units and P = 128."""

    def __init__(self, features: int, hidden: int, out: int) -> None:
        super().__init__(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, out))


class ContrastiveModel(nn.Module):
    """Encoder and projector: (2, B, 1, D, H, W) -> embeddings (2, B, P), and the temperature if it is learned.

    Both views go through the encoder in one pass, so that the statistics of batch normalisation cover both, as in the
    published code.
    """

    def __init__(self, encoder: nn.Module, projector: nn.Module, temperature: Temperature | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.temperature = temperature

    def forward(self, views_2B1DHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the embeddings (2, B, P) and the learned temperature, or None."""
        embeddings: torch.Tensor = self.projector(self.encoder(views_2B1DHW.flatten(0, 1)))
        learned = None if self.temperature is None else self.temperature()
        return embeddings.view(2, -1, embeddings.shape[-1]), learned


def build_model(recipe: Recipe) -> ContrastiveModel:
    """Build the recipe's encoder and projector. The weights depend only on ``run.seed`` and are the same on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.run.seed)
        encoder = build_encoder(recipe.encoder.name, recipe.encoder.options)
        features = int(encoder.feature_size)  # type: ignore[arg-type]
        projector = Projector(features, recipe.projector.hidden, recipe.projector.out)
    learned = recipe.loss.temperature_bounds
    temperature = None if learned is None else Temperature(recipe.loss.temperature, *learned)
    return ContrastiveModel(encoder, projector, temperature)
