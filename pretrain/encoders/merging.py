"""How SwinUNETR's published weights merge neighbouring patches, which MONAI has changed since."""

from __future__ import annotations

import torch
from torch import nn

from infra.internals import internal, set_internal

# Offsets of the patches that are put side by side. Up to version 1.5 MONAI took two of the eight neighbours twice, and two
# never; its self-supervised weights were trained so.
PUBLISHED = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1))


class PublishedMerging(nn.Module):
    """(N, D, H, W, C) -> (N, D/2, H/2, W/2, 2 C), with the norm and weights of MONAI's merging; odd sides are padded by 0."""

    def __init__(self, norm: nn.Module, reduction: nn.Module) -> None:
        super().__init__()
        self.norm, self.reduction = norm, reduction

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Return the merged patches of patches (N, D, H, W, C)."""
        odd = [side % 2 for side in patches.shape[1:4]]
        padded = nn.functional.pad(patches, (0, 0, 0, odd[2], 0, odd[1], 0, odd[0]))
        neighbours = torch.cat([padded[:, i::2, j::2, k::2] for i, j, k in PUBLISHED], dim=-1)
        merged: torch.Tensor = self.reduction(self.norm(neighbours))
        return merged


def use_published_merging(transformer: nn.Module) -> None:
    """Let MONAI's SwinTransformer merge patches as its published weights do. Raises LibraryChanged if it has other layers."""
    for scale in range(1, 5):
        layer = internal("monai", transformer, f"layers{scale}")[0]
        merging = internal("monai", layer, "downsample")
        norm, reduction = (internal("monai", merging, part) for part in ("norm", "reduction"))
        set_internal("monai", layer, "downsample", PublishedMerging(norm, reduction))
