"""Features of a training file equal those of its scan in the shards, whatever the layout, the format and the rules."""

from __future__ import annotations

import io
import re
import tarfile

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch

from data_pipeline.cohort.read import read_cohort
from data_pipeline.quality.rules import load_quality
from data_pipeline.shards.append import append_shards
from data_pipeline.shards.build import build_shards
from data_pipeline.shards.index import index_shards
from data_pipeline.storage.manifest import Manifest
from data_pipeline.volume.grid import VBM_SHAPE, Grid
from data_pipeline.volume.resample import reorient
from infra import cli
from infra.errors import UserError
from pretrain import Encoder
from pretrain.encoders import build_encoder
from pretrain.weights.feature_file import find_scans
from pretrain.weights.write import preprocessing_of, write_encoder
from tests.cohorts import GRID, blob
from tests.pretrain.weights.encoders import CONFIG, OPTIONS, write_small_encoder

COARSE = Grid.vbm(12.0)


def encoder_of(folder, manifest) -> Encoder:
    """An encoder with random weights that was trained on the scans of a manifest."""
    torch.manual_seed(0)
    state = build_encoder("resnet18", OPTIONS).state_dict()
    write_encoder(folder, state, CONFIG, preprocessing_of(manifest))
    return Encoder.from_pretrained(folder)


def check_equal(folder, manifest, scans, **options) -> None:
    """Embed the files of scans and their copies in the shards, and compare."""
    encoder = encoder_of(folder, manifest)
    stored = encoder.embed(manifest, progress=False)
    listed = {scan.key: (str(scan.path), scan.extra.get("tiv")) for scan in scans}
    assert set(stored.index) <= set(listed)
    files = pd.DataFrame([listed[key] for key in stored.index], columns=["path", "tiv"])
    features = encoder.embed(files, progress=False, **options)
    np.testing.assert_allclose(features.to_numpy(), stored.to_numpy(), rtol=0, atol=2e-6 * np.abs(stored).max().max())
    people = stored.to_numpy()
    assert np.abs(people[0] - people[1]).max() > 1e-3  # scans differ


def people(root, count, tiv=True):
    root.mkdir(parents=True, exist_ok=True)
    rows = [f"sub-{n:02d}\t{20 + n}\tF\ts{n % 2}\t{1300 + 40 * n if tiv else 'n/a'}" for n in range(count)]
    (root / "participants.tsv").write_text("participant_id\tage\tsex\tsite\ttiv\n" + "\n".join(rows) + "\n")


def t1_heads(root, count=4, blank=False):
    """A BIDS folder of T1 images: raw units, each in other axes; one file has NaN outside the head, one may be blank."""
    people(root, count)
    for number in range(count):
        voxels = 700 * blob(number, 30.0) + 5
        if number == 1:
            voxels[:, :2] = np.nan
        if blank and number == 2:
            voxels[:] = 7.0
        image = nibabel.Nifti1Image(voxels, np.array(GRID.affine))
        image = image.as_reoriented([[2, -1], [0, 1], [1, -1]]) if number % 2 else image
        folder = root / f"sub-{number:02d}" / "anat"
        folder.mkdir(parents=True)
        nibabel.save(image, folder / f"sub-{number:02d}_T1w.nii.gz")
    return root


@pytest.mark.parametrize(
    ("options", "rules"),
    [
        ({"scaling": "tiv"}, []),
        ({"grid": COARSE, "crop": "brain"}, ["--quality.nonfinite=zero"]),
        ({"intensity": "none", "codec": "npy"}, ["--quality.nonfinite=zero", "--quality.grid=refuse"]),
        ({"grid": Grid.centred((9, 11, 9), 7.0)}, ["--quality.nonfinite=zero"]),
        ({"intensity": "none", "blank": True}, ["--quality.nonfinite=zero", "--quality.constant=keep"]),
    ],
)
def test_every_rule_and_option_of_a_build(tmp_path, options, rules):
    root = t1_heads(tmp_path / "bids", blank=options.pop("blank", False))
    quality = load_quality(None, rules)
    manifest = build_shards(root, tmp_path / "shards", modality="t1w", quality=quality, **options)
    scans, _ = read_cohort(root, modality="t1w")
    assert len(manifest.scans) == len(scans) - (0 if rules else 1)  # the NaN scan is refused without the rule
    check_equal(tmp_path / "encoder", manifest, scans)


