"""The simulated cohort: reproducible, valid BIDS, and with the anatomy and effect sizes that its truth table states."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields, replace

import nibabel
import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from data_pipeline.cohort.read import is_simulated, read_cohort
from data_pipeline.simulation.atlas import REGIONS, SmoothField
from data_pipeline.simulation.cohort import simulate_cohort
from data_pipeline.simulation.people import PATTERN, change_with_age, draw_people, site_of, subtype_weights
from data_pipeline.simulation.settings import Simulation
from data_pipeline.simulation.volumes import anatomy_at, make_volume
from data_pipeline.volume.grid import Grid
from infra import cli
from infra.errors import UserError

SETTINGS = Simulation(participants=300)
VOXEL_ML = 0.216  # of the 6 mm grid


@pytest.fixture(scope="module")
def people():
    return draw_people(300, dict(SETTINGS.shares), 0)


def scan(person, settings=SETTINGS, session=1, age=None, modality="vbm"):
    age = person.age if age is None else age
    return make_volume(settings, person, session=session, age=age, modality=modality)[0]


def grey_matter_ml(volume):
    return float(volume.sum()) * VOXEL_ML


def region_sum(volume, base):
    template = anatomy_at(6.0).template
    weights = sum(template.regions[i] for i, name in enumerate(REGIONS) if name.startswith(base))
    return float((volume[template.mask] * weights).sum())


def as_healthy(person, **changes):
    return replace(person, diagnosis="control", severity=0.0, **changes)


def as_patient(person, diagnosis):
    return replace(person, diagnosis=diagnosis, severity=1.0)


def test_the_number_of_workers_does_not_change_any_file(tmp_path):
    folders = [
        simulate_cohort(tmp_path / str(workers), participants=6, modality="both", workers=workers) for workers in (1, 2)
    ]
    files = [sorted(p.relative_to(f) for p in f.rglob("*") if p.is_file()) for f in folders]
    assert files[0] == files[1]
    assert sum(str(path).endswith(".nii.gz") for path in files[0]) >= 12
    for name in files[0]:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def test_the_cohort_is_bids_with_the_values_of_its_truth_table(tmp_path):
    root = simulate_cohort(tmp_path / "cohort", participants=12, workers=1)
    scans, unlisted = read_cohort(root, layout="bids")
    truth = pd.read_csv(root / "truth.tsv", sep="\t")
    assert len(scans) == len(truth) >= 12
    assert not unlisted
    assert is_simulated(root)
    assert "simulated" in json.loads((root / "dataset_description.json").read_text())["Name"].lower()
    for found, row in zip(sorted(scans, key=lambda s: (s.participant_id, s.session)), truth.itertuples(), strict=True):
        assert f"sub-{found.participant_id}" == row.participant_id
        assert found.age == pytest.approx(row.age)  # each session has its own age
        assert found.extra["tiv"] == pytest.approx(row.tiv, abs=0.1)
        assert "severity" not in found.extra
    image = nibabel.load(scans[0].path)
    assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
    np.testing.assert_allclose(image.header.get_zooms(), 6.0)
    assert b"simulated" in bytes(image.header["descrip"])


def test_the_arguments_have_the_defaults_of_the_recorded_settings():
    arguments = inspect.signature(simulate_cohort).parameters
    for setting in fields(Simulation):
        if setting.name != "shares":  # None stands for the default shares
            assert arguments[setting.name].default == setting.default


def test_a_killed_simulation_continues_and_other_content_is_refused(tmp_path, capsys):
    command = ["cohort", "simulate", str(tmp_path / "c"), "--participants", "4", "--workers", "1"]
    assert cli.run(command) == 0
    first = next((tmp_path / "c").rglob("*.nii.gz"))
    content = first.read_bytes()
    first.unlink()
    (tmp_path / "c" / "participants.tsv").unlink()  # the state after a kill
    assert cli.run(command) == 0
    assert first.read_bytes() == content
    assert "already simulated" not in capsys.readouterr().out
    assert cli.run(command) == 0
    assert "already simulated: 4 participants" in capsys.readouterr().out
    assert cli.run([*command, "--seed", "1"]) == 2
    assert "holds another simulation (seed was 0, now 1)" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="is not empty and not a simulated cohort"):
        simulate_cohort(tmp_path / "full")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"participants": 0}, "participants=0 must be at least 1"),
        ({"workers": 0}, "workers=0 must be at least 1"),
        ({"spacing": 0.1}, "spacing=0.1 is not in 1..12 mm"),
        ({"modality": "t1"}, r"modality='t1' is not known \(did you mean 't1w'\?\); allowed: vbm, t1w, both"),
        ({"effect": -1.0}, "effect=-1.0 must be 0 or more"),
        ({"acceleration": 3.0}, "acceleration=3.0 must be in 0..2"),
        ({"heterogeneity": 1.5}, "heterogeneity=1.5 must be in 0..1"),
        ({"site_effects": -1.0}, "site_effects=-1.0 must be 0 or more"),
        ({"misregistration": -1.0}, "misregistration=-1.0 must be in 0..10"),
        ({"individuality": 11.0}, "individuality=11.0 must be in 0..10"),
        ({"sites": 0}, "sites=0 is not in 1..1000"),
        ({"subtypes": 0}, "subtypes=0 is not in 1..1000"),
        ({"shares": {"PD": 0.1}}, "shares=PD=0.1: PD is not a simulated disease; allowed: AD, MCI, SCZ, BD"),
        ({"shares": {"AD": -0.1}}, "shares=AD=-0.1: every share must be 0 or more"),
        ({"shares": {"AD": 0.7, "SCZ": 0.4}}, "shares=AD=0.7,SCZ=0.4: .* and their sum at most 1"),
    ],
)
def test_a_setting_outside_its_limits_is_named_and_nothing_is_written(tmp_path, change, text):
    with pytest.raises(UserError, match=text):
        simulate_cohort(tmp_path / "x", **change)
    assert not (tmp_path / "x").exists()


def test_a_setting_missing_in_an_old_record_has_its_default(tmp_path, capsys):
    command = ["cohort", "simulate", str(tmp_path / "c"), "--participants", "2", "--workers", "1"]
    assert cli.run(command) == 0
    path = tmp_path / "c" / "simulation.json"
    record = json.loads(path.read_text())
    del record["heterogeneity"], record["site_effects"]
    path.write_text(json.dumps(record))
    assert cli.run(command) == 0
    assert cli.run([*command, "--heterogeneity", "1"]) == 2
    assert "holds another simulation (heterogeneity was 0.0, now 1.0)" in capsys.readouterr().err


def test_the_command_takes_shares_by_name(tmp_path, capsys):
    command = ["cohort", "simulate", str(tmp_path / "c"), "--participants", "8", "--workers", "1", "--spacing", "10"]
    assert cli.run([*command, "--shares", "SCZ=0.5"]) == 0
    table = pd.read_csv(tmp_path / "c" / "participants.tsv", sep="\t")
    assert table["diagnosis"].value_counts().to_dict() == {"SCZ": 4, "control": 4}
    with pytest.raises(SystemExit):
        cli.run(["cohort", "simulate", str(tmp_path / "d"), "--shares", "half"])
    assert "'half' is not of the form AD=0.1,SCZ=0.2" in capsys.readouterr().err


def test_a_heterogeneous_disease_differs_between_patients_but_not_in_the_mean(people):
    patients = [as_patient(p, "SCZ") for p in people]
    uniform, individual = (
        np.array(
            [
                change_with_age(p, 34.0, replace(SETTINGS, heterogeneity=h))[0]
                - change_with_age(as_healthy(p), 34.0, SETTINGS)[0]
                for p in patients
            ]
        )
        for h in (0.0, 1.0)
    )
    insula = REGIONS.index("insula_left")
    assert np.ptp(uniform[:, REGIONS.index("anterior_cingulate")]) < 0.02  # only ageing differs between patients
    assert individual[:, insula].std() > 3 * uniform[:, insula].std()
    assert individual[:, insula].mean() == pytest.approx(uniform[:, insula].mean(), rel=0.2)
    for p in people[:5]:  # healthy participants have no foci
        plain, other = (change_with_age(as_healthy(p), 50.0, replace(SETTINGS, heterogeneity=h)) for h in (0.0, 1.0))
        for a, b in zip(plain, other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_site_effects_scale_gain_bias_and_noise_of_the_scanners(people):
    plain, strong, none = (site_of(3, 0, site_effects) for site_effects in (1.0, 3.0, 0.0))
    assert (strong.mean_age, strong.age_spread) == (plain.mean_age, plain.age_spread)
    assert np.log(strong.gain) == pytest.approx(3 * np.log(plain.gain))
    assert strong.bias == pytest.approx(3 * plain.bias)
    assert strong.noise == pytest.approx(3 * plain.noise)
    assert (none.gain, none.bias, none.noise) == (1.0, 0.0, 0.0)
    assert not np.array_equal(scan(people[0]), scan(people[0], replace(SETTINGS, site_effects=3.0)))


def test_subtypes_divide_the_patients_and_leave_the_mean_disease(people):
    weights = subtype_weights(3, 0)
    assert weights.shape == (3, len(REGIONS) + 1)
    np.testing.assert_allclose(weights.mean(0), 1.0)
    assert weights.std(0).min() > 0.05
    grouped = draw_people(300, dict(SETTINGS.shares), 0, subtypes=3)
    assert np.bincount([p.subtype for p in grouped]).min() > 70
    assert {p.subtype for p in people} == {0}
    for plain, person in zip(people, grouped, strict=True):  # everything else is as without subtypes
        assert (plain.age, plain.severity, plain.log_tiv) == (person.age, person.severity, person.log_tiv)
    settings, insula = replace(SETTINGS, subtypes=3, acceleration=0.0), REGIONS.index("insula_left")
    of_subtype = [
        change_with_age(as_patient(replace(grouped[0], subtype=number), "SCZ"), 34.0, settings)[0][insula]
        - change_with_age(as_healthy(grouped[0]), 34.0, settings)[0][insula]
        for number in range(3)
    ]
    expected = 2.0 * PATTERN["SCZ"]["insula"] * weights[:, insula]
    np.testing.assert_allclose(of_subtype, expected)
    assert np.mean(of_subtype) == pytest.approx(2.0 * PATTERN["SCZ"]["insula"])


def test_the_number_of_sites_is_a_setting():
    sites = [person.site for person in draw_people(300, {}, 0, sites=3)]
    assert set(sites) == {0, 1, 2}


def centre_of(volume):
    """Centre of grey matter in mm."""
    return 6.0 * np.array(ndimage.center_of_mass(volume))


def test_misregistration_displaces_each_scan_by_the_stated_distance(people):
    settings = replace(SETTINGS, misregistration=3.0)
    shifts = np.array([
        centre_of(scan(person, settings, session)) - centre_of(scan(person, SETTINGS, session))
        for person in people[:30] for session in (1, 2)
    ])  # fmt: skip
    # The shift of the whole brain has a standard deviation of 3 / sqrt 2 mm; the local error adds little to its centre.
    assert shifts.std() == pytest.approx(3.0 / np.sqrt(2.0), rel=0.3)
    assert abs(np.corrcoef(shifts[::2].ravel(), shifts[1::2].ravel())[0, 1]) < 0.4  # sessions err independently
    assert np.array_equal(scan(people[0], settings), scan(people[0], settings))


def test_individual_folds_make_people_less_alike_and_sessions_no_less(people):
    settings = replace(SETTINGS, individuality=3.0, site_effects=0.0)
    plain = replace(SETTINGS, site_effects=0.0)
    likeness = {}
    for name, of in (("plain", plain), ("folded", settings)):
        first = [scan(as_healthy(p), of, 1, age=40.0).ravel() for p in people[:12]]
        second = [scan(as_healthy(p), of, 2, age=40.0).ravel() for p in people[:12]]
        table = np.corrcoef(first)
        likeness[name] = (
            table[~np.eye(12, dtype=bool)].mean(),
            np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(first, second, strict=True)]),
        )
    assert likeness["folded"][0] < likeness["plain"][0] - 0.05
    assert likeness["folded"][1] == pytest.approx(likeness["plain"][1], abs=1e-3)


def test_diagnoses_have_the_given_shares_and_typical_ages(people):
    counts = pd.Series([p.diagnosis for p in people]).value_counts()
    assert {name: counts[name] for name in ("AD", "MCI", "SCZ", "BD")} == {"AD": 26, "MCI": 15, "SCZ": 30, "BD": 18}
    ages = {name: np.mean([p.age for p in people if p.diagnosis == name]) for name in ("AD", "SCZ")}
    assert ages["AD"] > 65
    assert ages["SCZ"] < 45
    assert 0.05 < np.mean([len(p.later) > 0 for p in people]) < 0.3


def test_adult_grey_matter_and_its_yearly_loss_follow_the_literature(people):
    sample = [as_healthy(p) for p in people[:40]]
    total = {age: np.mean([grey_matter_ml(scan(p, age=age)) for p in sample]) for age in (20, 35, 36, 60, 61, 80, 81)}
    assert 700 < total[20] < 850
    percent_lost = {age: 100 * (1 - total[age + 1] / total[age]) for age in (35, 60, 80)}
    assert percent_lost[35] == pytest.approx(0.37, abs=0.15)
    assert percent_lost[60] == pytest.approx(0.66, abs=0.15)
    assert percent_lost[80] == pytest.approx(0.85, abs=0.15)


def test_diseases_shrink_their_regions_by_the_stated_amounts(people):
    sample = [as_healthy(p) for p in people[:40]]

    def percent_lost(diagnosis, base, age):
        healthy = np.mean([region_sum(scan(p, age=age), base) for p in sample])
        patients = np.mean([region_sum(scan(as_patient(p, diagnosis), age=age), base) for p in sample])
        return 100 * (1 - patients / healthy)

    assert 13 < percent_lost("AD", "hippocampus", 74) < 25
    assert percent_lost("AD", "hippocampus", 74) > 2 * percent_lost("AD", "occipital", 74)
    assert 0 < percent_lost("MCI", "hippocampus", 74) < percent_lost("AD", "hippocampus", 74)
    patients = [as_patient(p, "SCZ") for p in sample]
    healthy_ml, patients_ml = (
        np.mean([grey_matter_ml(scan(p, age=34)) for p in group]) for group in (sample, patients)
    )
    assert 1.0 < 100 * (1 - patients_ml / healthy_ml) < 4.5


def test_effect_zero_makes_patients_equal_to_healthy_participants(people):
    no_effect = replace(SETTINGS, effect=0.0)
    assert np.array_equal(scan(as_patient(people[0], "AD"), no_effect), scan(as_healthy(people[0]), no_effect))


def test_a_second_session_resembles_the_first_more_than_another_participant(people):
    person = as_healthy(people[3])
    first, second = scan(person), scan(person, session=2)
    other = scan(as_healthy(people[4], site=person.site))
    same, different = (np.corrcoef(first.ravel(), volume.ravel())[0, 1] for volume in (second, other))
    assert 1.0 > same > different


def test_a_coarse_grid_shows_the_same_brain(people):
    fine, coarse = (scan(people[0], replace(SETTINGS, spacing=spacing)) for spacing in (3.0, 6.0))
    assert fine.sum() * 0.027 == pytest.approx(coarse.sum() * VOXEL_ML, rel=0.05)
    halved = fine[:60, :72, :60].reshape(30, 2, 36, 2, 30, 2).mean((1, 3, 5))
    assert np.corrcoef(halved.ravel(), coarse[:30, :36, :30].ravel())[0, 1] > 0.95


def test_brains_are_asymmetric_and_head_size_shows_in_grey_matter(people):
    volumes = [scan(as_healthy(p)) for p in people[:60]]
    mean = np.mean(volumes, axis=0)
    assert np.abs(mean - mean[::-1]).max() > 0.02 * mean.max()
    log_tiv = [p.log_tiv for p in people[:60]]
    assert np.corrcoef(np.log([v.sum() for v in volumes]), log_tiv)[0, 1] > 0.4
    by_sex = {sex: np.mean([p.log_tiv for p in people if p.sex == sex]) for sex in "FM"}
    assert 0.05 < by_sex["M"] - by_sex["F"] < 0.2


def test_deformations_never_fold(people):
    anatomy = anatomy_at(6.0)
    for person in people[:30]:
        generator = np.random.Generator(np.random.Philox(key=[0, person.number]))
        field = np.stack([anatomy.coarse.evaluate(control) for control in anatomy.draw_deformation(generator)])
        gradient = np.stack([np.stack(np.gradient(axis)) for axis in field]) / 6.0
        jacobian = np.linalg.det(np.moveaxis(gradient, (0, 1), (-2, -1)) + np.eye(3))
        assert jacobian.min() > 0.2


def test_ventricles_grow_with_age_in_t1_images(people):
    person = as_healthy(people[0], log_ventricle=0.0)
    centre = anatomy_at(6.0).template.ventricle_distance < 6.0
    young, old = (scan(person, age=age, modality="t1w")[centre].mean() for age in (25, 85))
    assert old < 0.95 * young


def test_a_smooth_field_has_the_same_values_in_millimetres_on_every_grid():
    fine, coarse = (SmoothField(Grid.vbm(spacing), 30.0) for spacing in (2.0, 6.0))
    control = fine.draw(np.random.Generator(np.random.Philox(key=[1, 2])))
    on_fine, on_coarse = fine.evaluate(control), coarse.evaluate(control)
    # Not bit for bit: on some processors the matrix product of a small box sums in another order.
    box = fine.evaluate(control, (slice(3, 9), slice(4, 8), slice(0, 5)))
    np.testing.assert_allclose(box, on_fine[3:9, 4:8, 0:5], rtol=0, atol=1e-6)
    # The centre of a 6 mm voxel is that of the middle one of its 27 voxels of 2 mm.
    np.testing.assert_allclose(on_fine[1::3, 1::3, 1::3][:29, :35, :29], on_coarse[:29, :35, :29], atol=1e-4)
    assert on_coarse.std() == pytest.approx(1.0, abs=0.25)
