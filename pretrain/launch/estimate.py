"""What a step of a recipe asks for: arithmetic, counted; memory of weights, gradients and optimiser, estimated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config import Recipe
from pretrain.encoders import TRAINING_ONLY
from pretrain.model import ContrastiveModel, build_model

# Tensors of a parameter's size in an optimiser's state; others have two, as Adam.
MOMENTS = {"sgd": 1, "lars": 1}


def plain_model(recipe: Recipe) -> ContrastiveModel:
    """The recipe's network without storage and without what only makes it faster or smaller (recomputation, compile)."""
    options = {name: value for name, value in recipe.encoder.options.items() if name not in TRAINING_ONLY}
    encoder = type(recipe.encoder)(name=recipe.encoder.name, options=options)
    plain = type(recipe)(
        encoder=encoder, projector=recipe.projector, loss=recipe.loss, run=type(recipe.run)(seed=recipe.run.seed)
    )
    return build_model(plain).to("meta").train()


def scan_flops(model: ContrastiveModel, grid: Sequence[int]) -> int:
    """Floating-point operations of forward and backward of one scan's two views, a multiplication and an addition being two.

    Counted by torch.utils.flop_counter on shapes alone: convolutions and matrix products, which are nearly all. What
    recomputation and GradCache do again is not in it, as is the custom for the utilisation of a device (MFU).
    """
    views_2B1DHW = torch.empty(2, 1, 1, *grid, device="meta")
    with FlopCounterMode(display=False) as counter:
        embeddings, _ = model(views_2B1DHW)
        embeddings.sum().backward()
    return int(counter.get_total_flops())


def memory_of_a_rank(recipe: Recipe, parameters: int, ranks: int) -> dict[str, float]:
    """Bytes of weights, gradients and optimiser on a rank, as ZeRO cuts them (Rajbhandari et al. 2020, arXiv:1910.02054).

    An estimate: DeepSpeed's buffers, activations and the libraries' own memory come on top. ZeRO keeps a float32 copy of
    the weights with the optimiser, as does any shorter type; plain float32 under stage 0 has none.
    """
    stage = int((recipe.deepspeed.get("zero_optimization") or {}).get("stage", 0))
    width = 2 if recipe.train.precision in ("bf16", "fp16") else 4
    copies = MOMENTS.get(recipe.optimizer.name, 2) + (1 if stage or width == 2 else 0)
    return {
        "weights": width * parameters / (ranks if stage >= 3 else 1),
        "gradients": width * parameters / (ranks if stage >= 2 else 1),
        "optimizer": 4 * copies * parameters / (ranks if stage >= 1 else 1),
    }


def checkpoint_bytes(recipe: Recipe, parameters: int, encoder_parameters: int) -> float:
    """Bytes of a checkpoint over all ranks: weights, optimiser with its float32 copy, and the encoder as safetensors."""
    parts: dict[str, Any] = memory_of_a_rank(recipe, parameters, 1)
    return float(parts["weights"] + parts["optimizer"] + 4 * encoder_parameters)
