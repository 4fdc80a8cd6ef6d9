"""Where the GPU tests run. ``YAWARE_TEST_DEVICE=cpu`` rehearses them without a GPU (what only a GPU can do is skipped)."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def device() -> str:
    import torch

    wanted = os.environ.get("YAWARE_TEST_DEVICE", "cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    # The comparisons are with float64: products in TF32 would differ by 1e-3.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return wanted