def test_the_cat12_layout_with_tiv_from_its_reports(tmp_path):
    root = tmp_path / "study"
    people(root, 4, tiv=False)
    for number in range(4):
        for folder in ("mri", "report"):
            (root / f"sub-{number:02d}" / folder).mkdir(parents=True)
        image = nibabel.Nifti1Image(blob(number, 40.0), np.array(GRID.affine))
        nibabel.save(image, root / f"sub-{number:02d}/mri/mwp1sub-{number:02d}.nii")
        report = f"<S><subjectmeasures><vol_TIV>{1200 + 90 * number}</vol_TIV></subjectmeasures></S>"
        (root / f"sub-{number:02d}/report/cat_sub-{number:02d}.xml").write_text(report)
    manifest = build_shards(root, tmp_path / "shards", scaling="tiv")
    check_equal(tmp_path / "encoder", manifest, read_cohort(root)[0])


def arrays(root, orientation, count=2, first=0):
    """A table of VBM arrays stored in some orientation, and the declaration of that orientation."""
    root.mkdir()
    rows = []
    for number in range(first, first + count):
        brain = (100 * blob(number, 40.0, VBM_SHAPE)).astype(np.uint8)
        flips = [slice(None, None, -1 if a != b else 1) for a, b in zip(orientation or "RAS", "RAS", strict=True)]
        np.save(root / f"{number}.npy", brain[tuple(flips)][None])
        rows.append(f"{number}.npy,p{number},{30 + number}")
    (root / "table.csv").write_text("path,participant_id,age\n" + "\n".join(rows) + "\n")
    (root / "columns.yaml").write_text(f"orientation: {orientation}\n" if orientation else "missing: ['.']\n")
    return root


@pytest.mark.parametrize("orientation", ["", "LPI", "LAS"])
def test_arrays_are_turned_as_the_training_arrays_were(tmp_path, orientation):
    root = arrays(tmp_path / "npy", orientation)
    reading = {"columns": root / "columns.yaml"}
    manifest = build_shards(root / "table.csv", tmp_path / "shards", grid=COARSE, **reading)
    check_equal(tmp_path / "encoder", manifest, read_cohort(root / "table.csv", **reading)[0])


def test_arrays_of_two_orientations_need_it_to_be_given(tmp_path):
    first, second = arrays(tmp_path / "a", "LAS"), arrays(tmp_path / "b", "RPS", first=2)
    build_shards(first / "table.csv", tmp_path / "shards", grid=COARSE, dataset="a", columns=first / "columns.yaml")
    later = {"dataset": "b", "columns": second / "columns.yaml"}
    manifest = append_shards(second / "table.csv", tmp_path / "shards", **later)
    encoder = encoder_of(tmp_path / "encoder", manifest)
    with pytest.raises(UserError, match=r"different orientations \(a: LAS, b: RPS\); give that of these files"):
        encoder.embed([second / "2.npy"], progress=False)
    stored = encoder.embed(manifest, progress=False)
    for folder, numbers, orientation in ((first, (0, 1), "LAS"), (second, (2, 3), "rps")):
        found = encoder.embed([folder / f"{n}.npy" for n in numbers], orientation=orientation, progress=False)
        keys = [f"{folder.name}_sub-p{n}_ses-1" for n in numbers]
        np.testing.assert_allclose(found.to_numpy(), stored.loc[keys].to_numpy(), atol=1e-5)
    with pytest.raises(UserError, match="orientation='up' is not an orientation"):
        encoder.embed([first / "0.npy"], orientation="up")
    out = tmp_path / "features.tsv"
    command = ["embed", str(tmp_path / "encoder"), str(second), "--orientation", "RPS", "--out", str(out)]
    assert cli.run([word for word in command if word]) == 0
    assert len(pd.read_csv(out, sep="\t")) == 2  # a folder's .npy files are found


