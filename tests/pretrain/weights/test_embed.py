"""Encoder.embed: scans are prepared as the training scans were, and features depend on nothing else."""

from __future__ import annotations

import contextlib
import inspect
import io
import threading

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch

from data_pipeline.cohort.read import read_cohort
from data_pipeline.storage.manifest import Manifest
from data_pipeline.volume.grid import Grid
from data_pipeline.volume.intensity import zscore
from data_pipeline.volume.load import load_volume
from data_pipeline.volume.preparation import scale_factor
from infra.errors import UserError
from pretrain import Encoder, embed
from pretrain.encoders.cpu_speed import fast_layout
from pretrain.weights.layers import intermediate_features
from pretrain.weights.scan_source import check_preprocessing
from tests.cohorts import GRID, blob, write_cohort
from tests.pretrain.weights.encoders import write_scans, write_small_encoder

COARSE = Grid.centred((14, 16, 12), 6.0)


@pytest.fixture(scope="module")
def manifest(shards):
    return Manifest.load(shards)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An exported encoder for files, and eleven files."""
    root = tmp_path_factory.mktemp("embed")
    write_small_encoder(root / "encoder")
    return root / "encoder", write_scans(root / "scans", 11)


def features_of(network, volumes):
    batch = torch.from_numpy(np.stack([zscore(volume)[None] for volume in volumes]))
    with torch.no_grad(), fast_layout(network, torch.device("cpu")):
        return network(batch).numpy()


@pytest.mark.parametrize(
    "prepared", [{}, {"crop": "world", "intensity": "robust"}, {"crop": "brain", "intensity": "robust"}]
)
def test_a_file_stored_in_another_orientation_is_prepared_as_the_training_scans_were(tmp_path, prepared):
    network = write_small_encoder(tmp_path / "encoder", COARSE, **prepared)
    image = nibabel.Nifti1Image(blob(3, 50.0) * 900, np.array(GRID.affine))
    nibabel.save(image, tmp_path / "plain.nii.gz")
    nibabel.save(image.as_reoriented([[2, -1], [0, 1], [1, -1]]), tmp_path / "turned.nii.gz")
    features = embed(tmp_path / "encoder", [tmp_path / "turned.nii.gz"]).to_numpy()
    volume = load_volume(tmp_path / "plain.nii.gz", COARSE, **prepared)
    np.testing.assert_allclose(features, features_of(network, [volume]), atol=1e-6)
    other_crop = "world" if prepared.get("crop") == "brain" else "brain"
    assert not np.array_equal(load_volume(tmp_path / "plain.nii.gz", COARSE, crop=other_crop), volume)


@pytest.mark.parametrize("scaling", ["none", "tiv"])
def test_the_model_cards_example_gives_features_and_no_file_is_a_pickle(tmp_path, scaling):
    folder = tmp_path / "encoder"
    network = write_small_encoder(folder, COARSE, scaling=scaling)
    assert {p.name for p in folder.iterdir()} == {
        "model.safetensors", "config.json", "preprocessing.json", "README.md", "checksums.json",
    }  # fmt: skip
    nibabel.save(nibabel.Nifti1Image(blob(3, 50.0), np.array(GRID.affine)), tmp_path / "scan.nii.gz")
    lines = [line.strip() for line in (folder / "README.md").read_text().splitlines() if line.startswith("    ")]
    assert len(lines) == 3
    code = (
        "\n".join(lines).replace("path/to/this/folder", str(folder)).replace("scan.nii.gz", f"{tmp_path}/scan.nii.gz")
    )
    variables: dict[str, pd.DataFrame] = {}
    exec(code, variables)
    assert variables["features"].shape == (1, 128)
    factor = scale_factor(scaling, {"tiv": 1450.0})
    volume = load_volume(tmp_path / "scan.nii.gz", COARSE, factor=factor)
    np.testing.assert_allclose(variables["features"], features_of(network, [volume]), atol=1e-5)


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (1, 2), (4, 0), (4, 3), (64, 5)])
def test_features_do_not_depend_on_batches_or_workers_and_keep_the_order(folder, batch_size, workers):
    encoder, paths = Encoder.from_pretrained(folder[0]), folder[1]
    one_by_one = np.concatenate([encoder.embed([path], workers=0, progress=False).to_numpy() for path in paths])
    assert np.ptp(one_by_one, axis=0).max() > 0.1  # the scans differ
    rounding = 1e-6 * np.abs(one_by_one).max()  # of float32: the order of the sums depends on the batch
    for order in (paths, paths[::-1]):
        table = encoder.embed(order, batch_size=batch_size, workers=workers, progress=False)
        assert table.index.tolist() == [str(path) for path in order]
        assert (table.index.name, table.columns[0], table.columns[-1]) == ("path", "f0", "f127")
        expected = one_by_one if order is paths else one_by_one[::-1]
        np.testing.assert_allclose(table.to_numpy(), expected, rtol=0, atol=rounding)
    assert table.to_numpy().dtype == np.float32
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("scans")]


def test_features_of_a_training_file_equal_those_from_its_shard(tmp_path, manifest, shards):
    write_small_encoder(tmp_path / "encoder", manifest.grid, modality="vbm")
    encoder = Encoder.from_pretrained(tmp_path / "encoder")
    from_shards = encoder.embed(manifest, progress=False)
    assert from_shards.index.tolist() == manifest.scans["key"].tolist()
    assert from_shards.index.name == "key"
    scans, _ = read_cohort(write_cohort(tmp_path / "tiny", participants=36, sessions=2))  # the cohort of the shards
    paths = pd.Series({scan.key: scan.path for scan in scans})
    keys = manifest.scans["key"].iloc[[3, 40, 8]]
    from_files = encoder.embed(paths.loc[keys].tolist(), progress=False)
    np.testing.assert_allclose(from_files.to_numpy(), from_shards.loc[keys].to_numpy(), atol=1e-6)
    rows = manifest.rows(split="pretrain")
    table = manifest.scans.iloc[rows]
    for scans, source in ((rows, manifest), (table, manifest), (table, shards)):
        some = encoder.embed(scans, manifest=source, progress=False)
        np.testing.assert_allclose(some.to_numpy(), from_shards.iloc[rows].to_numpy(), atol=1e-6)


def test_a_table_of_paths_brings_its_tiv(tmp_path):
    network = write_small_encoder(tmp_path / "encoder", scaling="tiv")
    paths, tiv = write_scans(tmp_path, 3), [1200.0, 1500.0, 1800.0]
    volumes = [load_volume(p, GRID, factor=scale_factor("tiv", {"tiv": t})) for p, t in zip(paths, tiv, strict=True)]
    encoder = Encoder.from_pretrained(tmp_path / "encoder")
    table = encoder.embed(pd.DataFrame({"path": paths, "tiv": tiv, "age": 40}), progress=False)
    np.testing.assert_allclose(table.to_numpy(), features_of(network, volumes), atol=1e-6)
    np.testing.assert_array_equal(table, encoder.embed(paths, tiv=tiv, progress=False))
    with pytest.raises(UserError, match=r"3 values in ml are needed, found none; give tiv="):
        encoder.embed(paths)
    with pytest.raises(UserError, match=r"sub-000_T1w.nii.gz: tiv=20.0 is not a volume"):
        encoder.embed(paths, tiv=[20.0, *tiv[1:]], progress=False)


def test_a_tiv_that_would_not_be_used_is_refused(folder, manifest):
    encoder, paths = Encoder.from_pretrained(folder[0]), folder[1][:2]
    with pytest.raises(
        UserError, match=r"^tiv \(--tiv\) would not be used: the encoder's scans have scaling none; leave it out$"
    ):
        encoder.embed(paths, tiv=[1200.0, 1500.0])
    table = pd.DataFrame({"path": paths, "tiv": [1200.0, 1500.0]})  # a table may have more columns than are needed
    np.testing.assert_array_equal(encoder.embed(table, progress=False), encoder.embed(paths, progress=False))
    with pytest.raises(UserError, match=r"^tiv \(--tiv\) is for files: scans of shards were scaled by the build"):
        encoder.embed(manifest, tiv=[1200.0])


def test_features_of_a_block_are_pooled_over_its_voxels(folder):
    encoder, paths = Encoder.from_pretrained(folder[0]), folder[1][:3]
    volumes = torch.from_numpy(np.stack([zscore(load_volume(path, GRID))[None] for path in paths]))
    with torch.no_grad(), fast_layout(encoder.network, torch.device("cpu")):
        expected = intermediate_features(encoder.network, "layer2", ["max", "std"])(volumes).numpy()
    table = encoder.embed(paths, layer="layer2", pooling=("max", "std"), progress=False)
    np.testing.assert_allclose(table.to_numpy(), expected, atol=1e-6)
    assert encoder.embed(paths, layer="layer2", progress=False).shape == (3, expected.shape[1] // 2)
    with pytest.raises(UserError, match="layer='layer9' is not a block"):
        encoder.embed(paths, layer="layer9")


def test_an_unreadable_scan_raises_or_is_left_out_with_a_warning(folder, tmp_path):
    encoder, (first, last) = Encoder.from_pretrained(folder[0]), folder[1][:2]
    (tmp_path / "broken.nii.gz").write_bytes(b"no gzip")
    scans = [first, tmp_path / "broken.nii.gz", last]
    with pytest.raises(UserError, match=r"broken.nii.gz: unreadable"):
        encoder.train().embed(scans, batch_size=1, progress=False)
    assert encoder.training
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("scans")]
    with pytest.warns(UserWarning, match=r"1 scans cannot be read and are left out: .*broken.nii.gz: unreadable"):
        table = encoder.embed(scans, on_error="skip", progress=False)
    assert table.index.tolist() == [str(first), str(last)]


def test_embedding_leaves_the_encoder_and_torchs_settings_as_they_were(folder):
    encoder = Encoder.from_pretrained(folder[0]).train()
    before = torch.backends.cudnn.allow_tf32
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        embed(encoder, folder[1][:2])
    assert encoder.training
    assert torch.is_grad_enabled()
    assert torch.backends.cudnn.allow_tf32 == before
    assert errors.getvalue().startswith("embedding: 2/2 scans")


@pytest.mark.parametrize(
    ("scans", "options", "message"),
    [
        ([], {}, "there are no scans to embed"),
        ("scan.nii.gz", {}, "is one path; give a list of paths"),
        ([3, 4], {}, "scans has 3, which is not a path; row numbers and keys of shards need manifest="),
        (pd.DataFrame({"file": ["a"]}), {}, "has no column 'path'; its columns: file"),
        (["a.nii"], {"device": "tpu"}, "device='tpu' cannot be used here"),
        (["a.nii"], {"batch_size": 0}, "batch_size=0 is too small; give 1 or more"),
        (["a.nii"], {"workers": -1}, "workers=-1 is too small; give 0 or more"),
        (["a.nii"], {"pooling": "median"}, "pooling='median' is not known"),
    ],
)
def test_wrong_arguments_are_named(folder, scans, options, message):
    with pytest.raises(UserError, match=message):
        embed(folder[0], scans, **options)


def test_rows_that_a_manifest_lacks_are_named(tmp_path, manifest):
    write_small_encoder(tmp_path / "encoder", manifest.grid, modality="vbm")
    with pytest.raises(UserError, match="row numbers from 0 to 71"):
        embed(tmp_path / "encoder", [0, 72], manifest=manifest)
    with pytest.raises(UserError, match="1 of 1 scans are not in .*, such as nobody"):
        embed(tmp_path / "encoder", pd.DataFrame({"key": ["nobody"]}), manifest=manifest)


def test_shards_prepared_in_another_way_are_refused(tmp_path, manifest):
    for name, prepared in (("same", {"crop": "world", "intensity": "none"}), ("old", {}), ("brain", {"crop": "brain"})):
        write_small_encoder(tmp_path / name, manifest.grid, **prepared, modality="vbm")
    for name in ("same", "old"):
        check_preprocessing(Encoder.from_pretrained(tmp_path / name).preprocessing, manifest, name)
    with pytest.raises(UserError, match=r"brain: the encoder was trained on crop 'brain', .* has 'world'"):
        check_preprocessing(Encoder.from_pretrained(tmp_path / "brain").preprocessing, manifest, "brain")


def test_nan_voxels_are_zeros_if_they_were_in_the_training_scans(tmp_path):
    image = nibabel.Nifti1Image(np.where(blob(3, 50.0) < 0.3, np.nan, blob(3, 50.0)), np.array(GRID.affine))
    nibabel.save(image, tmp_path / "nan.nii.gz")
    network = write_small_encoder(tmp_path / "zero", nonfinite="zero")
    write_small_encoder(tmp_path / "refuse")
    with pytest.raises(UserError, match="voxels are NaN or infinite"):
        embed(tmp_path / "refuse", [tmp_path / "nan.nii.gz"])
    zeroed = np.nan_to_num(np.asarray(image.dataobj)).astype(np.float16)
    features = embed(tmp_path / "zero", [tmp_path / "nan.nii.gz"]).to_numpy()
    np.testing.assert_allclose(features, features_of(network, [zeroed]), atol=1e-5)


def test_the_function_takes_the_options_of_the_method():
    options = [
        [(p.name, p.default) for p in inspect.signature(each).parameters.values() if p.kind is p.KEYWORD_ONLY]
        for each in (embed, Encoder.embed)
    ]
    assert options[0] == options[1]
