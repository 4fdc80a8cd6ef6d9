"""Declarations of a data set determine its values; nothing is guessed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.cohort.read import is_simulated, read_cohort
from infra.errors import UserError
from tests.cohorts import write_cohort
from tests.data_pipeline.cohort.test_cohort import bids, cat12, image, table


def read_table(tmp_path: Path, head: str, *rows: str, declare: str = "", **options):
    """The scans of a CSV with one row per participant, read with the declarations of a --columns file."""
    lines = [f"path,participant_id,{head}", *(f"{n}.nii,{n},{row}" for n, row in enumerate(rows))]
    path = table(tmp_path / "people.csv", *lines)
    if declare:
        (tmp_path / "columns.yaml").write_text(declare)
        options["columns"] = tmp_path / "columns.yaml"
    return read_cohort(path, **options)[0]


def refusal(tmp_path: Path, head: str, *rows: str, declare: str = "") -> str:
    with pytest.raises(UserError) as error:
        read_table(tmp_path, head, *rows, declare=declare)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("texts", "sexes"), [(("F", "m"), "FM"), (("female", "MALE"), "FM"), (("Other", "n/a"), ["O", ""])]
)
def test_sex_in_words_needs_no_rule(tmp_path, texts, sexes):
    assert [scan.sex for scan in read_table(tmp_path, "sex", *texts)] == list(sexes)


@pytest.mark.parametrize("codes", [("0", "1"), ("1", "2"), ("0.0", "1.0")])
def test_sex_as_a_code_is_refused_until_it_is_declared(tmp_path, codes):
    text = refusal(tmp_path, "sex", *codes)
    assert f"people.csv line 2: sex='{codes[0]}' is a code without a declared meaning" in text
    assert "`values: {sex: {0: M, 1: F}}`, in a YAML file given with --columns" in text
    first, second = (str(int(float(code))) for code in codes)
    scans = read_table(tmp_path, "sex", *codes, declare=f"values: {{sex: {{{first}: M, {second}: F}}}}")
    assert [scan.sex for scan in scans] == ["M", "F"]


@pytest.mark.parametrize(
    "declare", ["values: {sex: {1: M, 2: F, 9: n/a, only: true}}", "only: true\nvalues: {sex: {1: M, 2: F, 9: n/a}}"]
)
def test_with_only_a_value_without_a_rule_is_refused_and_one_may_mean_missing(tmp_path, declare):
    assert [scan.sex for scan in read_table(tmp_path, "sex", "2", "9", declare=declare)] == ["F", ""]
    assert "line 3: sex='3' has no rule in values.sex of" in refusal(tmp_path, "sex", "2", "3", declare=declare)


def test_999_is_missing_only_if_declared(tmp_path):
    text = refusal(tmp_path, "age", "30", "999")
    assert "line 3: age='999' is not a number of years in 0..130" in text
    assert "`missing: {age: [999]}`" in text
    rows = ("30,999", "999.0,12", "-9,-9")
    declared_for_age = read_table(tmp_path, "age,iq", *rows, declare="missing: {age: [999, -9]}")
    assert np.isnan([scan.age for scan in declared_for_age]).tolist() == [False, True, True]
    assert [scan.extra["iq"] for scan in declared_for_age] == [999.0, 12.0, -9.0]  # not declared for this column
    declared_for_all = read_table(tmp_path, "age,iq", *rows, declare="missing: [999, -9]")
    assert [scan.extra["iq"] for scan in declared_for_all] == [None, 12.0, None]
    both = read_table(tmp_path, "age,iq", *rows, declare="missing: {all: [-9], age: [999]}")
    assert [scan.extra["iq"] for scan in both] == [999.0, 12.0, None]


def test_only_declared_columns_are_read_under_their_new_names(tmp_path):
    declare = "columns: {age: AGE_Y, tiv: ICV}\nvalues: {site: guys}"
    scans = read_table(tmp_path, "AGE_Y,ICV,name,site", "20,1400,Doe,3", "30,1500,Roe,4", declare=declare)
    assert [(s.age, s.site, s.extra) for s in scans] == [(20, "guys", {"tiv": 1400.0}), (30, "guys", {"tiv": 1500.0})]


def test_a_constant_replaces_a_column(tmp_path):
    scans = read_table(tmp_path, "sex,tesla,site", "0,x,a", "1,y,b", declare="values: {sex: F, tesla: 3, site: n/a}")
    assert [(scan.sex, scan.extra, scan.site) for scan in scans] == [("F", {"tesla": 3.0}, "")] * 2


def test_the_columns_of_ids_and_paths_can_be_declared(tmp_path):
    image(tmp_path / "x.nii")
    path = table(tmp_path / "list.tsv", "file | IXI_ID | visit | AGE", "x.nii | 7 | b | 20")
    (tmp_path / "c.yaml").write_text("columns: {path: file, participant_id: IXI_ID, session: visit, age: AGE}")
    (scan,), _ = read_cohort(path, columns=tmp_path / "c.yaml")
    assert (scan.key, scan.age, scan.extra, scan.path) == ("list_sub-7_ses-b", 20, {}, tmp_path / "x.nii")


def test_age_is_computed_from_dates_that_are_not_kept(tmp_path):
    declare = "age: {birth: born, scan: scanned}"
    scans = read_table(
        tmp_path, "born,scanned", "1980-02-29,2010-03-01", "n/a,2010-03-01", "2000-01-01,2000-01-01", declare=declare
    )
    assert scans[0].age == pytest.approx(30.0, abs=0.01)
    assert np.isnan(scans[1].age)
    assert scans[2].age == 0.0
    assert [scan.extra for scan in scans] == [{}] * 3
    text = refusal(tmp_path, "born,scanned", "3/2/1980,2010-03-01", declare=declare)
    assert "line 2: born='3/2/1980' is not a date of the form %Y-%m-%d; declare its format in" in text
    with_format = "age: {birth: born, scan: scanned, format: '%d/%m/%Y'}"
    (scan,) = read_table(tmp_path, "born,scanned", "03/02/1980,03/08/2010", declare=with_format)
    assert scan.age == pytest.approx(30.5, abs=0.01)
    zeros = declare + "\nmissing: {age: [0000-00-00]}"
    assert np.isnan(read_table(tmp_path, "born,scanned", "0000-00-00,2010-01-01", declare=zeros)[0].age)
    text = refusal(tmp_path, "born,scanned", "2010-01-01,2009-01-01", declare=declare)
    assert "line 2: age from dates='-1.00' is not a number of years" in text


@pytest.mark.parametrize(
    ("declare", "text"),
    [
        ("colums: {age: x}", "unknown key 'colums' (did you mean 'columns'?); allowed here:"),
        ("columns: {age: agee}", "age: no table of people has a column 'agee' (did you mean 'age'?); found: "),
        ("columns: {key: age}", "columns.key: the manifest itself has a column of this name; choose another"),
        ("columns: [age]", "columns must map names to names, found ['age']"),
        ("values: {sx: {0: M}}", "values.sx: people has no column 'sx' (did you mean 'sex'?); found: age, sex"),
        ("missing: {aeg: [999]}", "missing.aeg: people has no column 'aeg' (did you mean 'age'?); found: age, sex"),
        ("missing: 999", "missing.all must be a list of values"),
        ("age: {birth: b}", "age needs both columns, as in `age: {birth: birth_date, scan: scan_date}`"),
        ("age: {brith: b, scan: s}", "age: unknown key 'brith' (did you mean 'birth'?)"),
        ("orientation: RAR", "orientation='RAR' is not an orientation such as RAS"),
        ("values: {sex: {0: M}, sex: {0: F}}", "key 'sex' appears twice"),
        ("values: {participant_id: x}", "values.participant_id must be a constant or map"),
        ("- a", "must hold keys and values, found list"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_a_wrong_declaration_is_one_clear_line(tmp_path, declare, text):
    message = refusal(tmp_path, "age,sex", "20,F", declare=declare)
    assert text in message
    assert "columns.yaml" in message


def datasets(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "all.yaml"
    path.write_text(text)
    return path


def test_each_data_set_of_a_list_has_its_own_layout_and_rules(tmp_path):
    bids(tmp_path / "raw" / "ds")
    cat12(tmp_path / "cat")
    table(tmp_path / "list.csv", "path,participant_id,age,sex,iq", "cat/mri/mwp1sub-03_T1w.nii,01,999,0,high")
    path = datasets(tmp_path, """
