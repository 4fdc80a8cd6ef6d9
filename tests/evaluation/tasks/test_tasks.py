"""Tasks select the scans that they say, with the spellings of the paper's cohorts; wrong ones name the file and the field."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from evaluation.tasks.columns import as_numbers
from evaluation.tasks.tasks import load_task
from infra.errors import UserError

SPELLINGS = {
    "scz": (["chronic schizophrenia", "SCZ", "Schizophrenia_Strict"], ["control", "No_Known_Disorder"]),
    "bd": (["bipolar disorder", "BD", "psychotic bipolar disorder"], ["HC", "control"]),
    "ad": (["AD", "Dementia"], ["CN", "control"]),
    "mci": (["EMCI", "LMCI", "MCI"], ["CN"]),
}


def manifest(diagnoses, people=None, **columns):
    """What a task reads of a manifest."""
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
def test_the_spellings_of_the_papers_cohorts(name):
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


def test_query_test_groups_strata_and_covariates(tmp_path):
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
    assert task.confounds.shape == (len(task.rows), 3)  # two of three sites, and tiv
    assert np.array_equal(
        task.groups[:-1] == task.groups[1:], (chosen["family"][:-1].values == chosen["family"][1:].values)
    )
    for code in np.unique(task.strata):
        assert chosen["site"][task.strata == code].nunique() == 1


def test_missing_numbers_stay_missing():
    scans = pd.DataFrame({"age": [1.0, np.nan], "site": ["a", None]})
    np.testing.assert_array_equal(as_numbers(scans, ["age", "site"]), [[1.0, 1.0], [np.nan, 0.0]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PLAIN.replace("label: diagnosis", "label: diagnosi"),
         r"mine.yaml: label: 'diagnosi' is no column of scans.parquet \(did you mean 'diagnosis'\?\)"),
        (PLAIN + "covariates: [aeg]\n", r"mine.yaml: covariates: 'aeg' is no column .*did you mean 'age'"),
        (PLAIN + "confounds: [diagnosis]\n", "mine.yaml: confounds: 'diagnosis' is the label itself"),
        (PLAIN + "query: agee > 3\n", "mine.yaml: query: 'agee > 3' does not work on scans.parquet: .*agee"),
        (PLAIN + "test: age >\n", "mine.yaml: test: 'age >' does not work"),
        (PLAIN + "test: age > 200\n", "mine.yaml: test: the test set has fewer than two classes or scans"),
        (PLAIN.replace("[AD]", "[]"), "mine.yaml: positive is empty; a binary task needs values"),
        (PLAIN.replace("[AD]", "[Control]"), "mine.yaml: negative: 'control' is also under positive"),
        (PLAIN.replace("binary", "binry"), "mine.yaml: kind: .*'binary', 'multiclass' or 'regression', found 'binry'$"),
        (PLAIN + "lable: x\n", r"mine.yaml: unknown key 'lable' \(did you mean 'label'\?\)"),
        (PLAIN.replace("binary", "regression"), "mine.yaml: label: 'diagnosis' holds text such as 'AD'; regression needs"),
        (PLAIN.replace("binary", "multiclass") + "match: {column: age}\n", "mine.yaml: match needs a task of kind binary"),
        (PLAIN + "splits: [nowhere]\n", "task mine: too few participants for 5 folds in splits nowhere of mine.yaml"),
    ],
)  # fmt: skip
def test_wrong_tasks_name_file_and_field(tmp_path, text, message):
    given = manifest(["AD", "control"] * 30)
    with pytest.raises(UserError, match=message) as refused:
        load_task(task_file(tmp_path, text), given)
    assert "\n" not in str(refused.value)


def test_groups_that_cut_a_participant_in_two_are_refused(tmp_path):
    given = manifest(["AD", "control"] * 30, people=[f"p{n // 4}" for n in range(60)])
    with pytest.raises(UserError, match=r"mine.yaml: groups: participant d/p\d+ has several values of 'sex'"):
        load_task(task_file(tmp_path, PLAIN + "groups: sex\n"), given)
    with pytest.raises(UserError, match="mine.yaml: test: 15 participants are in the training and in the test set"):
        load_task(task_file(tmp_path, PLAIN + "test: sex == 'F'\n"), given)


def test_a_file_that_is_not_there():
    with pytest.raises(UserError, match="task file none.yaml does not exist"):
        load_task("none.yaml", manifest(["AD", "control"]))
