"""``Encoder.embed`` on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pretrain import Encoder
from tests.pretrain.weights.encoders import write_scans, write_small_encoder

pytestmark = pytest.mark.gpu


def test_features_from_the_gpu_equal_those_from_the_cpu_and_do_not_depend_on_the_batch(tmp_path, device, monkeypatch):
    write_small_encoder(tmp_path / "encoder")
    encoder, paths = Encoder.from_pretrained(tmp_path / "encoder"), write_scans(tmp_path / "scans", 9)
    on_cpu = encoder.embed(paths, device="cpu", progress=False).to_numpy()
    monkeypatch.setattr(
        torch.backends.cudnn, "allow_tf32", True
    )  # torch's default; embed computes in full float32 all the same
    one_by_one = encoder.embed(paths, batch_size=1, device=device, progress=False).to_numpy()
    in_batches = encoder.embed(paths, batch_size=4, device=device, progress=False).to_numpy()
    scale = np.abs(on_cpu).max()
    np.testing.assert_allclose(one_by_one, on_cpu, rtol=0, atol=1e-5 * scale)
    np.testing.assert_allclose(in_batches, one_by_one, rtol=0, atol=1e-6 * scale)
    assert torch.backends.cudnn.allow_tf32
    assert next(encoder.parameters()).device.type == "cpu"
