"""The trained network: encoder and projector. B = scans of this rank, F = encoder features, P = size of the projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from infra.errors import UserError
from pretrain.config import Recipe
from pretrain.encoders import build_encoder
from pretrain.encoders.layers import padding_of
from pretrain.losses.dense import sample_cells
from pretrain.losses.reconstruction import Decoder, hidden_voxels, squared_errors
from pretrain.losses.temperature import Temperature

# Tensors of a loader's batch that the model takes beside the views, if the recipe has a further term of the loss.
VIEW_DETAILS = ("masked", "cutout", "placement")


class Projector(nn.Sequential):
    """Linear, ReLU, Linear: (N, F) -> (N, P). The paper's sizes are 512 hidden units and P = 128."""

    def __init__(self, features: int, hidden: int, out: int) -> None:
        super().__init__(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, out))


class CellProjector(Projector):
    """The projector of the dense loss, shared by the G x G x G cells: (N, G³, C) -> (N, G³, P)."""

    def __init__(self, channels: int, hidden: int, out: int, grid: int) -> None:
        super().__init__(channels, hidden, out)
        self.grid = grid


class ContrastiveModel(nn.Module):
    """Encoder and projector: (2, B, 1, D, H, W) -> embeddings (2, B, P), and the temperature if it is learned.

    Both views go through the encoder in one pass, so that the statistics of batch normalisation cover both, as in the
    published code.

    Args:
        encoder: (N, 1, D, H, W) -> (N, F). With a decoder or cells it also has ``map_and_features`` and ``multiple``, as
            `pretrain.encoders.layers.PooledEncoder`.
        projector: (N, F) -> (N, P).
        temperature: the learned temperature.
        decoder: rebuilds hidden voxels from the encoder's last map.
        cells: projects the cells of the encoder's last map.
    """

    def __init__(
        self, encoder: nn.Module, projector: nn.Module, temperature: Temperature | None = None,
        decoder: Decoder | None = None, cells: CellProjector | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.temperature = temperature
        self.decoder = decoder
        self.cells = cells

    def forward(
        self, views_2B1DHW: torch.Tensor, masked: torch.Tensor | None = None, cutout: torch.Tensor | None = None,
        placement: torch.Tensor | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        """Return the embeddings (2, B, P), the learned temperature or None, and the outputs of the further terms.

        The details of the views (`data_pipeline.loading.view_details`) are given in training, if there is a further term:
        with a decoder, voxels that they hide are set to 0 before the encoder sees them, and the output has the errors
        (2, B, 2) of `squared_errors`; with cells, it then has the projected cells (2, B, G³, P).
        """
        learned = None if self.temperature is None else self.temperature()
        if cutout is None or (self.decoder is None and self.cells is None):
            embeddings: torch.Tensor = self.projector(self.encoder(views_2B1DHW.flatten(0, 1)))
            return embeddings.view(2, -1, embeddings.shape[-1]), learned
        sides, shown, hidden = tuple(views_2B1DHW.shape[3:]), views_2B1DHW, None
        if self.decoder is not None and masked is not None:
            hidden = hidden_voxels(masked, cutout, sides)
            shown = views_2B1DHW.masked_fill(hidden, 0.0)
        last_map, features = self.encoder.map_and_features(shown.flatten(0, 1))  # type: ignore[operator]
        embeddings = self.projector(features)
        further, padding = [], padding_of(sides, int(self.encoder.multiple))  # type: ignore[arg-type]
        if self.decoder is not None and hidden is not None:
            rebuilt = self.decoder.rebuild(last_map, sides, padding).view(views_2B1DHW.shape)
            further.append(squared_errors(rebuilt, views_2B1DHW, hidden))
        if self.cells is not None and placement is not None:
            sampled_NKC = sample_cells(
                last_map, placement.flatten(0, 1), cutout.flatten(0, 1), grid=self.cells.grid, sides=sides,
                padding=padding,
            )  # fmt: skip
            projected_NKP = self.cells(sampled_NKC.to(last_map.dtype))
            further.append(projected_NKP.view(2, -1, *projected_NKP.shape[1:]))
        return embeddings.view(2, -1, embeddings.shape[-1]), learned, *further


def build_model(recipe: Recipe) -> ContrastiveModel:
    """Build the recipe's encoder and projector, and what the further terms of its loss need.

    The weights depend only on ``run.seed`` and are the same on every rank. Those of encoder and projector do not depend on
    the further terms.
    """
    loss, sizes = recipe.loss, recipe.projector
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.run.seed)
        encoder = build_encoder(recipe.encoder.name, recipe.encoder.options)
        features = int(encoder.feature_size)  # type: ignore[arg-type]
        projector = Projector(features, sizes.hidden, sizes.out)
        decoder = None if loss.reconstruction is None else Decoder(_channels(recipe, encoder))
        cells = None
        if loss.dense is not None:
            cells = CellProjector(_channels(recipe, encoder), sizes.hidden, sizes.out, loss.dense.grid)
    learned = loss.temperature_bounds
    temperature = None if learned is None else Temperature(loss.temperature, *learned)
    return ContrastiveModel(encoder, projector, temperature, decoder, cells)


def _channels(recipe: Recipe, encoder: nn.Module) -> int:
    """Return the channels of the encoder's last map; raises UserError if the encoder does not give the map."""
    if not hasattr(encoder, "map_and_features"):
        raise UserError(
            f"loss.reconstruction and loss.dense need an encoder that gives its last feature map; {recipe.encoder.name} has no "
            "map_and_features: leave them out, or choose another encoder"
        )
    return int(encoder.channels)  # type: ignore[arg-type]
