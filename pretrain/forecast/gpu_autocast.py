"""Autocast as a GPU does it, for fake tensors, which live on the CPU.

torch has one table of operations for the CPU and one for GPUs (ATen/autocast_mode.h). On a CPU pooling and padding compute in
float32, so that everything after DenseNet121's first pooling would count twice. On a GPU they keep the type of their input, and
normalisations, powers and sums return float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

KEEP_TYPE = {
    *(f"{kind}_pool{d}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for d in (1, 2, 3)),
    *(f"max_pool{d}d_with_indices" for d in (1, 2, 3)), "pad", "max_unpool2d", "max_unpool3d",
}  # fmt: skip
FLOAT32 = {
    "layer_norm", "group_norm", "rms_norm", "interpolate", "softplus", "softmax", "log_softmax", "logsumexp", "exp", "expm1",
    "log", "log1p", "pow", "__pow__", "sum", "cumsum", "prod", "norm", "cosine_similarity", "cdist",
}  # fmt: skip


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


class GpuAutocast(TorchFunctionMode):
    """Within this block, autocast of the CPU gives tensors of the types that autocast of a GPU gives."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function on inputs of the GPU's type."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if not torch.is_autocast_enabled("cpu") or name not in KEEP_TYPE | FLOAT32:
            return func(*args, **kwargs)
        if name in FLOAT32:
            args, kwargs = tree_map(_float32, (args, kwargs))
        with torch.autocast("cpu", enabled=False):
            return func(*args, **kwargs)
