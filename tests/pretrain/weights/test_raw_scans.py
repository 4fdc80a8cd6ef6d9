"""``Encoder.embed`` prepares a raw scan as the training scans were, and takes a prepared one as it is."""

from __future__ import annotations

import json
from types import SimpleNamespace

import nibabel
import numpy as np
import pandas as pd
import pytest

from data_pipeline.cohort.scan import Scan
from data_pipeline.prepare import job
from data_pipeline.prepare.job import ScanTask, prepare_one, versions
from data_pipeline.prepare.prepared import PREPROCESSED, Picture, Prepared, Volume
from data_pipeline.prepare.settings import PrepareRecipe, recorded
from data_pipeline.volume.errors import BadScan
from data_pipeline.volume.grid import Grid
from data_pipeline.volume.load import read_voxels
from infra import cli
from infra.errors import UserError
from pretrain import Encoder
from pretrain.weights.scan_source import FileSource
from tests.cohorts import GRID, blob
from tests.pretrain.weights.encoders import write_scans, write_small_encoder

RECIPE = PrepareRecipe(spacing=10.0)
FIGURES = {"tiv": [1400.0, 1600.0], "correlation": [0.9, 0.95], "rotation": [0.0, 10.0]}
PREPARATION = {"recipe": recorded(RECIPE), "libraries": dict(versions()), "figures": FIGURES}


@pytest.fixture
def prepared_names(monkeypatch):
    """A preparation without registration: the scan on the recipe's grid. The names of the scans that were prepared."""
    done = []

    def prepare(task):
        """As `job._prepare`."""
        done.append(task.scan.path.name)
        try:
            voxels = read_voxels(task.scan.path, task.recipe.grid)
        except BadScan as error:
            return None, {}, error
        affine = np.array(task.recipe.grid.affine)
        figures = {"tiv": 1500.0, "correlation": 0.93, "rotation": 3.0}
        picture = Picture(voxels, voxels > 0, task.recipe.grid)
        return Prepared(PREPROCESSED, {PREPROCESSED: Volume(voxels * 0.5, affine)}, picture), figures, None

    monkeypatch.setattr(job, "_prepare", prepare)
    monkeypatch.setattr(job, "draw", lambda picture: b"picture")
    return done


@pytest.fixture
def encoder(tmp_path):
    return small_encoder(tmp_path / "encoder")


def small_encoder(folder, **changes):
    """An encoder of prepared scans, on a coarser grid than theirs, as `shards build --grid` makes it."""
    preprocessing = {"modality": "quasiraw", "preparation": PREPARATION, **changes}
    write_small_encoder(folder, Grid.vbm(12.0), **preprocessing)
    return Encoder.from_pretrained(folder)


def derivative_of(path, out, recipe=RECIPE):
    """Prepare a file as `cohort prepare` does; return the path of the prepared volume."""
    prepare_one(ScanTask(scan=Scan(path, "set", path.name.partition("_")[0][4:]), root=str(out), recipe=recipe))
    return next(out.rglob(f"{path.name.partition('_')[0]}*_{PREPROCESSED}.nii.gz"))


