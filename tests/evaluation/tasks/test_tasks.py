"""Tasks select their scans, with the spellings of the paper's cohorts; messages about wrong tasks name file and field."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from evaluation.protocols.evaluate import _make_context
from evaluation.protocols.nested_cv import prepare
from evaluation.protocols.probes import Probe, linear
from evaluation.protocols.settings import EvaluationSettings
from evaluation.statistics.metrics import site_leakage
from evaluation.tasks.columns import as_numbers
from evaluation.tasks.folds import outer_folds
from evaluation.tasks.tasks import load_task
from infra.errors import UserError
from tests.searches import search_task

SPELLINGS = {
    "scz": (["chronic schizophrenia", "SCZ", "Schizophrenia_Strict"], ["control", "No_Known_Disorder"]),
    "bd": (["bipolar disorder", "BD", "psychotic bipolar disorder"], ["HC", "control"]),
    "ad": (["AD", "Dementia"], ["CN", "control"]),
    "mci": (["EMCI", "LMCI", "MCI"], ["CN"]),
}


def manifest(diagnoses, people=None, **columns):
    """A stand-in for a manifest with a scan per diagnosis."""
    count = len(diagnoses)
    people = [f"p{n:03d}" for n in range(count)] if people is None else people
    scans = {
        "key": [f"s{n}" for n in range(count)], "dataset": "d", "participant_id": people, "diagnosis": diagnoses,
        "split": "downstream", "age": np.linspace(40, 60, count), "sex": ["F", "M"] * (count // 2),
        "site": [f"site{n % 3}" for n in range(count)], "tiv": 1400.0 + np.arange(count), **columns,
    }  # fmt: skip
    return SimpleNamespace(scans=pd.DataFrame(scans), root="shards")


def task_file(folder, text, name="mine"):
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return str(path)


PLAIN = "title: t\nkind: binary\nlabel: diagnosis\npositive: [AD]\nnegative: [control]\n"


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_spellings_of_the_papers_cohorts_are_recognised(name):
    patients, controls = SPELLINGS[name]
    both = [*(patients * 10)[:20], *(controls * 20)[:20]]
    shuffled = np.random.default_rng(0).permutation(np.array([*both, "schizoaffective", "ADHD"], dtype=object))
    task = load_task(name, manifest(list(shuffled), age=50.0))
    assert (task.labels.sum(), len(task.labels)) == (20, 40)
    assert set(shuffled[task.rows[task.labels == 1]]) == set(patients)


def test_capitals_spaces_and_underscores_make_no_difference(tmp_path):
    path = task_file(tmp_path, PLAIN.replace("[AD]", "[Bipolar_Disorder]"))
    task = load_task(path, manifest(["bipolar-disorder", "Bipolar  Disorder", "BIPOLAR DISORDER", "Control"] * 10))
    assert (task.labels == 1).sum() == 30


def test_query_test_groups_strata_covariates_and_confounds_are_applied(tmp_path):
    given = manifest(["AD", "control"] * 30, family=[f"f{n // 4}" for n in range(60)])
    more = (
        "query: age > 45\ntest: site == 'site2'\nstrata: [site, age]\ncovariates: [age, sex]\nconfounds: [site, tiv]\n"
    )
    task = load_task(task_file(tmp_path, PLAIN + more + "groups: family\n"), given)
    chosen = given.scans.loc[task.rows]
    assert chosen["age"].min() > 45
    assert np.array_equal(task.test, chosen["site"] == "site2")
    assert task.covariates.shape == (len(task.rows), 2)
    assert np.array_equal(task.covariates[:, 1], chosen["sex"] == "M")
    assert task.confounds.shape == (len(task.rows), 3)  # two columns for three sites, and tiv
    assert np.array_equal(
        task.groups[:-1] == task.groups[1:], (chosen["family"][:-1].values == chosen["family"][1:].values)
    )
    for code in np.unique(task.strata):
        assert chosen["site"][task.strata == code].nunique() == 1


def test_controls_are_matched_to_patients_by_age(tmp_path):
    """Five copies of one case, a century apart: the control of 76 is too far from the patient of 70, near enough to 72."""
    ages = {"AD": [70, 72, 90], "control": [70.5, 73, 76, 50]}
    kept = {70, 72, 70.5, 73, 76}
    diagnoses = [name for name in ages for _ in range(5) for _ in ages[name]]
    years = [age + 100 * copy for name in ages for copy in range(5) for age in ages[name]]
    given = manifest(diagnoses, age=years, sex="F")
    path = task_file(tmp_path, PLAIN + "match: {column: age, within: 5.0, ratio: 2}\n")
    chosen = given.scans.loc[load_task(path, given).rows, "age"]
    assert sorted(chosen) == sorted(age + 100 * copy for age in kept for copy in range(5))


def test_controls_are_matched_within_the_test_set_and_within_equal_values(tmp_path):
    """The nearest control of each patient is on the other side of the test set, or of the other sex."""
    ages = {"AD": [60, 70], "control": [61, 64, 71, 74]}
    sites = {"AD": ["in", "out"], "control": ["out", "in", "in", "out"]}
    columns = {name: np.tile(np.concatenate([values[kind] for kind in ages]), 6) for name, values in
               {"age": ages, "site": sites, "sex": {kind: ["F"] * len(ages[kind]) for kind in ages}}.items()}  # fmt: skip
    columns["age"] = columns["age"].astype(float) + np.repeat(100 * np.arange(6), 6)
    given = manifest([kind for _ in range(6) for kind in ages for _ in ages[kind]], **columns)
    free = load_task(task_file(tmp_path, PLAIN + "match: {column: age, ratio: 1}\n"), given)
    tested = load_task(task_file(tmp_path, PLAIN + "match: {column: age, ratio: 1}\ntest: site == 'out'\n"), given)
    same = load_task(task_file(tmp_path, PLAIN + "match: {column: age, ratio: 1, same: [site]}\n"), given)
    controls = [given.scans.loc[task.rows[task.labels == 0], "age"] % 100 for task in (free, tested, same)]
    assert set(controls[0]) == {61, 71}
    assert set(controls[1]) == set(controls[2]) == {64, 74}
    for side in (False, True):
        assert tested.labels[tested.test == side].mean() == 0.5


def test_a_patient_without_a_value_that_must_be_equal_is_left_out(tmp_path):
    given = manifest(["AD", "control"] * 30, age=50.0, sex=["F", "F", "M", "M", None, None] * 10)
    task = load_task(task_file(tmp_path, PLAIN + "match: {column: age, ratio: 1, same: [sex]}\n"), given)
    assert set(given.scans.loc[task.rows, "sex"]) == {"F", "M"}


@pytest.mark.parametrize("name", ["ad", "scz", "bd", "mci"])
def test_shipped_tasks_match_controls_that_are_much_younger_than_the_patients(name):
    generator = np.random.default_rng(0)
    patients, controls = SPELLINGS[name]
    diagnoses = [patients[0]] * 30 + [controls[0]] * 200
    ages = np.concatenate([generator.uniform(60, 80, 30), generator.uniform(20, 80, 200)])
    given = manifest(diagnoses, age=ages, sex="F")
    assert ages[:30].mean() - ages[30:].mean() > 15
    task = load_task(name, given)
    matched, labels = ages[task.rows], task.labels
    assert abs(matched[labels == 1].mean() - matched[labels == 0].mean()) < 3
    assert len(set(task.rows)) == len(task.rows)
    for age in matched[labels == 0]:
        assert np.abs(matched[labels == 1] - age).min() <= 5


def test_missing_numbers_stay_nan_and_text_is_one_hot_encoded():
    scans = pd.DataFrame({"age": [1.0, np.nan], "site": ["a", None]})
    np.testing.assert_array_equal(as_numbers(scans, ["age", "site"]), [[1.0, 1.0], [np.nan, 0.0]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PLAIN.replace("label: diagnosis", "label: diagnosi"),
         r"mine.yaml: label: 'diagnosi' is not a column of scans.parquet \(did you mean 'diagnosis'\?\)"),
        (PLAIN + "covariates: [aeg]\n", r"mine.yaml: covariates: 'aeg' is not a column .*did you mean 'age'"),
        (PLAIN + "confounds: [diagnosis]\n", "mine.yaml: confounds: 'diagnosis' is the label itself"),
        (PLAIN + "query: agee > 3\n", "mine.yaml: query: 'agee > 3' does not work on scans.parquet: .*agee"),
        (PLAIN + "test: age >\n", "mine.yaml: test: 'age >' does not work"),
        (PLAIN + "test: age > 200\n", "mine.yaml: test: the test set has fewer than two classes or scans"),
        (PLAIN.replace("[AD]", "[]"), "mine.yaml: positive is empty; a binary task needs values"),
        (PLAIN.replace("[AD]", "[Control]"), "mine.yaml: negative: 'control' is also under positive"),
        (PLAIN.replace("binary", "binry"), "mine.yaml: kind: .*'binary', 'multiclass' or 'regression', found 'binry'$"),
        (PLAIN + "lable: x\n", r"mine.yaml: unknown key 'lable' \(did you mean 'label'\?\)"),
        (PLAIN.replace("binary", "regression"), "mine.yaml: label: 'diagnosis' holds text such as 'AD'; regression needs"),
        (PLAIN + "match: {same: [sx]}\n", "mine.yaml: match.same: 'sx' is not a column .*did you mean 'sex'"),
        (PLAIN.replace("binary", "multiclass") + "match: {column: age}\n", "mine.yaml: match needs a task of kind binary"),
        (PLAIN + "splits: [nowhere]\n", "task mine: too few participants for 5 folds in splits nowhere of mine.yaml"),
    ],
)  # fmt: skip
def test_messages_about_wrong_tasks_name_file_and_field(tmp_path, text, message):
    given = manifest(["AD", "control"] * 30)
    with pytest.raises(UserError, match=message) as refused:
        load_task(task_file(tmp_path, text), given)
    assert "\n" not in str(refused.value)


def test_groups_and_test_sets_that_split_a_participant_are_refused(tmp_path):
    given = manifest(["AD", "control"] * 30, people=[f"p{n // 4}" for n in range(60)])
    with pytest.raises(UserError, match=r"mine.yaml: groups: participant d/p\d+ has several values of 'sex'"):
        load_task(task_file(tmp_path, PLAIN + "groups: sex\n"), given)
    with pytest.raises(UserError, match="mine.yaml: test: 15 participants are in the training and in the test set"):
        load_task(task_file(tmp_path, PLAIN + "test: sex == 'F'\n"), given)


def test_a_missing_task_file_is_refused():
    with pytest.raises(UserError, match="task file none.yaml does not exist"):
        load_task("none.yaml", manifest(["AD", "control"]))


SITES = "title: s\nkind: multiclass\nlabel: site\n"


@pytest.mark.parametrize(
    ("sizes", "left_out"),
    [
        ({"north": 10, "south": 10, "island": 1, "ship": 2}, ["island 1", "ship 2"]),
        ({"a": 1, "north": 6, "south": 5, "z": 4}, ["a 1", "z 4"]),
        ({"north": 6, "south": 5}, []),
    ],
)
def test_sites_with_too_few_people_for_the_folds_are_left_out_and_named(tmp_path, sizes, left_out):
    sites = [name for name, size in sizes.items() for _ in range(2 * size)]
    people = [f"p{number // 2:03d}" for number in range(len(sites))]  # two scans each
    task = load_task(task_file(tmp_path, SITES), manifest(["control"] * len(sites), people, site=sites))
    assert task.left_out == left_out
    assert task.classes == ["north", "south"]
    assert [task.classes[code] for code in task.labels] == [site for site in sites if site in ("north", "south")]
    assert np.array_equal(task.rows, [row for row, site in enumerate(sites) if site in ("north", "south")])
    assert len(task.rows) == len(task.groups) == len(task.participants) == len(task.sites)
    for train, _ in outer_folds(task, 5, 0):
        assert set(task.labels[train]) == {0, 1}


def test_few_people_of_a_site_count_as_people_not_as_scans_and_perfect_features_have_leakage_1(tmp_path):
    sites = ["north"] * 12 + ["south"] * 12 + ["island"] * 6
    people = [f"p{number:03d}" for number in range(24)] + ["p900"] * 6  # six scans of one person
    task = load_task(task_file(tmp_path, SITES), manifest(["control"] * 30, people, site=sites))
    assert task.left_out == ["island 1"]
    features = np.eye(2)[task.labels]
    prepared = prepare(task, features, folds=5, sizes=[], draws=1, seed=0)
    found = search_task(prepared, Probe(linear, [{"penalty": 1.0}]))
    assert site_leakage(task.labels, found.predicted) == 1.0


def test_a_fixed_test_set_needs_a_class_on_both_sides_only(tmp_path):
    sites = ["north"] * 8 + ["south"] * 2 + ["only trained"] * 5 + ["only tested"] * 5
    tested = [0, 1] * 4 + [0, 1] + [0] * 5 + [1] * 5
    task = load_task(
        task_file(tmp_path, SITES + "test: tested == 1\n"), manifest(["control"] * 20, site=sites, tested=tested)
    )
    assert task.classes == ["north", "south"]
    assert task.left_out == ["only tested 5", "only trained 5"]
    assert task.test.tolist() == [bool(value) for value in tested[:10]]


def test_too_few_sites_with_enough_people_are_refused_with_all_counts(tmp_path):
    sites = ["north"] * 8 + ["south"] * 2
    with pytest.raises(UserError, match=r"too few participants for 5 folds .*\(north 8, south 2\)"):
        load_task(task_file(tmp_path, SITES), manifest(["control"] * 10, site=sites))


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["a/scz.yaml", "b/scz.yaml"], "a/scz.yaml and b/scz.yaml have one name, 'scz'.*rename one of the files"),
        (["scz", "mine/scz.yaml"], "scz and mine/scz.yaml have one name"),
        (["a/age.yml", "a/age.yaml"], "a/age.yml and a/age.yaml have one name"),
        (["age", "site", "age"], "age and age have one name, 'age'.*name it once"),
    ],
)
def test_tasks_of_one_name_are_refused_before_anything_else(tasks, message, tmp_path):
    empty = SimpleNamespace(scans=pd.DataFrame(), root=str(tmp_path))
    settings = EvaluationSettings(tasks=tuple(tasks))
    with pytest.raises(UserError, match=message):
        _make_context(settings, empty, "sqlite:///none", "e", cache=None, storage=tmp_path)


@pytest.mark.parametrize("written", ["1", '"1"', '"1.0"', "1.0", '"01"'])
@pytest.mark.parametrize(
    "column", [[1.0, 0.0], [1, 0], ["1", "0"], ["1.0", "0.0"]], ids=["float", "int", "text", "decimal"]
)
def test_labels_compare_as_numbers_and_as_words(tmp_path, written, column):
    text = PLAIN.replace("[AD]", f"[{written}]").replace("[control]", "[0]")
    task = load_task(task_file(tmp_path, text), manifest(column * 20))
    assert task.labels.tolist() == [1, 0] * 20


def test_classes_that_are_numbers_are_named_as_they_are_written(tmp_path):
    path = task_file(tmp_path, "title: t\nkind: multiclass\nlabel: diagnosis\n")
    assert load_task(path, manifest([1.0, 2.0, 10.0, np.nan] * 10)).classes == ["1", "10", "2"]


@pytest.mark.parametrize("written", ["true", "yes", "null", "No"])
def test_yes_no_and_null_are_not_labels_until_they_are_quoted(tmp_path, written):
    with pytest.raises(UserError, match=r"mine.yaml: positive.0: .*quote the label, as in \['yes'\]") as refused:
        load_task(task_file(tmp_path, PLAIN.replace("[AD]", f"[{written}]")), manifest(["AD", "control"] * 10))
    assert "\n" not in str(refused.value)
    task = load_task(task_file(tmp_path, PLAIN.replace("[AD]", f"['{written}']")), manifest([written, "control"] * 10))
    assert task.labels.sum() == 10


def test_names_of_digits_in_one_column_are_two_labels(tmp_path):
    text = PLAIN.replace("[AD]", "['007']").replace("[control]", "['7']")
    assert load_task(task_file(tmp_path, text), manifest(["007", "7"] * 20)).labels.tolist() == [1, 0] * 20
    with pytest.raises(UserError, match="negative: '7' is also under positive"):
        load_task(task_file(tmp_path, text), manifest(["7", "8"] * 20))


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_a_regression_of_infinite_labels_is_refused(tmp_path, value):
    given = manifest(["control"] * 40, iq=[value, *range(39)])
    with pytest.raises(
        UserError, match="mine.yaml: label: 'iq' holds infinite values such as '-?inf'; regression needs"
    ):
        load_task(task_file(tmp_path, "title: t\nkind: regression\nlabel: iq\n"), given)


def test_controls_are_matched_by_numbers_only(tmp_path):
    with pytest.raises(
        UserError, match="mine.yaml: match.column: 'site' holds text such as 'site0'; controls are matched by"
    ):
        load_task(task_file(tmp_path, PLAIN + "match: {column: site}\n"), manifest(["AD", "control"] * 30))


@pytest.mark.parametrize("query", ["age + 1", "age", "'F'", "sex", "3"])
@pytest.mark.parametrize("key", ["query", "test"])
def test_a_query_that_is_no_condition_is_one_line(tmp_path, query, key):
    with pytest.raises(
        UserError, match=f"mine.yaml: {key}: .* does not work on scans.parquet: .*write a condition"
    ) as refused:
        load_task(task_file(tmp_path, PLAIN + f'{key}: "{query}"\n'), manifest(["AD", "control"] * 30))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("missing", [None, np.nan, ""], ids=["none", "nan", "empty"])
@pytest.mark.parametrize("family", [10234560.0, "F12"], ids=["number", "text"])
def test_a_participant_without_a_group_is_a_group_alone(tmp_path, missing, family):
    families = [family] * 4 + [missing] * 56
    given = manifest(["AD", "control"] * 30, family=pd.Series(families, dtype=object).infer_objects())
    task = load_task(task_file(tmp_path, PLAIN + "groups: family\n"), given)
    assert len(np.unique(task.groups)) == 57
    assert len(np.unique(task.groups[:4])) == 1


def test_a_scan_without_a_group_is_in_the_group_of_its_participant(tmp_path):
    people = [f"p{n // 2}" for n in range(60)]
    given = manifest(["AD", "AD", "control", "control"] * 15, people=people, family=["f", None] * 5 + [None] * 50)
    task = load_task(task_file(tmp_path, PLAIN + "groups: family\n"), given)
    assert len(np.unique(task.groups[:10])) == 1
    assert len(np.unique(task.groups)) == 26


def test_families_that_float_cannot_tell_apart_by_six_digits_stay_apart(tmp_path):
    given = manifest(["AD", "control"] * 30, family=[10234560.0 + n for n in range(60)])
    assert len(np.unique(load_task(task_file(tmp_path, PLAIN + "groups: family\n"), given).groups)) == 60
