"""An exponential moving average of the encoder's weights, for evaluation (Polyak & Juditsky 1992).

Each rank averages what it holds of the weights: all of them under ZeRO 0 to 2, its part under ZeRO 3, so a step costs no
communication. The average is what a checkpoint exports as its encoder (``encoder/model.safetensors``, float32, whole), and
from there a run goes on, on any number of ranks. Buffers (the running statistics of batch normalisation) are averages
already and are taken as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from infra import distributed
from infra.errors import UserError
from pretrain.config import Encoder
from pretrain.encoders import TRAINING_ONLY, build_encoder
from pretrain.engine.engine import encoder_state


class Average:
    """The moving average of ``engine``'s encoder in float32; ``decay`` a step, less in the first steps."""

    def __init__(self, engine: Any, decay: float) -> None:
        self._engine, self._decay = engine, decay
        self._pieces = {name: _piece(p).detach().float().clone() for name, p in self._parameters()}

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self._engine.module.encoder.named_parameters())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after ``step`` steps. The first weigh more: after one step the average is its weights."""
        decay = min(self._decay, (step - 1) / (step + 9))
        for name, parameter in self._parameters():
            self._pieces[name].lerp_(_piece(parameter).detach().float(), 1.0 - decay)

    def state(self) -> dict[str, torch.Tensor]:
        """The averaged encoder as ``engine.encoder_state`` gives the encoder: whole, float32, on the CPU. Collective."""
        state = encoder_state(self._engine)
        for name, parameter in self._parameters():
            state[name] = _whole(self._pieces[name], parameter).cpu().contiguous()
        return state

    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint's encoder: its average, or its plain weights where the run had no average until now."""
        path = checkpoint / "encoder" / "model.safetensors"
        saved = load_file(path)
        for name, parameter in self._parameters():
            if name not in saved:
                raise UserError(f"{path} lacks {name}; it is of another encoder")
            self._pieces[name].copy_(_part(saved[name], parameter, self._pieces[name]))

    def network(self, settings: Encoder, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The averaged encoder as a network of its own, in evaluation mode, for the monitor. Collective."""
        options = {name: value for name, value in settings.options.items() if name not in TRAINING_ONLY}
        with torch.random.fork_rng(devices=[]):
            network = build_encoder(settings.name, options)
        network.load_state_dict(self.state())
        return network.to(device, dtype).eval()


def _piece(parameter: nn.Parameter) -> torch.Tensor:
    """What this rank holds of a parameter: under ZeRO 3 a flat part, as long on every rank, the last one padded."""
    piece: torch.Tensor = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter
    return piece


def _whole(piece: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    if not hasattr(parameter, "ds_tensor"):
        return piece.clone()
    shared = piece.cuda() if dist.get_backend() == "nccl" else piece  # off-loaded weights are on the CPU
    parts = [torch.empty_like(shared) for _ in range(distributed.world_size())]
    dist.all_gather(parts, shared)
    whole: torch.Tensor = torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)  # type: ignore[attr-defined]
    return whole


def _part(whole: torch.Tensor, parameter: nn.Parameter, piece: torch.Tensor) -> torch.Tensor:
    if not hasattr(parameter, "ds_tensor"):
        return whole
    size, rank = piece.numel(), distributed.rank()
    part = torch.zeros(size, dtype=whole.dtype)
    mine = whole.flatten()[rank * size : (rank + 1) * size]
    part[: len(mine)] = mine
    return part
