"""The simulated cohort: the same for any worker, with the anatomy that its truth says."""

from __future__ import annotations

import json
from dataclasses import replace

import nibabel
import numpy as np
import pandas as pd
import pytest

from data_pipeline.cohort.read import is_simulated, read_bids
from data_pipeline.simulation.atlas import REGIONS, SmoothField
from data_pipeline.simulation.cohort import Simulation, _world, make_volume, simulate_cohort
from data_pipeline.simulation.people import draw_people, log_change, site_of
from data_pipeline.volume.load import Grid
from infra import cli
from infra.errors import UserError

SETTINGS = Simulation(participants=300)


@pytest.fixture(scope="module")
def people():
    return draw_people(300, dict(SETTINGS.shares), 0)


def scan(person, settings=SETTINGS, session=1, age=None, modality="vbm"):
    return make_volume(settings, person, session, person.age if age is None else age, modality)[0]


def grey_ml(volume):
    return float(volume.sum()) * 0.216


def in_region(volume, base):
    world = _world(6.0)
    weights = sum(world.template.regions[i] for i, name in enumerate(REGIONS) if name.startswith(base))
    return float((volume[world.template.mask] * weights).sum())


def as_healthy(person, **changes):
    return replace(person, diagnosis="control", severity=0.0, **changes)


def as_patient(person, diagnosis):
    return replace(person, diagnosis=diagnosis, severity=1.0)


def test_cohort_on_disk_is_the_same_for_any_number_of_workers(tmp_path):
    small = Simulation(participants=6, modality="both")
    folders = [simulate_cohort(tmp_path / str(workers), small, workers=workers) for workers in (1, 2)]
    files = [sorted(p.relative_to(f) for p in f.rglob("*") if p.is_file()) for f in folders]
    assert files[0] == files[1]
    assert sum(str(path).endswith(".nii.gz") for path in files[0]) >= 12
    for name in files[0]:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def test_cohort_is_bids_that_the_reader_takes(tmp_path):
    root = simulate_cohort(tmp_path / "cohort", Simulation(participants=12), workers=1)
    scans, unknown = read_bids(root)
    truth = pd.read_csv(root / "truth.tsv", sep="\t")
    assert len(scans) == len(truth) >= 12
    assert not unknown
    assert is_simulated(root)
    assert "simulated" in json.loads((root / "dataset_description.json").read_text())["Name"].lower()
    for one, row in zip(sorted(scans, key=lambda s: (s.participant_id, s.session)), truth.itertuples(), strict=True):
        assert f"sub-{one.participant_id}" == row.participant_id
        assert one.age == pytest.approx(row.age)  # each session has an age of its own
        assert one.extra["tiv"] == pytest.approx(row.tiv, abs=0.1)
        assert "severity" not in one.extra
    image = nibabel.load(scans[0].path)
    assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
    np.testing.assert_allclose(image.header.get_zooms(), 6.0)
    assert b"simulated" in bytes(image.header["descrip"])


def test_continued_completed_and_refused(tmp_path, capsys):
    command = ["cohort", "simulate", str(tmp_path / "c"), "--participants", "4", "--workers", "1"]
    assert cli.run(command) == 0
    first = next((tmp_path / "c").rglob("*.nii.gz"))
    content = first.read_bytes()
    first.unlink()
    (tmp_path / "c" / "participants.tsv").unlink()  # as a kill would leave it
    assert cli.run(command) == 0
    assert first.read_bytes() == content
    assert cli.run(command) == 0
    assert "already simulated" in capsys.readouterr().out
    assert cli.run([*command, "--seed", "1"]) == 2
    assert "holds another simulation (seed was 0, now 1)" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="is not empty and not a simulated cohort"):
        simulate_cohort(tmp_path / "full", SETTINGS)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"participants": 0}, "--participants=0 must be at least 1"),
        ({"spacing": 0.1}, "--spacing=0.1 is not in 1..12 mm"),
        ({"modality": "pet"}, "--modality='pet' is not known"),
        ({"acceleration": 3.0}, "acceleration in 0"),
        ({"heterogeneity": 1.5}, "--heterogeneity=1.5 --site-effects=1.0: heterogeneity must be in 0"),
        ({"site_effects": -1.0}, "site-effects 0 or more"),
        (
            {"shares": (("PD", 0.1),)},
            "--shares=PD=0.1: shares of AD, MCI, SCZ, BD must be 0 or more and sum to 1 at most",
        ),
        ({"shares": (("AD", 0.7), ("SCZ", 0.4))}, "sum to 1 at most"),
    ],
)
def test_wrong_settings_are_named(tmp_path, change, text):
    with pytest.raises(UserError, match=text):
        simulate_cohort(tmp_path / "x", replace(SETTINGS, **change))
    assert not (tmp_path / "x").exists()


