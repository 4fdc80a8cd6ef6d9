"""Folders of DICOM files: T1-weighted 3D series are found and converted, the others are listed with the reason."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from data_pipeline.prepare.driver import is_dicom_folder, prepare_cohort, read_raw_cohort
from data_pipeline.prepare.steps.dicom import age_of, find_series
from infra import cli
from infra.errors import UserError
from tests.data_pipeline.prepare.phantoms import SMALL_OPTIONS, small_brain, small_recipe, write_small_cohort

FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])
MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"


def write_series(folder: Path, image: nibabel.Nifti1Image, *, number: int = 1, study: str = "1.2.3", **tags) -> None:
    """Write an image as a series of one DICOM file for each axial slice."""
    voxels, affine = np.asarray(image.dataobj), FLIP @ image.affine
    folder.mkdir(parents=True, exist_ok=True)
    series = generate_uid(entropy_srcs=[str(folder), str(number)])
    edges = np.linalg.norm(affine[:3, :3], axis=0)
    own = {
        "Modality": "MR", "SeriesDescription": "t1_mprage_sag", "PatientID": "anna", "PatientSex": "F", "PatientAge": "031Y",
        "StudyDate": "20200101", "MRAcquisitionType": "3D", "EchoTime": 2.5, "RepetitionTime": 2300.0,
        "SliceThickness": float(edges[2]), "ImageType": ["ORIGINAL", "PRIMARY"], "ScanningSequence": "GR",
    }  # fmt: skip
    for index in range(voxels.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = MR_IMAGE, f"{series}.{index + 1}"
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        path = folder / f"{number:03d}-{index:04d}"
        file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
        file.SOPClassUID, file.SOPInstanceUID = MR_IMAGE, meta.MediaStorageSOPInstanceUID
        file.SeriesInstanceUID, file.StudyInstanceUID, file.FrameOfReferenceUID = series, study, f"{study}.1"
        file.SeriesNumber, file.InstanceNumber, file.AcquisitionNumber = number, index + 1, 1
        file.Manufacturer, file.MagneticFieldStrength, file.StudyTime, file.SeriesTime = (
            "SIEMENS",
            3.0,
            "120000",
            "120100",
        )
        for name, value in {**own, **tags}.items():
            setattr(file, name, value)
        # Columns run along the first axis, rows along the second.
        file.ImageOrientationPatient = [*(affine[:3, 0] / edges[0]), *(affine[:3, 1] / edges[1])]
        file.ImagePositionPatient = list(affine[:3, 3] + index * affine[:3, 2])
        file.PixelSpacing, file.SpacingBetweenSlices = [float(edges[1]), float(edges[0])], float(edges[2])
        file.Rows, file.Columns = voxels.shape[1], voxels.shape[0]
        file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
        file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 16, 15, 0
        file.PixelData = np.ascontiguousarray(voxels[:, :, index].T.astype(np.uint16)).tobytes()
        file.save_as(path, enforce_file_format=True)


def tall(image: nibabel.Nifti1Image) -> nibabel.Nifti1Image:
    """The image with half the distance of slices, so that it has as many as a 3D scan."""
    affine = image.affine.copy()
    affine[:3, 2] /= 2
    return nibabel.Nifti1Image(np.repeat(np.asarray(image.dataobj), 2, axis=2).clip(0), affine)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two people: the first has two studies, the second two scans in one; and seven series of other kinds."""
    root = tmp_path_factory.mktemp("dicom") / "scanner"
    brain, small = tall(small_brain(0)), nibabel.Nifti1Image(np.ones((8, 8, 3), np.int16), np.diag([5, 5, 8, 1.0]))
    slab = nibabel.Nifti1Image(np.ones((8, 8, 64), np.int16), np.diag([5, 5, 3, 1.0]))
    write_series(root / "a", brain, number=2)
    write_series(root / "b", brain, number=2, study="1.2.4", StudyDate="20210101", PatientAge="032Y")
    write_series(root / "c", tall(small_brain(2)), number=1, study="1.2.5", PatientID="ben 2", PatientSex="M")
    write_series(root / "c", tall(small_brain(2)), number=2, study="1.2.5", PatientID="ben 2", PatientSex="M")
    write_series(root / "a", small, number=1, SeriesDescription="t1_3d")
    write_series(root / "a", slab, number=3, SeriesDescription="t2_space", EchoTime=400.0)
    write_series(root / "a", slab, number=4, ImageType=["DERIVED", "SECONDARY", "MPR"])
    write_series(root / "a", slab, number=5, MRAcquisitionType="2D")
    write_series(root / "a", slab, number=6, EchoTime=90.0)
    write_series(root / "a", slab, number=7, Modality="CT")
    write_series(root / "a", slab, number=8, SeriesDescription="ax thick", SliceThickness=5.0)
    (root / "notes.txt").write_text("no image")
    return root


