"""Read DeepSpeed's checkpoint files without running code that somebody else put into them.

The files are pickles, and a pickle can name any function for the reader to call. Here only tensors, plain values and the four
types of `allowed_types` are made of them. DeepSpeed itself would load everything.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from infra.files import regular_file
from infra.internals import internal
from pretrain.engine.importing import import_deepspeed

TYPES = (
    ("runtime.fp16.loss_scaler", "LossScaler"),
    ("runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("runtime.zero.config", "ZeroStageEnum"),
    ("utils.tensor_fragment", "fragment_address"),
)
# torch's own switches: with the first, every torch.load behaves as with weights_only=True, also where DeepSpeed says False.
FORCE, FORBID = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def allowed_types() -> list[Any]:
    """Return the types beside tensors and plain values that DeepSpeed 0.19 stores: two loss scalers, a stage, a range."""
    import_deepspeed()
    return [internal("deepspeed", import_module(f"deepspeed.{module}"), name) for module, name in TYPES]


@contextmanager
def no_code() -> Iterator[None]:
    """Let every ``torch.load`` within the block make nothing but tensors, plain values and `allowed_types`."""
    before = {name: os.environ.pop(name, None) for name in (FORCE, FORBID)}
    os.environ[FORCE] = "1"
    try:
        with torch.serialization.safe_globals(allowed_types()):
            yield
    finally:
        del os.environ[FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def read_file(path: Path, device: str = "cpu") -> dict[str, Any]:
    """Return the content of one of DeepSpeed's files; on device ``meta`` the tensors have no content and are not read.

    Raises pickle.UnpicklingError if the file needs code, and other errors of torch if it is damaged.
    """
    with no_code():
        return _read(path, device)


def _read(path: Path, device: str) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(regular_file(path), map_location=device, weights_only=True)
    return content


def find_code(folder: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """Return which file of a checkpoint cannot be read without running code, and what it holds; None if all can.

    Of several ranks, each looks at every ``ranks``-th file, starting with number ``rank``. Tensors are not read.
    """
    with no_code():
        for path in sorted(folder.rglob("*.pt"))[rank::ranks]:
            try:
                _read(path, "meta")
            except Exception as error:  # torch raises many kinds of errors for files that it did not write
                found = re.search(r"GLOBAL (\S+)", str(error))
                if found:
                    return f"{path} holds a {found[1]}, which only code in the file could create"
                return f"{path} is not a file of tensors ({' '.join(str(error).split())[:120]})"
    return None