def test_a_table_of_mixed_formats(tmp_path):
    affine = np.array(GRID.affine)
    rows = []
    for number, ending in enumerate(("nii", "mgz", "img", "npy")):
        voxels = blob(number, 30.0, VBM_SHAPE) if ending == "npy" else blob(number, 30.0)
        path = tmp_path / f"{number}.{ending}"
        if ending == "npy":
            np.save(path, np.asfortranarray(voxels.astype(np.float64)))
        else:
            kind = {"mgz": nibabel.MGHImage, "img": nibabel.Nifti1Pair}.get(ending, nibabel.Nifti1Image)
            nibabel.save(kind(voxels, affine), path)
        rows.append(f"{path.name}\tp{number}\t{20 + number}")
    (tmp_path / "table.tsv").write_text("path\tparticipant_id\tage\n" + "\n".join(rows) + "\n")
    manifest = build_shards(tmp_path / "table.tsv", tmp_path / "shards", grid=COARSE)
    assert len(manifest.scans) == 4
    check_equal(tmp_path / "encoder", manifest, read_cohort(tmp_path / "table.tsv")[0])


def test_arrays_of_an_index_are_turned_and_lie_on_its_grid(tmp_path):
    orientation = "IRA"
    brains = [blob(number, 40.0) for number in range(2)]
    turn = nibabel.orientations.ornt_transform(*(nibabel.orientations.axcodes2ornt(o) for o in ("RAS", orientation)))
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars/0.tar", "w") as tar:
        for number, brain in enumerate(brains):
            stored = nibabel.orientations.apply_orientation(brain, turn)
            assert np.array_equal(reorient(stored, orientation), brain)
            np.save(tmp_path / f"{number}.npy", stored)
            content = (tmp_path / f"{number}.npy").read_bytes()
            member = tarfile.TarInfo(f"d_sub-{number}_ses-1.npy")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    (tmp_path / "tars/participants.tsv").write_text("participant_id\tage\nsub-0\t30\nsub-1\t40\n")
    manifest = index_shards(str(tmp_path / "tars"), tmp_path / "index", spacing=6.0, orientation=orientation)
    encoder = encoder_of(tmp_path / "encoder", manifest)
    stored = encoder.embed(manifest, progress=False)
    files = encoder.embed([tmp_path / "0.npy", tmp_path / "1.npy"], progress=False)
    np.testing.assert_allclose(files.to_numpy(), stored.to_numpy(), atol=1e-5)


@pytest.fixture(scope="module")
def trained_on_maps(tmp_path_factory):
    """A simulated cohort of maps and T1 images, and an encoder that was trained on the maps."""
    from data_pipeline.simulation.cohort import simulate_cohort

    root = tmp_path_factory.mktemp("likeness")
    cohort = simulate_cohort(root / "cohort", participants=24, modality="both", spacing=8.0, workers=1)
    manifest = build_shards(cohort, root / "shards", modality="vbm")
    encoder_of(root / "encoder", manifest)
    return root


def files_of(root, modality):
    return [scan.path for scan in read_cohort(root / "cohort", modality=modality)[0]]


def test_heads_in_an_encoder_of_grey_matter_maps_are_named(trained_on_maps, recwarn, capsys, tmp_path):
    root = trained_on_maps
    encoder = Encoder.from_pretrained(root / "encoder")
    maps, heads = files_of(root, "vbm"), files_of(root, "t1w")
    encoder.embed(maps, progress=False)
    assert not [warning for warning in recwarn if "do not look like" in str(warning.message)]
    source = f"{len(heads)} of {len(heads)} scans do not look like the encoder's training scans .modality vbm.*{heads[0].name}"
    with pytest.warns(UserWarning, match=source):
        encoder.embed(heads, progress=False)
    command = ["embed", str(root / "encoder"), *map(str, [*maps[:3], heads[0]]), "--out", str(tmp_path / "f.tsv")]
    assert cli.run(command) == 0
    printed = capsys.readouterr().err
    assert "embed: warning: 1 of 4 scans do not look like the encoder's training scans" in printed
    assert str(heads[0]) in printed


