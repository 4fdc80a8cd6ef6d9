"""Folders of DICOM files: T1-weighted 3D series are found and converted, the others are listed with the reason."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from data_pipeline.prepare.driver import is_dicom_folder, prepare_cohort, read_raw_cohort
from data_pipeline.prepare.steps.dicom import age_of, find_series
from data_pipeline.prepare.steps.dicom_cohort import place_series
from infra import cli
from infra.errors import UserError
from tests.data_pipeline.prepare.phantoms import SMALL_OPTIONS, small_brain, small_recipe, write_small_cohort

FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])
MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"


def write_series(folder: Path, image: nibabel.Nifti1Image, *, number: int = 1, study: str = "1.2.3", **tags) -> None:
    """Write an image as a series of one DICOM file for each axial slice."""
    voxels, affine = np.asarray(image.dataobj), FLIP @ image.affine
    folder.mkdir(parents=True, exist_ok=True)
    series = generate_uid(entropy_srcs=[str(folder), str(number)])[:58].rstrip(".")  # room for the number of a file
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
            if value is not None:
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


def reasons_of(folder: Path, headers: list[dict]) -> list[str]:
    """Write a series of one file for each header; return why each is left out, or empty."""
    for number, tags in enumerate(headers):
        one = nibabel.Nifti1Image(np.ones((2, 2, 1), np.int16), np.eye(4))
        write_series(folder, one, number=number, **{"NumberOfFrames": 64, "ProtocolName": "", **tags})
    return [series.reason for series in find_series(folder)]


T1_SERIES = [
    "t1_mpr_ns_sag_pat2_iso", "T1_MPRAGE_iPAT2", "IR-FSPGR fat2", "t1_mprage_sag_p2_iso_1.0", "ADNI_MPRAGE", "MP-RAGE",
    "MPRAGE", "t1_mpr_sag_set2", "mpr-1", "t1_mp2rage_sag_p3_iso_UNI_Images", "t1_fl3d_sag_we", "t1_space_sag_p2_iso",
    "T1w_MEMPRAGE RMS", "Sag 3D FSPGR BRAVO", "AX FSPGR 3D", "SAG IR-SPGR", "Ax T1 BRAVO Straight", "Sag T1 Cube",
    "sT1W_3D_TFE", "WIP 3DT1 SENSE", "T1W_3D_FFE", "SAG3DT1", "3D_TFE", "3DTFE SENSE", "t1w_mfc_3dflash_v1k",
    "T1 epilepsy", "SWISS_T1_mprage", "T1 MPRAGE pre contrast", "HeadMRI_T1", "T1 without contrast", "MPRAGE_noGd",
    "T1 post op", "t1_mprage_B1corrected", "3D T1 posterior fossa",
]  # fmt: skip
OTHER_SERIES = [
    "t2_space_sag_p2_iso", "T2w", "T2_TSE", "T2W_TSE", "t2star", "T2*_GRE", "T2FLAIR", "3DT2", "SagT2 Cube",
    "sT2W_3D_TSE", "eT2W_TSE", "pdw_3d", "PD_TSE", "PDFS", "sPDW_TSE", "pdw_mfc_3dflash_v1i", "mtflash3d_v1",
    "mtw_mfc_3dflash", "MT_off", "B1map", "tfl_b1map", "B1_DREAM_TFE", "TB1AFI", "b0 map", "gre_field_mapping",
    "fmap_magnitude", "QSM_mag_e1", "SWI_Images", "swi3d", "3D SWAN", "localizer", "3-pl loc", "3PLLOC", "AAHScout",
    "AAHScout_MPR_sag", "CoilSurvey", "Survey_SHC", "SENSE RefScan", "ASSET calibration", "tof_fl3d_tra", "3DTOF",
    "3D PC", "MRA_COW", "Angio", "DTI_64dir", "dwi2", "cmrr_mbep2d_bold", "rfMRI_REST1", "dMRI_dir98", "Diffusion",
    "3D pCASL", "Perfusion", "FLAIR_TFE", "3D-FLAIR", "b-TFE", "FIESTA-C", "t1_map", "T1rho", "t1_mp2rage_INV1",
    "t1_mp2rage_sag_p3_iso_T1_Images",
]  # fmt: skip


def test_names_of_series_say_which_are_t1_weighted(tmp_path):
    """Only the names differ: every header has the tags of a T1-weighted scan."""
    names = [*T1_SERIES, *OTHER_SERIES]
    reasons = reasons_of(tmp_path, [{"SeriesDescription": name, "InversionTime": 900.0} for name in names])
    assert [name for name, reason in zip(names, reasons, strict=True) if not reason] == T1_SERIES
    assert {reason.split(": ")[0] for reason in reasons if reason} == {"its name is of another kind of image"}


def test_the_description_precedes_the_protocol_of_the_whole_examination(tmp_path):
    names = [
        ("SAG T1 BRAVO", "BRAIN DTI FLAIR"),
        ("Mag", "gre_field_mapping"),
        ("anat", "t1_mprage"),
        ("T2w", "t1_mprage"),
    ]
    reasons = reasons_of(tmp_path, [{"SeriesDescription": one, "ProtocolName": other} for one, other in names])
    assert [bool(reason) for reason in reasons] == [False, True, False, True]
    assert reasons[1].endswith(": gre_field_mapping")


@pytest.mark.parametrize("inverted", [{"ScanningSequence": ["GR", "IR"]}, {"InversionTime": 450.0}])
def test_a_plain_name_needs_tags_of_a_3d_gradient_echo_after_an_inversion(tmp_path, inverted):
    changes: list[tuple[dict, str]] = [
        ({}, ""),
        ({"MRAcquisitionType": None}, "acquisition type 3D"),
        ({"MRAcquisitionType": ""}, "acquisition type 3D"),
        ({"EchoTime": None}, "an echo time"),
        ({"ScanningSequence": ["SE", "IR"]}, "scanning sequence GR"),
        ({"ScanningSequence": ["GR"], "InversionTime": None}, "an inversion time of 300 to 1500 ms"),
        ({"InversionTime": 2700.0}, "an inversion time of 300 to 1500 ms"),
        ({"ScanningSequence": ["GR"], "InversionTime": 0.0}, "an inversion time of 300 to 1500 ms"),
    ]
    reasons = reasons_of(tmp_path, [{"SeriesDescription": "SAG 3D", **inverted, **change} for change, _ in changes])
    start = "neither name nor tags say T1-weighted: SAG 3D; the header lacks "
    assert reasons == [lacking and start + lacking for _, lacking in changes]


def test_short_echoes_of_other_images_are_not_enough(tmp_path):
    names = ["mag_e1", "gre_3d", "DREAM", "ax 3D", ""]
    reasons = reasons_of(tmp_path, [{"SeriesDescription": name, "EchoTime": 3.0} for name in names])
    assert all(reason.startswith("neither name nor tags say T1-weighted") for reason in reasons)
    assert "T1-weighted: no name; the header lacks an inversion time" in reasons[-1]


def test_a_name_of_t1_needs_no_other_tag(tmp_path):
    tags = dict.fromkeys(["MRAcquisitionType", "EchoTime", "ScanningSequence", "RepetitionTime"])
    assert reasons_of(tmp_path, [{"SeriesDescription": "t1_mprage", **tags}]) == [""]


def test_scans_after_a_contrast_agent_are_left_out(tmp_path):
    item = Dataset()
    item.CodeMeaning = "Gadobutrol"
    agents = ["Magnevist", "10 ml Gd", "", "NONE", "No contrast agent", "n/a"]
    names = [
        "T1 MPRAGE POST",
        "Ax T1 +C",
        "t1_mprage_km",
        "T1 post-contrast",
        "T1c",
        "3D T1 GAD",
        "C+ MPRAGE",
        "T1 pre/post",
    ]
    headers = [{"ContrastBolusAgent": agent} for agent in agents] + [{"SeriesDescription": name} for name in names]
    reasons = reasons_of(tmp_path, [*headers, {"ContrastBolusAgentSequence": [item]}])
    assert reasons[:6] == ["contrast agent: Magnevist", "contrast agent: 10 ml Gd", "", "", "", ""]
    assert reasons[6:] == [*(f"contrast agent: in the name {name}" for name in names), "contrast agent: Gadobutrol"]


def test_two_patients_whose_ids_become_one_participant_are_refused(tmp_path):
    one = nibabel.Nifti1Image(np.ones((2, 2, 1), np.int16), np.eye(4))
    for number, (patient, name) in enumerate([("ben 2", "t1"), ("ben-2", "t1"), ("ben+2", "t2")]):
        write_series(
            tmp_path,
            one,
            number=number,
            study=f"1.{number + 1}",
            NumberOfFrames=64,
            PatientID=patient,
            SeriesDescription=name,
        )
    series = find_series(tmp_path)
    with pytest.raises(
        UserError, match=r"'ben 2' and 'ben-2' both become sub-ben-2, .*; change the PatientID .* KEYFILE$"
    ):
        place_series(series, tmp_path, "study")
    assert len({place.participant for place in place_series(series, tmp_path, "study", b"k" * 32)}) == 3
    kept = [one for one in series if one.header["PatientID"] != "ben-2"]  # no scan of ben+2 is taken
    assert [place.reason == "" for place in place_series(kept, tmp_path, "study")].count(True) == 1


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
    assert "of CPU for a scan (from 2 scans): 0.00 CPU hours" in printed
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


def test_nothing_is_converted_into_a_folder_with_other_files(tmp_path, folder, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for more in ([], ["--dry-run"]):
        assert cli.run(["cohort", "prepare", str(folder), str(out), *SMALL_OPTIONS, *more]) == 2
        assert "is not empty and holds no prepared scans" in capsys.readouterr().err
        assert [path.name for path in out.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(("text", "age"), [("045Y", 45.0), ("018M", 1.5), ("", None), ("45", None), ("030W", 0.575)])
def test_ages_of_headers_become_years(text, age):
    assert age_of({"PatientAge": text}) == age
