"""How features take the least time and memory on a CPU: the layout of a network in memory, and the scans of a batch."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

from pretrain.encoders.layers import PooledEncoder

# Most voxels of a batch on a CPU if its scans are not given: four scans at 121 x 145 x 121. More take as much time for each
# scan, and more memory.
BATCH_VOXELS = 10_000_000

# The kernels of networks in channels-last, as they are stored, and how many blocks use each network.
_in_use: WeakKeyDictionary[nn.Module, tuple[int, list[tuple[nn.Parameter, torch.Tensor]]]] = WeakKeyDictionary()
_lock = threading.Lock()


def scans_of_a_batch(device: torch.device, voxels: int, most: int) -> int:
    """Return how many scans of ``voxels`` voxels to encode at a time: ``most``, and on a CPU fewer if they are large."""
    return min(most, max(1, BATCH_VOXELS // voxels)) if device.type == "cpu" else most


@contextmanager
def fast_layout(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Let a network on ``device`` compute in channels-last within the block, if that is faster there.

    The layout of its kernel is that of a convolution's output; so the kernels are replaced by copies. Those that are stored
    stay as they are: they may be parts of another tensor, and a file of weights cannot hold another layout. Several blocks may
    use a network at a time; the last one puts its kernels back.
    """
    if not is_faster_in_channels_last(network, device):
        yield
        return
    with _lock:
        users, kernels = _in_use.get(network, (0, []))
        if not users:
            kernels = [(weight, weight.data) for weight in network.parameters() if weight.ndim == 5]
            # With one channel both layouts have the same order in memory; .contiguous() would change nothing. All copies are
            # made before the first is used: if memory runs out, the network is as it was.
            copies = [torch.empty_like(k, memory_format=torch.channels_last_3d).copy_(k) for _, k in kernels]
            for (weight, _), copy in zip(kernels, copies, strict=True):
                weight.data = copy
        _in_use[network] = users + 1, kernels
    try:
        yield
    finally:
        with _lock:
            users, kernels = _in_use.pop(network)
            if users > 1:
                _in_use[network] = users - 1, kernels
            else:
                for weight, stored in kernels:
                    weight.data = stored


def is_faster_in_channels_last(network: nn.Module, device: torch.device) -> bool:
    """Return whether a network takes less time in channels-last on a device, or as much.

    Measured at 121 x 145 x 121 on an x86_64 CPU with batch or group norm: DenseNet121, ResNet18, ResNet50 and U-Net take 2 to
    27 % less, ResEnc-L, the transformers and SwinUNETR as long (2 % less or more). With instance norm, which loses the layout
    on a CPU, networks take 3 to 18 % more. Networks of others may rely on torch's layout, as ``x.view(n, -1)`` does.
    """
    if device.type != "cpu" or not isinstance(network, PooledEncoder):
        return False
    is_x86 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")  # elsewhere it was not measured
    return is_x86 and not any(isinstance(module, nn.InstanceNorm3d) for module in network.modules())