def test_the_reason_of_every_series_that_is_left_out_is_said(folder):
    reasons = {(one.files[0].parent.name, int(one.header["SeriesNumber"])): one.reason for one in find_series(folder)}
    assert {key for key, reason in reasons.items() if not reason} == {("a", 2), ("b", 2), ("c", 1), ("c", 2)}
    words = {1: "3 slices", 3: "another kind", 4: "derived", 5: "2D", 6: "echo time of 90", 7: "CT", 8: "slices of 5"}
    for number, word in words.items():
        assert word in reasons["a", number]


def test_the_converted_scan_has_the_voxels_and_the_place_of_the_slices(folder, tmp_path):
    cohort = read_raw_cohort(folder, tmp_path / "out")
    assert [scan.key for scan in cohort.scans] == [
        "scanner_sub-anna_ses-1", "scanner_sub-anna_ses-2", "scanner_sub-ben-2_ses-1_run-1", "scanner_sub-ben-2_ses-1_run-2",
    ]  # fmt: skip
    assert [(scan.age, scan.sex) for scan in cohort.scans] == [(31.0, "F"), (32.0, "F"), (31.0, "M"), (31.0, "M")]
    image, expected = nibabel.as_closest_canonical(nibabel.load(cohort.scans[0].path)), tall(small_brain(0))
    np.testing.assert_allclose(image.affine, expected.affine, atol=1e-3)
    np.testing.assert_array_equal(np.asarray(image.dataobj), np.asarray(expected.dataobj).astype(np.uint16))
    listing = pd.read_csv(tmp_path / "out" / "dicom.tsv", sep="\t", keep_default_na=False)
    assert len(listing) == 11
    assert list(listing["taken"]).count("no") == 7
    assert (listing["reason"][listing["taken"] != "no"] == "n/a").all()


@pytest.mark.jobs
def test_a_folder_of_dicom_is_prepared_and_resumed(folder, tmp_path, capsys):
    command = ["cohort", "prepare", str(folder), str(tmp_path / "out"), *SMALL_OPTIONS, "--workers", "1"]
    assert cli.run([*command, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "11 DICOM series, 4 of them T1-weighted 3D scans" in printed
    assert "left out: derived images" in printed
    assert not (tmp_path / "out").exists()
    assert cli.run(command) == 0
    table = pd.read_csv(tmp_path / "out" / "participants.tsv", sep="\t", keep_default_na=False)
    assert list(table["participant_id"]) == ["sub-anna", "sub-anna", "sub-ben-2", "sub-ben-2"]
    assert cli.run(command) == 0
    assert "4 of all by an earlier run" in capsys.readouterr().out


@pytest.mark.jobs
def test_pseudonyms_leave_no_id_of_a_header(folder, tmp_path):
    (tmp_path / "key").write_bytes(b"y" * 32)
    prepare_cohort(folder, tmp_path / "out", small_recipe(), key_file=tmp_path / "key", workers=1)
    for path in (tmp_path / "out").rglob("*"):
        assert "anna" not in path.name
        assert not path.is_file() or b"anna" not in path.read_bytes()


def test_other_folders_are_no_dicom(tmp_path, folder):
    assert is_dicom_folder(folder)
    assert not is_dicom_folder(folder, "bids")
    assert not is_dicom_folder(write_small_cohort(tmp_path / "bids", participants=1))
    (tmp_path / "empty").mkdir()
    assert not is_dicom_folder(tmp_path / "empty")


def test_a_folder_without_a_t1_weighted_series_is_refused(tmp_path):
    write_series(tmp_path / "raw", nibabel.Nifti1Image(np.ones((8, 8, 3), np.int16), np.diag([5, 5, 8, 1.0])))
    with pytest.raises(UserError, match="has no T1-weighted 3D scan among 1 DICOM series; the reasons are in"):
        read_raw_cohort(tmp_path / "raw", tmp_path / "out")


@pytest.mark.parametrize(("text", "age"), [("045Y", 45.0), ("018M", 1.5), ("", None), ("45", None), ("030W", 0.575)])
def test_ages_of_headers_become_years(text, age):
    assert age_of({"PatientAge": text}) == age
