"""A NIfTI file reaches an exported encoder as the scans of its shards did: same grid, crop and intensities."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
import torch

from data_pipeline.volume.grid import Grid
from data_pipeline.volume.intensity import zscore
from data_pipeline.volume.load import load_volume
from data_pipeline.volume.preparation import scale_factor
from evaluation.protocols.features import check_preprocessing
from infra.errors import UserError
from pretrain import Encoder
from pretrain.encoders import build_encoder
from pretrain.weights.write import write_encoder
from tests.cohorts import GRID, blob

OPTIONS = {"width": 0.25, "norm": "group"}
CONFIG = {
    "encoder": {"name": "resnet18", "options": OPTIONS}, "feature_size": 128, "step": 5, "run_id": None,
    "run_name": "y-aware", "method": "y-aware", "manifest_digest": "0" * 64, "split": ["pretrain"],
    "version": "0.1.0", "simulated": True, "experiment": "test",
}  # fmt: skip


def export(folder, grid, **prepared):
    torch.manual_seed(0)
    network = build_encoder("resnet18", OPTIONS).eval()
    preprocessing = {
        "grid": grid.to_dict(),
        "normalisation": "zscore",
        "modality": "t1w",
        "scaling": "none",
        **prepared,
    }
    write_encoder(folder, network.state_dict(), CONFIG, preprocessing)
    return network


@pytest.mark.parametrize(
    "prepared", [{}, {"crop": "world", "intensity": "robust"}, {"crop": "brain", "intensity": "robust"}]
)
def test_embed_prepares_a_turned_file_as_the_encoders_scans_were(tmp_path, prepared):
    grid = Grid.centred((14, 16, 12), 6.0)
    network = export(tmp_path / "encoder", grid, **prepared)
    image = nibabel.Nifti1Image(blob(3, 50.0) * 900, np.array(GRID.affine))
    nibabel.save(image, tmp_path / "plain.nii.gz")
    nibabel.save(image.as_reoriented([[2, -1], [0, 1], [1, -1]]), tmp_path / "turned.nii.gz")
    (features,) = Encoder.from_pretrained(tmp_path / "encoder").embed([tmp_path / "turned.nii.gz"])
    volume = load_volume(tmp_path / "plain.nii.gz", grid, **prepared)
    with torch.no_grad():
        expected = network(torch.from_numpy(zscore(volume))[None, None])[0].numpy()
    np.testing.assert_allclose(features, expected, atol=1e-6)
    other = load_volume(tmp_path / "plain.nii.gz", grid, crop="world" if prepared.get("crop") == "brain" else "brain")
    assert not np.array_equal(other, volume)


@pytest.mark.parametrize("scaling", ["none", "tiv"])
def test_the_model_cards_own_lines_give_features_and_nothing_in_the_folder_is_pickled(tmp_path, scaling):
    folder = tmp_path / "encoder"
    network = export(folder, Grid.centred((14, 16, 12), 6.0), scaling=scaling)
    assert {p.name for p in folder.iterdir()} == {
        "model.safetensors", "config.json", "preprocessing.json", "README.md", "checksums.json",
    }  # fmt: skip
    nibabel.save(nibabel.Nifti1Image(blob(3, 50.0), np.array(GRID.affine)), tmp_path / "scan.nii.gz")
    lines = [line.strip() for line in (folder / "README.md").read_text().splitlines() if line.startswith("    ")]
    assert len(lines) == 3
    code = (
        "\n".join(lines).replace("path/to/this/folder", str(folder)).replace("scan.nii.gz", f"{tmp_path}/scan.nii.gz")
    )
    found: dict[str, np.ndarray] = {}
    exec(code, found)
    assert found["features"].shape == (1, 128)
    factor = scale_factor(scaling, {"tiv": 1450.0})
    volume = load_volume(tmp_path / "scan.nii.gz", Grid.centred((14, 16, 12), 6.0), factor=factor)
    with torch.no_grad():
        expected = network(torch.from_numpy(zscore(volume))[None, None]).numpy()
    np.testing.assert_allclose(found["features"], expected, atol=1e-5)


def test_shards_prepared_otherwise_are_refused(tmp_path, manifest):
    network_grid = Grid.from_dict(manifest.grid)
    for name, prepared in (("as", {"crop": "world", "intensity": "none"}), ("old", {}), ("brain", {"crop": "brain"})):
        export(tmp_path / name, network_grid, **prepared, modality="vbm")
    for name in ("as", "old"):
        check_preprocessing(Encoder.from_pretrained(tmp_path / name), manifest, name)
    with pytest.raises(UserError, match=r"brain: the encoder was trained on crop 'brain', .* has 'world'"):
        check_preprocessing(Encoder.from_pretrained(tmp_path / "brain"), manifest, "brain")


@pytest.fixture(scope="module")
def manifest(shards):
    from data_pipeline.storage.manifest import Manifest

    return Manifest.load(shards)