def test_maps_in_another_unit_or_upside_down_are_named(trained_on_maps, tmp_path):
    encoder, path = Encoder.from_pretrained(trained_on_maps / "encoder"), files_of(trained_on_maps, "vbm")[0]
    image = nibabel.load(path)
    voxels = np.asarray(image.dataobj)
    for name, changed, fault in (
        ("unit", voxels * 255, "its mean voxel is"),
        ("turned", voxels[:, :, ::-1], "correlation"),
    ):
        nibabel.save(nibabel.Nifti1Image(changed, image.affine), tmp_path / f"{name}.nii.gz")
        with pytest.warns(UserWarning, match=f"{name}.nii.gz: .*{fault}"):
            encoder.embed([tmp_path / f"{name}.nii.gz"], progress=False)


def test_an_encoder_without_the_measure_still_names_heads(tmp_path):
    write_small_encoder(tmp_path / "encoder", modality="vbm")
    nibabel.save(nibabel.Nifti1Image(blob(1, 40.0) * 800, np.array(GRID.affine)), tmp_path / "head.nii.gz")
    with pytest.warns(UserWarning, match="its brightest voxel is .*; grey-matter maps have 0 to about 2"):
        Encoder.from_pretrained(tmp_path / "encoder").embed([tmp_path / "head.nii.gz"], progress=False)


@pytest.mark.parametrize("bad", ["empty", "cut", "text", "four volumes"])
def test_49_files_with_one_that_cannot_be_read(tmp_path, capsys, bad):
    write_small_encoder(tmp_path / "encoder")
    paths = []
    for number in range(49):
        paths.append(tmp_path / "scans" / f"{number:02d}.nii")
        paths[0].parent.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(blob(number, 40.0), np.array(GRID.affine)), paths[-1])
    content = paths[30].read_bytes()
    series = nibabel.Nifti1Image(np.ones((4, 4, 4, 4), np.float32), np.eye(4)).to_bytes()
    paths[30].write_bytes({"empty": b"", "cut": content[:5000], "text": b"x" * 999, "four volumes": series}[bad])
    out = tmp_path / "features.tsv"
    assert cli.run(["embed", str(tmp_path / "encoder"), str(tmp_path / "scans"), "--out", str(out)]) == 1
    assert pd.read_csv(out, sep="\t")["path"].tolist() == [str(path) for path in paths if path != paths[30]]
    error = capsys.readouterr().err
    assert "embed: 1 of 49 scans cannot be read:" in error
    assert f"  {paths[30]}: " in error


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a.nii,1400\n,1500\n", r"table.csv line 3: path is empty"),
        (
            "a.nii,1400\nb.nii,big\n",
            r"table.csv line 3: tiv='big' is not a number, but 1 of .* are; correct it$",
        ),
        ('a.nii,1400\nb.nii,"1,4"\n', r"line 3: tiv='1,4' is not a number.*write decimal points$"),
        ("a.nii,1400,9\n", r"line 2 has 3 fields, the header has 2"),
        ("", r"table.csv has a header and no rows"),
    ],
)
def test_a_wrong_cell_of_a_table_is_named(tmp_path, capsys, rows, message):
    write_small_encoder(tmp_path / "encoder", scaling="tiv")
    (tmp_path / "table.csv").write_text("path,tiv\n" + rows)
    assert cli.run(["embed", str(tmp_path / "encoder"), str(tmp_path / "table.csv")]) == 2
    assert re.search(message, capsys.readouterr().err.strip())


@pytest.mark.parametrize("head", ["path,tiv", "path;tiv", " Path ,TIV", "\ufeffpath\ttiv"])
def test_a_table_for_embed_is_read_as_a_build_reads_it(tmp_path, head):
    mark = next(mark for mark in ",;\t" if mark in head)
    (tmp_path / "t.csv").write_text("\n".join([head, f"a.nii{mark}1400000", f"b.nii{mark}NA"]))
    (tmp_path / "t.json").write_text('{"tiv": {"units": "mm3"}}')
    table = find_scans([tmp_path / "t.csv"])
    assert table["path"].tolist() == [str(tmp_path / "a.nii"), str(tmp_path / "b.nii")]
    np.testing.assert_array_equal(table["tiv"], [1400.0, np.nan])
    assert list(find_scans([tmp_path / "t.csv"], tiv=False)) == ["path"]


def test_a_manifest_of_an_earlier_version_has_no_orientations(shards, tmp_path):
    manifest = Manifest.load(shards)
    manifest.settings.pop("array_orientations")
    assert preprocessing_of(manifest)["arrays"] == {"orientations": {}, "on_grid": False}