def test_a_cohort_made_before_a_setting_was_there_was_made_as_by_its_default(tmp_path, capsys):
    command = ["cohort", "simulate", str(tmp_path / "c"), "--participants", "2", "--workers", "1"]
    assert cli.run(command) == 0
    path = tmp_path / "c" / "simulation.json"
    record = json.loads(path.read_text())
    del record["heterogeneity"], record["site_effects"]
    path.write_text(json.dumps(record))
    assert cli.run(command) == 0
    assert cli.run([*command, "--heterogeneity", "1"]) == 2
    assert "holds another simulation (heterogeneity was 0.0, now 1.0)" in capsys.readouterr().err


def test_shares_are_given_by_name(tmp_path, capsys):
    command = ["cohort", "simulate", str(tmp_path / "c"), "--participants", "8", "--workers", "1", "--spacing", "10"]
    assert cli.run([*command, "--shares", "SCZ=0.5"]) == 0
    table = pd.read_csv(tmp_path / "c" / "participants.tsv", sep="\t")
    assert table["diagnosis"].value_counts().to_dict() == {"SCZ": 4, "control": 4}
    with pytest.raises(SystemExit):
        cli.run(["cohort", "simulate", str(tmp_path / "d"), "--shares", "half"])
    assert "'half' is not of the form AD=0.1,SCZ=0.2" in capsys.readouterr().err


def test_foci_of_a_heterogeneous_disease_are_each_patients_own_and_the_mean_stays(people):
    patients = [as_patient(p, "SCZ") for p in people]
    plain, own = (
        np.array([log_change(p, 34.0, 1.0, 1.0, h)[0] - log_change(as_healthy(p), 34.0, 1.0, 1.0)[0] for p in patients])
        for h in (0.0, 1.0)
    )
    at = REGIONS.index("insula_left")
    assert np.ptp(plain[:, REGIONS.index("anterior_cingulate")]) < 0.02  # ageing alone differs from one to the next
    assert own[:, at].std() > 3 * plain[:, at].std()
    assert own[:, at].mean() == pytest.approx(plain[:, at].mean(), rel=0.2)
    for p in people[:5]:  # healthy people have none
        for a, b in zip(log_change(as_healthy(p), 50.0, 1.0, 1.0, 0.0), log_change(as_healthy(p), 50.0, 1.0, 1.0, 1.0),
                        strict=True):  # fmt: skip
            np.testing.assert_array_equal(a, b)


def test_site_effects_scale_what_scanners_do(people):
    plain, strong, none = (site_of(3, 0, strength) for strength in (1.0, 3.0, 0.0))
    assert strong["age"] == plain["age"]
    assert np.log(strong["gain"]) == pytest.approx(3 * np.log(plain["gain"]))
    assert strong["bias"] == pytest.approx(3 * plain["bias"])
    assert (none["gain"], none["bias"], none["noise"]) == (1.0, 0.0, 0.0)
    assert not np.array_equal(scan(people[0]), scan(people[0], replace(SETTINGS, site_effects=3.0)))


def test_diagnoses_come_in_the_shares_asked_for(people):
    counts = pd.Series([p.diagnosis for p in people]).value_counts()
    assert {name: counts[name] for name in ("AD", "MCI", "SCZ", "BD")} == {"AD": 26, "MCI": 15, "SCZ": 30, "BD": 18}
    ages = {name: np.mean([p.age for p in people if p.diagnosis == name]) for name in ("AD", "SCZ")}
    assert ages["AD"] > 65
    assert ages["SCZ"] < 45
    assert 0.05 < np.mean([len(p.later) > 0 for p in people]) < 0.3


def test_adult_grey_matter_and_its_loss_follow_the_literature(people):
    sample = [as_healthy(p) for p in people[:40]]
    total = {age: np.mean([grey_ml(scan(p, age=age)) for p in sample]) for age in (20, 35, 36, 60, 61, 80, 81)}
    assert 700 < total[20] < 850
    yearly = {age: 100 * (1 - total[age + 1] / total[age]) for age in (35, 60, 80)}
    assert yearly[35] == pytest.approx(0.37, abs=0.15)
    assert yearly[60] == pytest.approx(0.66, abs=0.15)
    assert yearly[80] == pytest.approx(0.85, abs=0.15)


