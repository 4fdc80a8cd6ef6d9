"""The memory of a forward and backward pass, counted in a run of the recipe's own network and loss on fake tensors.

Fake tensors (torch's FakeTensorMode) have shapes and storages but no data, so that a run of any network and any batch takes
seconds and no memory. A dispatch mode counts the bytes of every storage from its creation to its end; hooks on saved tensors
count those that autograd keeps for the backward pass. Nothing is looked up in a table of layers.

B = scans of this rank, G = scans of all ranks, P = size of the projection, W = ranks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from data_pipeline.loading.augment import load_augmentation
from data_pipeline.loading.view_details import ViewDetails
from pretrain.config import Recipe
from pretrain.forecast.gpu_autocast import GpuAutocast
from pretrain.forecast.operations import network_without
from pretrain.losses.gather import Columns
from pretrain.losses.options import find_loss, takes
from pretrain.losses.proxies import build_kernel, proxy_columns
from pretrain.losses.supervised import SUPERVISED, target_scale
from pretrain.model import ContrastiveModel
from pretrain.run.objective import loss_options

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
AUTOCAST = {"autocast": torch.bfloat16, "autocast-fp16": torch.float16}


@dataclass(frozen=True)
class PassMemory:
    """Bytes of a pass beside weights, optimiser and the volumes.

    Attributes:
        saved: alive at the end of the forward pass: what autograd keeps for the backward pass, and the outputs.
        hooked: of these, what autograd's hooks saw: less where activations are computed again instead of kept.
        peak: the most that is alive at a time in the forward and backward pass; parameter gradients count if they are kept.
    """

    saved: int
    hooked: int
    peak: int


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that operations create inside the block and that are still alive.

    Attributes:
        live: bytes alive now.
        peak: largest value of ``live``.
    """

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen: dict[int, weakref.finalize[..., Any] | None] = {
            tensor.untyped_storage()._cdata: None for tensor in known
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count the storages of its results."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen[key] = weakref.finalize(storage, self._forget, key, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int) -> None:
        del self._seen[key]
        self.live -= size


class _RepeatedColumns:
    """A gather whose other ranks hold copies of this rank's scans: the shapes of `pretrain.losses.gather.AllGather`."""

    rank = 0

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size

    def __call__(self, z_2BD: Tensor, metadata: Sequence[Tensor]) -> Columns:
        repeated = (tensor.repeat(self.world_size, *[1] * (tensor.ndim - 1)) for tensor in metadata)
        return Columns(z_2BD.repeat(1, self.world_size, 1), tuple(repeated), start=0, world_size=self.world_size)

    def sum(self, value: Tensor) -> Tensor:
        """Return the tensor, detached."""
        return value.detach().clone()


def fake_network(recipe: Recipe, mode: FakeTensorMode) -> ContrastiveModel:
    """Return the recipe's network on fake tensors, in its precision and with its recomputation, but not compiled."""
    model = network_without(recipe, {"compile"}).to(DTYPES.get(recipe.train.precision, torch.float32))
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(mode.from_tensor(parameter.detach()), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer)
    return model


def network_pass(
    recipe: Recipe, grid: Sequence[int], scans: int, *, keep_gradients: bool, on_gpu: bool = True,
    mode: FakeTensorMode | None = None,
) -> PassMemory:  # fmt: skip
    """Count the memory of the recipe's network in a forward and backward pass of ``scans`` scans on a grid (D, H, W).

    Args:
        recipe: the recipe.
        grid: voxels of a scan.
        scans: scans of a rank that are embedded at a time; each has two views.
        keep_gradients: whether the gradients of the parameters stay until the end of the backward pass.
        on_gpu: whether autocast chooses types as on a GPU, else as on a CPU.
        mode: the mode of the fake tensors.
    """
    mode = mode or FakeTensorMode()
    model = fake_network(recipe, mode)
    details = {name: mode.from_tensor(torch.from_numpy(array)) for name, array in _details(recipe, grid, scans).items()}
    precision = recipe.train.precision
    with mode:
        views = torch.empty(2, scans, 1, *grid, dtype=DTYPES.get(precision, torch.float32))
    known = [*model.parameters(), *model.buffers(), views, *details.values()]
    hooks = [] if keep_gradients else [_forget_gradient(p) for p in model.parameters()]
    low = AUTOCAST.get(precision)
    types = GpuAutocast() if on_gpu else nullcontext()
    # The backward pass is inside too, since it may compute activations again.
    with mode, types, LiveBytes(known) as counted, _saved_bytes(known) as hooked:
        with torch.autocast("cpu", low) if low else nullcontext():
            outputs = [output for output in model(views, **details) if output is not None]
        saved, kept = counted.live, hooked()
        total = sum((output.float().sum() for output in outputs), start=torch.zeros(()))
        del outputs
        total.backward()
    for hook in hooks:
        hook.remove()
    return PassMemory(saved, kept, counted.peak)


def _forget_gradient(parameter: Tensor) -> Any:
    """Let a parameter's gradient be freed once it is made, as a reduction does that keeps only this rank's part."""

    def drop(tensor: Tensor) -> None:
        tensor.grad = None

    return parameter.register_post_accumulate_grad_hook(drop)  # type: ignore[no-untyped-call]


@contextmanager
def _saved_bytes(known: Sequence[Tensor]) -> Iterator[Callable[[], int]]:
    """Yield a function that returns the bytes of all storages that autograd has saved in the block, without the known ones."""
    own, sizes = {tensor.untyped_storage()._cdata for tensor in known}, dict[int, int]()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(sizes.values())


def _details(recipe: Recipe, grid: Sequence[int], scans: int) -> dict[str, Any]:
    """Return the arrays that further terms of the loss need beside the views."""
    if recipe.loss.reconstruction is None and recipe.loss.dense is None:
        return {}
    d, h, w = grid
    masked = 0.0 if recipe.loss.reconstruction is None else recipe.loss.reconstruction.masked
    details = ViewDetails(load_augmentation(recipe.augmentation), (d, h, w), recipe.run.seed, masked)
    return details(np.arange(scans), np.zeros(scans, dtype=np.int64))


def loss_pass(recipe: Recipe, scans: int, ranks: int) -> PassMemory:
    """Count the memory of the recipe's loss of the embeddings, (2, B, P) against (2, G, P), forward and backward pass."""
    columns = proxy_columns(recipe.loss.proxies)
    # A rule of a bandwidth needs values; no size depends on them.
    values = torch.randn(64, len(columns), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kernel = build_kernel(
        {name: proxy.options() for name, proxy in recipe.loss.proxies.items()},
        dict(zip(columns, values.T, strict=True)),
    )
    options = loss_options(recipe.loss)
    if recipe.loss.name in SUPERVISED:
        options |= target_scale(values.float())
    loss, mode = find_loss(recipe.loss.name), FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        views = torch.empty(2, scans, recipe.projector.out, requires_grad=True)
        proxies, subjects = torch.empty(scans, len(columns)), torch.empty(scans, dtype=torch.int64)
    supplied = {
        "kernel": kernel, "gather": _RepeatedColumns(ranks) if ranks > 1 else None,
        "subjects": subjects if recipe.loss.mask_subjects else None,
    }  # fmt: skip
    taken = {name: value for name, value in supplied.items() if takes(loss, name)}
    known = [views, proxies, subjects]
    with mode, LiveBytes(known) as counted, _saved_bytes(known) as hooked:
        value = loss(views, proxies, **{**taken, **options})
        saved, kept = counted.live, hooked()
        value.backward()  # type: ignore[no-untyped-call]
    return PassMemory(saved, kept, counted.peak)
