"""Features of every block, readouts and a whole evaluation on a GPU, against the same on the CPU."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch

from data_pipeline.shards.build import build_shards
from data_pipeline.storage.manifest import Manifest
from evaluation.features.candidates import candidate_blocks
from infra.tracking import runs
from pretrain import embed
from pretrain.encoders import build_encoder
from pretrain.readouts.add import add_readouts
from pretrain.weights.layers import intermediate_features
from tests.cohorts import write_cohort
from tests.gpu.cpu_side import without_gpu
from tests.pretrain.weights.encoders import write_encoders_of
from tests.runs import run
from tests.stores import store_at

pytestmark = pytest.mark.gpu

SIDES = (64, 64, 64)
SMALL = {
    "resnet18": {"width": 0.25}, "densenet121": {}, "unet": {}, "resenc-l": {}, "vit-small": {"grid": SIDES},
    "swin-unetr": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Shards of 90 participants; the encoders were pretrained on half of those who are healthy."""
    root = tmp_path_factory.mktemp("scans")
    splits = {"pretrain": 0.5, "downstream": 0.5}
    build_shards(write_cohort(root / "tiny", participants=90), root / "shards", splits=splits)
    return Manifest.load(root / "shards")


@pytest.mark.parametrize("name", SMALL)
def test_features_of_every_block_and_pooling_equal_those_from_the_cpu(device, name):
    torch.manual_seed(0)
    network = build_encoder(name, SMALL[name]).eval()
    volumes = torch.randn(1, 1, *SIDES, generator=torch.Generator().manual_seed(1))
    blocks = candidate_blocks(network, SIDES)
    assert len(blocks) > 4
    found = {}
    for where in ("cpu", device):
        network.to(where)
        for layer, pooling in blocks:
            with torch.no_grad():
                found[where, layer, pooling] = intermediate_features(network, layer, pooling)(volumes.to(where)).cpu()
    for layer, pooling in blocks:
        on_cpu, on_gpu = found["cpu", layer, pooling], found[device, layer, pooling]
        scale = float(on_cpu.abs().max())
        assert scale > 0
        torch.testing.assert_close(
            on_gpu, on_cpu, rtol=0, atol=1e-4 * scale, msg=lambda m, at=(layer, pooling): f"{at}: {m}"
        )


def test_readouts_fitted_on_the_gpu_predict_like_those_fitted_on_the_cpu(device, manifest, tmp_path):
    scans = manifest.rows(split="downstream")
    predicted = []
    for number, where in enumerate(("cpu", device)):
        encoder = tmp_path / str(number)
        write_encoders_of(manifest, encoder)
        add_readouts(encoder, manifest, columns=["age", "sex"], device=where, progress=False)
        table = embed(encoder, scans, manifest=manifest, device=where, readouts=True, progress=False)
        predicted.append(table.filter(like="predicted_"))
    on_cpu, on_gpu = predicted
    assert list(on_cpu.columns) == list(on_gpu.columns)
    assert {"predicted_age", "predicted_age_low", "predicted_age_high", "predicted_sex"} <= set(on_cpu.columns)
    np.testing.assert_allclose(on_gpu["predicted_age"], on_cpu["predicted_age"], atol=0.02)  # years
    np.testing.assert_allclose(on_gpu["predicted_sex"], on_cpu["predicted_sex"], atol=1e-3)


def test_an_evaluation_with_ray_on_the_gpu_measures_what_it_measures_on_the_cpu(device, manifest, tmp_path):
    write_encoders_of(manifest, tmp_path / "encoder")
    measured = []
    for number, where in enumerate(("cpu", device)):
        # paper: default features; finetune: Ray Tune, two trials that share the GPU.
        folder = tmp_path / str(number)
        uri = store_at(folder / "mlflow.db")
        command = [
            "evaluate", str(tmp_path / "encoder"), "--shards", manifest.url, "--tasks", "age,ad", "--folds", "2",
            "--protocols", "paper,knn,finetune", "--repeats", "1", "--halvings", "0", "--n-train", "10", "--draws", "2",
            "--tracking-uri", uri, "--experiment", "gpu",
            "--cache", str(folder / "cache"), "--storage", str(folder / "work"), "--workers", "2",
            "--finetune.epochs=2", "--finetune.trials=2",
            *(["--finetune.gpus_per_trial=0.5"] if where == "cuda" else []),
        ]  # fmt: skip
        start = without_gpu() if number == 0 else ["env", f"DS_ACCELERATOR={where}"]
        assert run([*start, sys.executable, "-m", "infra.cli", *command], folder).returncode == 0
        found = runs.runs(uri, "gpu", "evaluation")
        measured.append({row["params"]["protocol"]: row["metrics"] for row in found})
    on_cpu, on_gpu = measured
    assert on_cpu.keys() == on_gpu.keys() == {"paper", "knn", "finetune"}
    for protocol, metrics in on_cpu.items():
        assert metrics.keys() == on_gpu[protocol].keys()
        for name, value in on_gpu[protocol].items():
            assert math.isfinite(value), (protocol, name)
    for name in ("age.mae", "age.mae.low", "ad.auc", "ad.auc.n10"):
        assert on_gpu["paper"][name] == pytest.approx(on_cpu["paper"][name], rel=0.01), name
    assert on_gpu["knn"]["age.mae"] == pytest.approx(on_cpu["knn"]["age.mae"], rel=0.05)  # a neighbour may change
