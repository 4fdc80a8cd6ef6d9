"""Encoders of others are applied to a cohort's files, cached by their fingerprint, and refused with one line."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
import torch

from data_pipeline.shards.build import build_shards
from data_pipeline.storage.manifest import Manifest
from evaluation.external.adapters import CohortFiles, adapter_files, computed, load_adapters
from evaluation.external.given import missing_rows
from infra import cli
from infra.errors import UserError
from tests.cohorts import write_cohort
from tests.evaluation.external.adapter import FAULTS, Blurred

HERE = "tests.evaluation.external.adapter"


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_cohort(tmp_path_factory.mktemp("adapters") / "tiny", participants=12)


@pytest.fixture(scope="module")
def manifest(cohort):
    out = cohort.parent / "shards"
    build_shards(cohort, out, splits={"downstream": 1.0})
    return Manifest.load(out)


def features_of(encoder, cohort, manifest, cache, rows=None):
    given = adapter_files(load_adapters(encoder), CohortFiles(cohort), manifest)
    return computed(given, manifest, np.arange(len(manifest.scans)) if rows is None else rows, cache)[0]


def test_features_are_those_of_the_cohorts_files_in_the_order_of_the_shards(cohort, manifest, tmp_path):
    features = features_of(f"{HERE}:blurred", cohort, manifest, tmp_path)
    assert (features.name, features.kind, features.values.shape) == ("blurred", "adapter", (12, 27))
    for row, participant in enumerate(manifest.scans["participant_id"]):
        (path,) = cohort.glob(f"sub-{participant}/ses-1/anat/*.nii.gz")
        voxels = torch.from_numpy(np.asarray(nibabel.load(path).dataobj, dtype=np.float32))
        expected = torch.nn.functional.adaptive_avg_pool3d(voxels[None, None], 3).flatten().numpy()
        np.testing.assert_allclose(features.values[row], expected, rtol=1e-6)
    assert not list(tmp_path.iterdir())  # without a fingerprint nothing is kept
    np.testing.assert_array_equal(features_of(Blurred(), cohort, manifest, tmp_path).values, features.values)


def test_a_fingerprint_keeps_features_until_it_or_a_file_changes(cohort, manifest, tmp_path):
    class Counting(Blurred):
        calls = 0
        fingerprint = "one"

        def prepare(self, path):
            Counting.calls += 1
            return super().prepare(path)

    def calls(fingerprint, rows):
        Counting.calls, encoder = 0, Counting()
        encoder.fingerprint = fingerprint
        features_of(encoder, cohort, manifest, tmp_path, np.array(rows))
        return Counting.calls

    assert calls("one", [0, 1, 2]) == 3
    assert calls("one", [0, 1, 2]) == 0
    assert calls("one", [1, 2, 3]) == 1
    assert calls("two", [0, 1]) == 2
    changed = manifest.scans["participant_id"][2]
    (path,) = cohort.glob(f"sub-{changed}/ses-1/anat/*.nii.gz")
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj) + 1, image.affine), path)
    assert calls("one", [1, 2, 3]) == 1


def test_scans_without_a_file_are_missing(manifest, tmp_path):
    part = write_cohort(tmp_path / "part" / "tiny", participants=9)
    given = adapter_files(load_adapters(Blurred()), CohortFiles(part), manifest)
    lacking = missing_rows(given, np.arange(12))
    assert sorted(manifest.scans["participant_id"][lacking]) == ["009", "010", "011"]
    other = write_cohort(tmp_path / "other" / "x", participants=2)
    (other / "sub-000").rename(other / "sub-A")
    (other / "sub-001").rename(other / "sub-B")
    text = (other / "participants.tsv").read_text()
    (other / "participants.tsv").write_text(text.replace("sub-000", "sub-A").replace("sub-001", "sub-B"))
    with pytest.raises(
        UserError, match=r"holds no scan of the shards \(vbm\); it holds tiny_sub-A_ses-1, the shards hold"
    ):
        adapter_files(load_adapters(Blurred()), CohortFiles(other), manifest)
    with pytest.raises(UserError, match="reads the cohort's files, which the shards do not name; give their folder"):
        adapter_files(load_adapters(Blurred()), CohortFiles(), manifest)


MESSAGES = {
    "prepare fails": r"prepare\('.*'\) failed: ZeroDivisionError: division by zero \(adapter.py line \d+: return 1 / 0\)",
    "prepare returns no tensor": r"returns ndarray of shape \(1, 4, 4, 4\); it must return a tensor \(1, D, H, W\)",
    "prepare returns a wrong shape": r"returns Tensor of shape \(4, 4, 4\); it must return a tensor \(1, D, H, W\)",
    "prepare returns NaN": "returns 64 of 64 voxels that are NaN or infinite",
    "embed fails": r"embed\(batch of 8 scans from '.*'\) failed: TypeError: .* \(adapter.py line \d+: ",
    "embed returns too few rows": r"returns Tensor of shape \(1, 3\); it must return \(8, F\), a row per scan",
    "embed returns maps": r"returns Tensor of shape \(8, 1, 14, 16, 12\); it must return \(8, F\)",
    "embed returns NaN": "returns NaN or infinite features for 8 scans, such as",
    "batch size": "batch_size=0 is not a whole number above 0",
    "no embed": "Broken has no method embed; an adapter has prepare",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_adapter_gives_one_line(cohort, manifest, tmp_path, fault):
    spec = f"{HERE}:fault_{list(FAULTS).index(fault)}"
    with pytest.raises(UserError, match=f"encoder {spec}: .*" + MESSAGES[fault]) as caught:
        features_of(spec, cohort, manifest, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("adapter", "encoder 'adapter' is not of the form package.module:factory"),
        ("a-b:c", "not of the form"),
        ("absent_module:make", "it cannot be imported: ModuleNotFoundError: No module named 'absent_module'"),
        (f"{HERE}:absent", "it cannot be imported: AttributeError: absent"),
        (f"{HERE}:NOT_A_FUNCTION", "NOT_A_FUNCTION is of type int; name a function that returns an adapter"),
        (f"{HERE}:leaves", r"leaves\(\) failed: SystemExit: 3 \(adapter.py line \d+: raise SystemExit\(3\)\)"),
        (f"{HERE}:shape_of_its_own", r"returns shape \(1, 4, 4, 5\), for earlier files \(1, 4, 4, 4\)"),
        (f"{HERE}:number_of_its_own", "embed returns 2 features, for earlier files 1; the number must not change"),
    ],
)
def test_wrong_names_and_changing_shapes_give_one_line(cohort, manifest, tmp_path, spec, message):
    with pytest.raises(UserError, match=message) as caught:
        features_of(spec, cohort, manifest, tmp_path)
    assert "\n" not in str(caught.value)


def test_modules_of_the_current_folder_are_found_and_their_errors_named(
    cohort, manifest, tmp_path, monkeypatch, capsys
):
    (tmp_path / "broken_adapter_module.py").write_text("import os\n\nvalue = int('x')\n")
    (tmp_path / "wrong_adapter_module.py").write_text("def make(:\n")
    monkeypatch.chdir(tmp_path)
    rest = ["--cohort", str(cohort), "--shards", manifest.url, "--tasks", "age", "--folds", "2"]
    assert cli.run(["evaluate", "--encoder", "broken_adapter_module:make", *rest]) == 2
    assert (
        "ValueError: invalid literal for int() with base 10: 'x' (broken_adapter_module.py line 3: "
        in capsys.readouterr().err
    )
    with pytest.raises(UserError, match=r"SyntaxError: .* \(wrong_adapter_module.py line 1\)"):
        load_adapters("wrong_adapter_module:make")