def test_disease_takes_what_it_should_where_it_should(people):
    sample = [as_healthy(p) for p in people[:40]]

    def loss(diagnosis, base, age):
        healthy = np.mean([in_region(scan(p, age=age), base) for p in sample])
        return 100 * (1 - np.mean([in_region(scan(as_patient(p, diagnosis), age=age), base) for p in sample]) / healthy)

    assert 13 < loss("AD", "hippocampus", 74) < 25
    assert loss("AD", "hippocampus", 74) > 2 * loss("AD", "occipital", 74)
    assert 0 < loss("MCI", "hippocampus", 74) < loss("AD", "hippocampus", 74)
    whole = [
        np.mean([grey_ml(scan(p, age=34)) for p in who]) for who in (sample, [as_patient(p, "SCZ") for p in sample])
    ]
    assert 1.0 < 100 * (1 - whole[1] / whole[0]) < 4.5


def test_zero_effect_makes_patients_healthy(people):
    none = replace(SETTINGS, effect=0.0)
    assert np.array_equal(scan(as_patient(people[0], "AD"), none), scan(as_healthy(people[0]), none))


def test_a_second_session_is_the_same_brain_scanned_again(people):
    one = as_healthy(people[3])
    first, again, other = scan(one), scan(one, session=2), scan(as_healthy(people[4], site=one.site))
    same, different = (np.corrcoef(first.ravel(), v.ravel())[0, 1] for v in (again, other))
    assert 1.0 > same > different


def test_a_coarse_grid_shows_the_same_brain(people):
    fine, coarse = (scan(people[0], replace(SETTINGS, spacing=spacing)) for spacing in (3.0, 6.0))
    assert fine.sum() * 0.027 == pytest.approx(coarse.sum() * 0.216, rel=0.05)
    halves = fine[:60, :72, :60].reshape(30, 2, 36, 2, 30, 2).mean((1, 3, 5))
    assert np.corrcoef(halves.ravel(), coarse[:30, :36, :30].ravel())[0, 1] > 0.95


def test_brains_are_not_symmetric_and_heads_differ(people):
    volumes = [scan(as_healthy(p)) for p in people[:60]]
    mean = np.mean(volumes, axis=0)
    assert np.abs(mean - mean[::-1]).max() > 0.02 * mean.max()
    tiv = [p.log_tiv for p in people[:60]]
    assert np.corrcoef(np.log([v.sum() for v in volumes]), tiv)[0, 1] > 0.4
    sizes = {sex: np.mean([p.log_tiv for p in people if p.sex == sex]) for sex in "FM"}
    assert 0.05 < sizes["M"] - sizes["F"] < 0.2


def test_deformations_never_fold(people):
    world = _world(6.0)
    for person in people[:30]:
        generator = np.random.Generator(np.random.Philox(key=[0, person.number]))
        field = np.stack([world.coarse.evaluate(part) for part in world.deformation(generator)])
        gradient = np.stack([np.stack(np.gradient(part)) for part in field]) / 6.0
        jacobian = np.linalg.det(np.moveaxis(gradient, (0, 1), (-2, -1)) + np.eye(3))
        assert jacobian.min() > 0.2


def test_ventricles_grow_in_t1_images(people):
    one = as_healthy(people[0], log_ventricle=0.0)
    world = _world(6.0)
    centre = world.template.ventricle_distance < 6.0
    young, old = (scan(one, age=age, modality="t1w")[centre].mean() for age in (25, 85))
    assert old < 0.95 * young


def test_a_smooth_field_is_the_same_in_millimetres_on_every_grid():
    fine, coarse = (SmoothField(Grid.vbm(spacing), 30.0) for spacing in (2.0, 6.0))
    control = fine.draw(np.random.Generator(np.random.Philox(key=[1, 2])))
    a, b = fine.evaluate(control), coarse.evaluate(control)
    # Not to the last bit: the matrix product of a small box adds in another order on some processors.
    box = fine.evaluate(control, (slice(3, 9), slice(4, 8), slice(0, 5)))
    np.testing.assert_allclose(box, a[3:9, 4:8, 0:5], rtol=0, atol=1e-6)
    # A 6 mm voxel's centre is that of the middle one of its 27 2 mm voxels.
    np.testing.assert_allclose(a[1::3, 1::3, 1::3][:29, :35, :29], b[:29, :35, :29], atol=1e-4)
    assert b.std() == pytest.approx(1.0, abs=0.25)
