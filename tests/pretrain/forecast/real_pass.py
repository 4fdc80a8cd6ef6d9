"""What autograd keeps in a forward pass on real tensors."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from pretrain.config import Recipe
from pretrain.forecast.fake_pass import AUTOCAST
from pretrain.model import build_model


def saved_by_a_real_pass(recipe: Recipe, grid: tuple[int, int, int], scans: int, device: str = "cpu") -> int:
    """Return the bytes that autograd saves in a forward pass, without parameters and volumes."""
    model = build_model(recipe).to(device).train()
    views = torch.zeros(2, scans, 1, *grid, device=device)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), views)}
    sizes, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    low = AUTOCAST.get(recipe.train.precision)
    types = torch.autocast(device, low) if low else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), types:
        outputs = model(views)
    assert outputs is not None
    return sum(sizes.values())