def test_a_raw_scan_has_the_features_of_its_prepared_volume_which_is_not_prepared_again(
    tmp_path, encoder, prepared_names
):
    raw = write_scans(tmp_path / "raw", 2)
    volumes = [derivative_of(path, tmp_path / "out") for path in raw]
    assert len(prepared_names) == 2
    expected = encoder.embed(volumes, progress=False).to_numpy()
    assert len(prepared_names) == 2
    table = encoder.embed(raw, progress=False)
    assert len(prepared_names) == 4
    assert table.index.tolist() == [str(path) for path in raw]
    np.testing.assert_allclose(table.to_numpy(), expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    as_it_is = encoder.embed(raw, progress=False, prepare=False).to_numpy()
    assert len(prepared_names) == 4
    assert np.abs(as_it_is - expected).max() > 1e-3


def test_an_encoder_whose_scans_were_not_prepared_here_reads_scans_as_they_are(tmp_path, prepared_names):
    encoder = small_encoder(tmp_path / "encoder", preparation=None)
    encoder.embed(write_scans(tmp_path / "raw", 1), progress=False)
    assert not prepared_names


@pytest.mark.parametrize("how", ["grid", "mark", "name", "array"])
def test_a_volume_without_its_json_is_not_prepared_again(tmp_path, encoder, prepared_names, how):
    (raw,) = write_scans(tmp_path / "raw", 1)
    image = nibabel.load(raw)
    path = tmp_path / ("sub-1_space-MNI_T1w.nii.gz" if how == "name" else "scan.nii.gz")
    if how == "grid":
        affine = np.array(RECIPE.grid.affine)
        nibabel.save(nibabel.Nifti1Image(read_voxels(raw, RECIPE.grid), affine), path)
    elif how == "mark":
        path.write_bytes(derivative_of(raw, tmp_path / "out").read_bytes())
        prepared_names.clear()
    elif how == "array":
        path = tmp_path / "scan.npy"
        np.save(path, np.random.default_rng(0).random((121, 145, 121), dtype=np.float32))
    else:
        nibabel.save(image, path)
    encoder.embed([path], progress=False)
    assert not prepared_names


def test_a_volume_of_another_recipe_is_refused_in_one_line(tmp_path, encoder, prepared_names):
    (raw,) = write_scans(tmp_path / "raw", 1)
    other = derivative_of(raw, tmp_path / "finer", PrepareRecipe(spacing=8.0))
    with pytest.raises(UserError, match=r"was prepared otherwise .*: spacing 8.0 instead of 10.0; give the raw scan"):
        encoder.embed([other])
    pipeline = tmp_path / "vbm.nii.gz"
    nibabel.save(nibabel.load(raw), pipeline)
    pipeline.with_name("vbm.json").write_text(json.dumps({"Preparation": {**recorded(RECIPE), "pipeline": "vbm"}}))
    with pytest.raises(UserError, match="pipeline 'vbm' instead of 'quasiraw'"):
        encoder.embed([pipeline])
    # Limits and files that change no voxel may differ.
    same = {**recorded(RECIPE), "keep_warp": False, "limits": {}}
    pipeline.with_name("vbm.json").write_text(json.dumps({"Preparation": same, "Figures": {}}))
    encoder.embed([pipeline], progress=False)


def test_a_recipe_of_another_version_is_refused_before_anything_is_prepared(tmp_path, prepared_names):
    recipe = {**recorded(RECIPE), "version": 99}
    encoder = small_encoder(tmp_path / "encoder", preparation={**PREPARATION, "recipe": recipe})
    with pytest.raises(UserError, match="prepared by version 99 of the pipelines, this yaware has version"):
        encoder.embed(write_scans(tmp_path / "raw", 1))
    unknown = {**recorded(RECIPE), "magic": 3}
    encoder = small_encoder(tmp_path / "magic", preparation={**PREPARATION, "recipe": unknown})
    with pytest.raises(UserError, match="the encoder: unknown key 'prepare.magic'"):
        encoder.embed(write_scans(tmp_path / "raw", 1))
    assert not prepared_names


def test_figures_outside_the_training_scans_are_warned_of(tmp_path, prepared_names):
    raw = write_scans(tmp_path / "raw", 2)
    narrow = {**PREPARATION, "figures": {**FIGURES, "correlation": [0.5, 0.6], "tiv": [1510.0, 1520.0]}}
    encoder = small_encoder(tmp_path / "encoder", preparation=narrow)
    words = r"the preparation of 2 of 2 scans is unlike .*raw.sub-000_T1w.nii.gz: tiv is 1500, that of .* 1510 to 1520"
    with pytest.warns(UserWarning, match=words):
        encoder.embed(raw, progress=False)
    volumes = [derivative_of(path, tmp_path / "out") for path in raw]
    with pytest.warns(UserWarning, match="2 of 2 scans is unlike"):
        encoder.embed(volumes, progress=False)


def test_other_libraries_are_named(tmp_path, prepared_names):
    libraries = {**versions(), "antspyx": "0.1.2"}
    encoder = small_encoder(tmp_path / "encoder", preparation={**PREPARATION, "libraries": libraries})
    raw = write_scans(tmp_path / "raw", 1)
    with pytest.warns(UserWarning, match=r"by other versions than the training scans: antspyx .* instead of 0.1.2"):
        encoder.embed(raw, progress=False)


def test_head_size_comes_from_the_preparation(tmp_path, prepared_names):
    encoder = small_encoder(tmp_path / "encoder", scaling="tiv")
    raw = write_scans(tmp_path / "raw", 1)
    volume = derivative_of(raw[0], tmp_path / "out")
    features = [encoder.embed([path], progress=False).to_numpy() for path in (raw[0], volume)]
    np.testing.assert_array_equal(*features)
    bare = tmp_path / "bare.nii.gz"
    bare.write_bytes(volume.read_bytes())
    with pytest.raises(UserError, match="2 values in ml are needed, found none"):
        encoder.embed([raw[0], bare])
    table = encoder.embed(pd.DataFrame({"path": [bare], "tiv": [1500.0]}), progress=False)
    np.testing.assert_array_equal(table.to_numpy(), features[0])


def test_a_given_head_size_goes_before_the_measured_one_and_nan_takes_that(tmp_path, prepared_names):
    encoder = small_encoder(tmp_path / "encoder", scaling="tiv", intensity="none")
    raw = write_scans(tmp_path / "raw", 1)
    scans = [raw[0], derivative_of(raw[0], tmp_path / "out")]

    def voxels(*tiv):
        source = FileSource([str(scan) for scan in scans], encoder.preprocessing, tiv or None)
        source._likeness = SimpleNamespace(fault=seen.append)
        for position in range(2):
            source.read(position)
        return [float(stored.max()) for stored in seen[-2:]], [source.stamp(position)[2] for position in range(2)]

    seen = []
    measured, _ = voxels()
    given, stamped = voxels(750.0, 750.0)
    np.testing.assert_allclose(given, np.multiply(2, measured), rtol=2e-3)
    assert stamped == [750.0, 750.0]
    assert voxels(float("nan"), float("nan"))[0] == measured


@pytest.mark.parametrize("scaling", ["tiv", "none"])
def test_each_scan_needs_a_head_size_if_one_is_given(tmp_path, prepared_names, scaling):
    encoder = small_encoder(tmp_path / "encoder", scaling=scaling)
    raw = write_scans(tmp_path / "raw", 3)
    for tiv in ([1500.0], [1500.0] * 4):
        with pytest.raises(UserError, match=rf"has {len(tiv)} values for 3 scans: 3 values in ml are needed"):
            encoder.embed(raw, tiv=tiv)
    assert not prepared_names


def test_a_broken_description_is_an_error_of_its_scan(tmp_path, encoder, prepared_names):
    raw = write_scans(tmp_path / "raw", 2)
    (raw[0].parent / "sub-000_T1w.json").write_text('{"Preparation": {')
    with pytest.warns(UserWarning, match=r"sub-000_T1w.json is not valid JSON"):
        table = encoder.embed(raw, on_error="skip", progress=False)
    assert table.index.tolist() == [str(raw[1])]
    with pytest.raises(UserError, match=r"sub-000_T1w.json is not valid JSON .*; remove it, or write it again"):
        encoder.embed(raw, progress=False)


def test_prepared_scans_stay_in_a_folder_and_are_found_again(tmp_path, encoder, prepared_names):
    raw, folder = write_scans(tmp_path / "raw", 1), tmp_path / "kept"
    first = encoder.embed(raw, progress=False, prepared=folder)
    moved = raw[0].rename(tmp_path / raw[0].name)
    second = encoder.embed([moved], progress=False, prepared=folder)
    assert len(prepared_names) == 1
    np.testing.assert_array_equal(first.to_numpy(), second.to_numpy())
    assert json.loads((folder / "dataset_description.json").read_text())["Preparation"] == recorded(RECIPE)
    finer = {**PREPARATION, "recipe": recorded(PrepareRecipe(spacing=8.0))}
    with pytest.raises(UserError, match=r"holds scans prepared otherwise \(spacing was 10.0, now 8.0\)"):
        small_encoder(tmp_path / "finer", preparation=finer).embed([moved], prepared=folder)


def test_the_command_leaves_out_refused_scans_and_prepares_none_if_told(tmp_path, encoder, prepared_names, capsys):
    raw = write_scans(tmp_path / "raw", 2)
    flat = tmp_path / "raw" / "sub-flat_T1w.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.zeros(GRID.shape, np.float32), np.array(GRID.affine)), flat)
    arguments = ["embed", str(encoder.folder), str(tmp_path / "raw"), "--out", str(tmp_path / "f.tsv")]
    assert cli.run(arguments) == 1
    printed = capsys.readouterr()
    assert "2 scans" in printed.out
    assert f"1 of 3 scans cannot be read:\n  {flat}: every voxel is 0" in printed.err
    assert sorted(prepared_names) == sorted(path.name for path in (*raw, flat))
    assert cli.run([*arguments, "--no-prepare"]) == 1
    assert len(prepared_names) == 3


def test_masks_and_transforms_in_a_folder_are_no_scans(tmp_path, encoder, prepared_names, capsys):
    (raw,) = write_scans(tmp_path / "raw", 1)
    volume = derivative_of(raw, tmp_path / "out")
    for name in ("desc-brain_mask", "from-MNI_to-affine_mode-points_xfm"):
        image = nibabel.Nifti1Image(blob(0, 20.0), np.array(GRID.affine))
        nibabel.save(image, volume.with_name(f"sub-000_{name}.nii.gz"))
    prepared_names.clear()
    assert cli.run(["embed", str(encoder.folder), str(tmp_path / "out")]) == 0
    assert [row.split("\t")[0] for row in capsys.readouterr().out.splitlines()[1:]] == [str(volume)]
    assert not prepared_names
