"""The device of the GPU tests. ``YAWARE_TEST_DEVICE=cpu`` rehearses them without a GPU and skips what needs one."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def device() -> str:
    import torch

    name = os.environ.get("YAWARE_TEST_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    # The tests compare with float64; products in TF32 would differ by 1e-3.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return name