datasets:
  - {path: raw/ds, name: raw}
  - path: cat
    name: cat.12
    layout: cat12
    columns: {age: age, tiv: tiv}
    values: {site: mainz}
  - path: list.csv
    values: {sex: {0: M, 1: F}, site: {}}
    missing: {age: [999]}
""".replace(", site: {}", ""))  # fmt: skip
    scans, unlisted = read_cohort(path)
    assert [scan.key for scan in scans] == [
        "cat-12_sub-01_ses-2", "cat-12_sub-03_ses-1", "cat-12_sub-IXI002_ses-1", "list_sub-01_ses-1", "raw_sub-01_ses-1",
    ]  # fmt: skip
    assert [scan.site for scan in scans] == ["mainz"] * 3 + ["", ""]
    assert [scan.sex for scan in scans] == ["", "", "", "M", "F"]
    assert [scan.dataset for scan in unlisted] == ["cat-12"]
    # A column that is text in one data set and numeric in another is text in both.
    assert [scans[3].extra["iq"], scans[4].extra["iq"]] == ["high", "101"]
    assert not is_simulated(path)
    (tmp_path / "cat" / "dataset_description.json").write_text('{"Simulated": true}')
    assert is_simulated(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("datasets: [{path: raw/ds}, {path: raw/ds}]", "2 data sets have the name 'ds'; give each its own with name:"),
        ("datasets: [{path: raw/ds, nmae: x}]", "datasets[0]: unknown key 'nmae' (did you mean 'name'?)"),
        ("dataset: [{path: raw/ds}]", "unknown key 'dataset' (did you mean 'datasets'?)"),
        ("datasets: [{name: x}]", "datasets[0]: path is missing"),
        ("datasets: []", "datasets must be a list of data sets"),
        ("datasets: [{path: raw/ds}, {path: raw, layout: bisd}]", "layout='bisd' is not known (did you mean 'bids'?)"),
        ("datasets: [{path: nowhere}]", "nowhere is not a folder"),
    ],
)
def test_a_wrong_list_of_data_sets_is_one_clear_line(tmp_path, text, expected):
    bids(tmp_path / "raw" / "ds")
    with pytest.raises(UserError) as error:
        read_cohort(datasets(tmp_path, text), modality="t1w")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("cell", "rule"),
    [("sex\t1", "sex: {0: M, 1: F}"), ("age\t89+", "cap: {age: 89}"), ("age\t999", "missing: {age: [999]}")],
)
def test_a_list_of_data_sets_is_told_to_declare_in_its_own_file(tmp_path, cell, rule):
    """``--columns`` is refused for a list."""
    write_cohort(tmp_path / "raw", participants=1)
    (tmp_path / "raw" / "participants.tsv").write_text(
        "\n".join(f"{who}\t{text}" for who, text in zip(("participant_id", "sub-000"), cell.split("\t"), strict=True))
    )
    path = datasets(tmp_path, "datasets: [{path: raw}]")
    with pytest.raises(UserError) as error:
        read_cohort(path)
    assert rule in str(error.value)
    assert f"in {path}: datasets[0]" in str(error.value)
    assert "--columns" not in str(error.value)


def test_dates_that_give_no_age_are_not_to_be_declared_missing_by_the_age(tmp_path):
    text = refusal(tmp_path, "born,scanned", "2020-01-01,2019-01-01", declare="age: {birth: born, scan: scanned}")
    assert "age from dates='-1.00' is not a number of years in 0..130; correct the dates" in text
    assert "missing" not in text


def test_a_folder_without_such_scans_is_told_so(tmp_path):
    write_cohort(tmp_path / "raw", participants=1)
    with pytest.raises(UserError, match=r"no file is named .*; check the folder, --layout and --modality"):
        read_cohort(tmp_path / "raw", modality="quasiraw", layout="bids")


def test_options_for_one_data_set_are_refused_for_a_list(tmp_path):
    path = datasets(tmp_path, "datasets: [{path: x}]")
    for options in ({"layout": "bids"}, {"dataset": "x"}, {"columns": path}):
        with pytest.raises(UserError, match="lists data sets; declare it there for each data set"):
            read_cohort(path, **options)


def test_the_participants_table_can_be_declared(tmp_path):
    root = bids(tmp_path / "ds")
    (root / "participants.tsv").rename(tmp_path / "people.tsv")
    (tmp_path / "c.yaml").write_text("participants: people.tsv")
    assert len(read_cohort(root, modality="t1w", columns=tmp_path / "c.yaml")[0]) == 4


def test_scans_have_the_declared_orientation_of_arrays(tmp_path):
    (scan,) = read_table(tmp_path, "age", "20", declare="orientation: lps")
    assert scan.orientation == "LPS"


def documented_examples() -> list[str]:
    """The indented examples of docs/cohorts.md."""
    lines = (Path(__file__).resolve().parents[3] / "docs" / "cohorts.md").read_text().splitlines()
    text = "\n".join(line[4:] if line.startswith("    ") else "\0" for line in lines)
    return [block.strip() for block in text.split("\0") if block.strip()]


def test_the_examples_of_the_documentation_work(tmp_path):
    columns, dates, several = (
        next(b for b in documented_examples() if b.startswith(k)) for k in ("columns:", "age:", "datasets:")
    )
    root = bids(tmp_path / "ds")
    (root / "participants.tsv").unlink()
    table(
        tmp_path / "people.tsv",
        "participant_id | AGE_Y | GENDER | ICV | name",
        "01 | 30 | 2 | 1400 | X",
        "02 | -9 | 9 | . | Y",
    )
    (tmp_path / "c.yaml").write_text(columns)
    scans, _ = read_cohort(root, modality="t1w", columns=tmp_path / "c.yaml")
    assert {(s.sex, s.site, s.extra["tiv"], s.orientation) for s in scans} == {
        ("F", "kiel", 1400.0, "RAS"), ("", "kiel", None, "RAS"),
    }  # fmt: skip
    (scan,) = read_table(tmp_path, "birth_date,scan_date", "01/02/1980,01/02/2000", declare=dates)
    assert scan.age == 20.0
    cat12(tmp_path / "ixi")
    table(tmp_path / "ixi" / "participants.tsv", "participant_id | AGE | SEX", "01 | 30 | 1", "IXI002 | 40 | 2")
    image(tmp_path / "ds000001" / "sub-1" / "anat" / "sub-1_desc-mwp1_probseg.nii")
    table(tmp_path / "ds000001" / "participants.tsv", "participant_id | age", "1 | 30")
    table(tmp_path / "clinic.csv", "path,participant_id,age", "x.nii,1,999")
    text = several.replace("/data/ixi", "ixi").replace("../openneuro/ds000001", "ds000001")
    scans, _ = read_cohort(datasets(tmp_path, text))
    assert [(scan.dataset, scan.sex) for scan in scans] == [("clinic", ""), ("ds1", ""), ("ixi", "M"), ("ixi", "F")]
