"""An exponential moving average of the encoder's weights, for evaluation (Polyak & Juditsky 1992).

Each rank averages the weights that it holds: all of them under ZeRO 0 to 2, its part of each under ZeRO 3, so a step needs
no communication. A checkpoint exports the average as its encoder (``encoder/model.safetensors``, float32, whole). A resumed
run reads it back from there, on any number of ranks. Buffers (the running statistics of batch normalisation) are averages
already and are copied from the encoder.
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
from infra.files import regular_file
from pretrain.config import EncoderSection
from pretrain.encoders import TRAINING_ONLY, build_encoder
from pretrain.engine.engine import encoder_state
from pretrain.engine.partitions import deepspeed_internal, is_partitioned


class Average:
    """The moving average, in float32, of the encoder that ``engine`` trains.

    Args:
        engine: the DeepSpeed engine; its module has the ``encoder``.
        decay: weight of the old average in each step, below 1; smaller in the first steps (see `update`).
    """

    def __init__(self, engine: Any, decay: float) -> None:
        self._engine, self._decay = engine, decay
        self._partitioned = is_partitioned(engine)
        self._averages = {name: self._local(p).detach().float().clone() for name, p in self._parameters()}

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self._engine.module.encoder.named_parameters())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Include the weights after ``step`` steps.

        The decay is at most (step - 1) / (step + 9), so that the first weights do not dominate: after one step the average
        equals the weights.
        """
        decay = min(self._decay, (step - 1) / (step + 9))
        for name, parameter in self._parameters():
            self._averages[name].lerp_(self._local(parameter).detach().float(), 1.0 - decay)

    def state(self) -> dict[str, torch.Tensor]:
        """Return the averaged encoder in the form of ``engine.encoder_state``: whole, float32, on the CPU. Collective."""
        state = encoder_state(self._engine)
        for name, parameter in self._parameters():
            state[name] = self._gather(self._averages[name], parameter).cpu().contiguous()
        return state

    def load(self, checkpoint: Path) -> None:
        """Start from a checkpoint's encoder: its average, or its plain weights if that run kept no average.

        Raises:
            UserError: if the checkpoint belongs to another encoder.
        """
        path = checkpoint / "encoder" / "model.safetensors"
        saved = load_file(regular_file(path))
        for name, average in self._averages.items():
            if name not in saved:
                raise UserError(f"{path} lacks {name}; it belongs to another encoder")
            average.copy_(_part_of_rank(saved[name], average.numel()) if self._partitioned else saved[name])

    def network(self, settings: EncoderSection, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Return the averaged encoder as a separate network in evaluation mode, for the monitor. Collective."""
        options = {name: value for name, value in settings.options.items() if name not in TRAINING_ONLY}
        with torch.random.fork_rng(devices=[]):
            network = build_encoder(settings.name, options)
        network.load_state_dict(self.state())
        return network.to(device, dtype).eval()

    def _local(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return what this rank holds of a parameter.

        Under ZeRO 3 that is a flat part, of the same length on every rank; the last ranks' parts may be padded.
        """
        local: torch.Tensor = deepspeed_internal(parameter, "ds_tensor") if self._partitioned else parameter
        return local

    def _gather(self, average: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        """Return the whole average of a parameter from the parts of all ranks. Collective under ZeRO 3."""
        if not self._partitioned:
            return average.clone()
        shared = average.cuda() if dist.get_backend() == "nccl" else average  # off-loaded weights are on the CPU
        parts = [torch.empty_like(shared) for _ in range(distributed.world_size())]
        dist.all_gather(parts, shared)
        size, shape = deepspeed_internal(parameter, "ds_numel"), deepspeed_internal(parameter, "ds_shape")
        return torch.cat(parts)[:size].view(shape)


def _part_of_rank(whole: torch.Tensor, size: int) -> torch.Tensor:
    """Return this rank's part, ``size`` entries, of a flattened parameter; entries beyond its end are 0."""
    part = torch.zeros(size, dtype=whole.dtype)
    first = distributed.rank() * size
    values = whole.flatten()[first : first + size]
    part[: len(values)] = values
    return part
