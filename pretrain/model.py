"""The trained network: encoder and projector. B = scans of this rank, F = encoder features, P = size of the projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from infra.errors import UserError, nearest
from pretrain.config import Recipe
from pretrain.encoders import build_encoder
from pretrain.encoders.centres import SIDE
from pretrain.losses.dense import sample_cells
from pretrain.losses.reconstruction import Decoder, doublings_for, hidden_voxels, squared_errors
from pretrain.losses.temperature import Temperature
from pretrain.weights.layers import main_blocks

# Tensors of a loader's batch that the model takes beside the views, if the recipe has a further term of the loss.
VIEW_DETAILS = ("masked", "cutout", "placement")


class Projector(nn.Sequential):
    """Linear, ReLU, Linear: (N, F) -> (N, P). The paper's sizes are 512 hidden units and P = 128."""

    def __init__(self, features: int, hidden: int, out: int) -> None:
        super().__init__(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, out))


class CellProjector(Projector):
    """The projector of the dense loss, shared by the G x G x G cells: (N, G³, C) -> (N, G³, P).

    ``layer`` is the block whose map has the cells; None is the last map.
    """

    def __init__(self, channels: int, hidden: int, out: int, grid: int, layer: str | None = None) -> None:
        super().__init__(channels, hidden, out)
        self.grid, self.layer = grid, layer


class ContrastiveModel(nn.Module):
    """Encoder and projector: (2, B, 1, D, H, W) -> embeddings (2, B, P), and the temperature if it is learned.

    Both views go through the encoder in one pass, so that the statistics of batch normalisation cover both, as in the
    published code.

    Args:
        encoder: (N, 1, D, H, W) -> (N, F). With a decoder or cells it also has ``maps_and_features`` and ``map_axes``,
            as `pretrain.encoders.layers.PooledEncoder`.
        projector: (N, F) -> (N, P).
        temperature: the learned temperature.
        decoder: rebuilds hidden voxels from a map of the encoder.
        cells: projects the cells of a map of the encoder.
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
        (2, B, 2) of `squared_errors`; with cells, it then has (2, B, G³, P + 1): the projected cells, and in the last place 1
        if the view shows the cell, else 0.
        """
        learned = None if self.temperature is None else self.temperature()
        if cutout is None or masked is None or (self.decoder is None and self.cells is None):
            embeddings: torch.Tensor = self.projector(self.encoder(views_2B1DHW.flatten(0, 1)))
            return embeddings.view(2, -1, embeddings.shape[-1]), learned
        sides, shown, hidden = tuple(views_2B1DHW.shape[3:]), views_2B1DHW, None
        if self.decoder is not None:
            hidden = hidden_voxels(masked, cutout, sides)
            shown = views_2B1DHW.masked_fill(hidden, 0.0)
        layers = [part.layer for part in (self.decoder, self.cells) if part is not None]
        maps, features = self.encoder.maps_and_features(shown.flatten(0, 1), layers)  # type: ignore[operator]
        embeddings, further = self.projector(features), []
        if self.decoder is not None and hidden is not None:
            axes = self.encoder.map_axes(sides, self.decoder.layer)  # type: ignore[operator]
            rebuilt = self.decoder.rebuild(maps[0], sides, axes).view(views_2B1DHW.shape)
            further.append(squared_errors(rebuilt, views_2B1DHW, hidden))
        if self.cells is not None and placement is not None:
            details = (placement.flatten(0, 1), cutout.flatten(0, 1), masked.flatten(0, 1))
            further.append(self._projected_cells(maps[-1], details, sides))
        return embeddings.view(2, -1, embeddings.shape[-1]), learned, *further

    def _projected_cells(
        self, map_NCdhw: torch.Tensor, details: tuple[torch.Tensor, torch.Tensor, torch.Tensor], sides: tuple[int, ...]
    ) -> torch.Tensor:
        """Return the projected cells of both views, and whether the views show them, as one tensor (2, B, G³, P + 1)."""
        assert self.cells is not None
        axes = self.encoder.map_axes(sides, self.cells.layer)  # type: ignore[operator]
        sampled_NKC, shown_NK = sample_cells(map_NCdhw, *details, grid=self.cells.grid, axes=axes, sides=sides)
        projected_NKP = self.cells(sampled_NKC.to(map_NCdhw.dtype))
        cells_NKQ = torch.cat([projected_NKP, shown_NK[..., None].to(projected_NKP.dtype)], dim=2)
        return cells_NKQ.view(2, -1, *cells_NKQ.shape[1:])


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
        decoder = cells = None
        if loss.reconstruction is not None:
            channels, step = _map_of(recipe, encoder, "reconstruction", loss.reconstruction.layer)
            decoder = Decoder(channels, loss.reconstruction.layer, doublings_for(step))
        if loss.dense is not None:
            channels, _ = _map_of(recipe, encoder, "dense", loss.dense.layer)
            cells = CellProjector(channels, sizes.hidden, sizes.out, loss.dense.grid, loss.dense.layer)
    learned = loss.temperature_bounds
    temperature = None if learned is None else Temperature(loss.temperature, *learned)
    return ContrastiveModel(encoder, projector, temperature, decoder, cells)


def _map_of(recipe: Recipe, encoder: nn.Module, term: str, layer: str | None) -> tuple[int, float]:
    """Return the channels of the map that a term of the loss works on, and the least distance of its positions in voxels.

    Raises UserError if the encoder has no such map.
    """
    check_layer(recipe.encoder.name, encoder, f"loss.{term}", layer)
    sides = (SIDE, SIDE, SIDE)
    channels = encoder.map_of(sides, layer)[0]  # type: ignore[operator]
    return channels, min(axis.step for axis in encoder.map_axes(sides, layer))  # type: ignore[operator]


def check_layer(name: str, encoder: nn.Module, term: str, layer: str | None) -> None:
    """Raise UserError if an encoder does not give its maps, or has no block ``layer``. ``term`` is loss.dense, for example."""
    if not hasattr(encoder, "maps_and_features"):
        raise UserError(
            f"{term} needs an encoder that gives its feature maps; {name} has no maps_and_features: leave it out, or choose "
            "another encoder"
        )
    blocks = main_blocks(encoder)
    if layer is not None and layer not in blocks:
        raise UserError(
            f"{term}.layer={layer!r} is not a block of {name}{nearest(layer, blocks)}; allowed: {', '.join(blocks)}, or null "
            "for the last map"
        )
