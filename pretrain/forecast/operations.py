"""The cost of a step: operations, counted; memory of weights, gradients and optimiser, estimated."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config import Recipe
from pretrain.encoders import TRAINING_ONLY
from pretrain.engine.deepspeed_config import zero_stage
from pretrain.forecast.traffic import width_of
from pretrain.model import ContrastiveModel, build_model

# Tensors per parameter in an optimiser's state; the others have two, as Adam does.
MOMENTS = {"sgd": 1, "lars": 1}


def network_without(recipe: Recipe, left_out: Collection[str]) -> ContrastiveModel:
    """Return the recipe's network without some of the encoder's options, in training mode."""
    options = {name: value for name, value in recipe.encoder.options.items() if name not in left_out}
    encoder = type(recipe.encoder)(name=recipe.encoder.name, options=options)
    plain = type(recipe)(
        encoder=encoder, projector=recipe.projector, loss=recipe.loss, run=type(recipe.run)(seed=recipe.run.seed)
    )
    return build_model(plain).train()


def plain_model(recipe: Recipe) -> ContrastiveModel:
    """Return the recipe's network on the meta device, without recomputation and compilation."""
    return network_without(recipe, TRAINING_ONLY).to("meta")


def scan_flops(model: ContrastiveModel, grid: Sequence[int]) -> int:
    """Return the floating-point operations of forward and backward pass of one scan (two views) on a grid (D, H, W).

    torch.utils.flop_counter counts them from the shapes: convolutions and matrix products, which are nearly all. A
    multiply-add counts as two. Recomputation and GradCache's second pass are not included, as usual for model FLOPs
    utilisation (MFU). Nor are the decoder and the cells of the further terms of the loss, which are small.
    """
    views_2B1DHW = torch.empty(2, 1, 1, *grid, device="meta")
    with FlopCounterMode(display=False) as counter:
        embeddings, *_ = model(views_2B1DHW)
        embeddings.sum().backward()
    return int(counter.get_total_flops())


def memory_of_a_rank(recipe: Recipe, parameters: int, ranks: int) -> dict[str, float]:
    """Return the bytes of weights, gradients and optimiser per rank under ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054).

    This is an estimate without activations, DeepSpeed's buffers and the libraries' own memory. The optimiser holds a float32
    copy of the weights under ZeRO stages 1 to 3 and with 16-bit weights, but not in float32 under stage 0.
    """
    stage, width = zero_stage(recipe), width_of(recipe)
    copies = MOMENTS.get(recipe.optimizer.name, 2) + (1 if stage or width == 2 else 0)
    return {
        "weights": width * parameters / (ranks if stage >= 3 else 1),
        "gradients": width * parameters / (ranks if stage >= 2 else 1),
        "optimizer": 4 * copies * parameters / (ranks if stage >= 1 else 1),
    }


def checkpoint_bytes(recipe: Recipe, parameters: int, encoder_parameters: int) -> float:
    """Return the bytes of a checkpoint of all ranks: weights, optimiser with its float32 copy, encoder as safetensors."""
    memory = memory_of_a_rank(recipe, parameters, 1)
    return memory["weights"] + memory["optimizer"] + 4 * encoder_parameters
