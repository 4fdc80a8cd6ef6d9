"""`shards info` counts correctly, without the heavy libraries, also for a million scans."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from data_pipeline.shards.append import append_shards
from data_pipeline.shards.build import build_shards
from data_pipeline.shards.info import shards_info
from infra import cli
from infra.errors import UserError
from tests.benchmarks.bench_shards import write_large_manifest
from tests.cohorts import write_cohort


def test_counts_are_those_of_the_scan_table(manifest):
    info, scans = shards_info(manifest.root), manifest.scans
    assert (info["scans"], info["participants"], info["digest"]) == (48, 24, manifest.digest)
    assert info["shards"]["count"] == 5
    assert info["shards"]["bytes"] == sum((manifest.root / row["name"]).stat().st_size for row in manifest.shards)
    for name in ("dataset", "site", "sex", "split", "diagnosis"):
        assert info["counts"][name] == scans[name].value_counts().to_dict()
    people = scans.drop_duplicates("participant_id")["split"].value_counts().to_dict()
    assert info["splits"] == {
        name: {"scans": int(count), "participants": people[name]}
        for name, count in scans["split"].value_counts().items()
    }
    assert info["age"]["mean"] == pytest.approx(scans["age"].mean())
    assert info["age"]["sd"] == pytest.approx(scans["age"].std())
    assert sum(info["age"]["decades"].values()) == 48
    assert info["age"]["decades"]["20-29"] == int(((scans["age"] >= 20) & (scans["age"] < 30)).sum())


def test_missing_values_and_a_second_data_set_are_counted(tmp_path):
    cohort = write_cohort(tmp_path / "cohort", participants=6)
    table = cohort / "participants.tsv"
    table.write_text(table.read_text().replace("\t20.0\tF\tsite0\tcontrol\t", "\tn/a\tn/a\tn/a\tn/a\t", 1))
    build_shards(cohort, tmp_path / "shards")
    append_shards(write_cohort(tmp_path / "more", participants=6, seed=1), tmp_path / "shards")
    info = shards_info(tmp_path / "shards")
    assert (info["scans"], info["participants"]) == (12, 12), "sub-000 of two data sets counts as two participants"
    assert info["age"]["missing"] == 1
    assert all(info["counts"][name]["missing"] == 1 for name in ("sex", "site", "diagnosis"))
    assert info["appended"] == [{"dataset": "more", "scans": 6}]


def test_a_data_set_without_ages_is_summarised(tmp_path, capsys):
    cohort = write_cohort(tmp_path / "cohort", participants=2)
    lines = ["participant_id\tage\tsite", "sub-000\tn/a\tn/a", "sub-001\tn/a\tn/a"]
    (cohort / "participants.tsv").write_text("\n".join(lines) + "\n")
    build_shards(cohort, tmp_path / "shards")
    assert cli.run(["shards", "info", str(tmp_path / "shards")]) == 0
    printed = capsys.readouterr().out
    assert "2 missing" in printed
    assert "0: missing 2" in printed


def test_the_command_prints_as_json_what_the_function_returns(manifest, capsys):
    assert cli.run(["shards", "info", "--json", str(manifest.root)]) == 0
    assert json.loads(capsys.readouterr().out) == shards_info(manifest.root)


def test_an_edited_table_is_rejected(manifest, tmp_path):
    shutil.copytree(manifest.root, tmp_path / "shards")
    content = bytearray((tmp_path / "shards" / "scans.parquet").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "shards" / "scans.parquet").write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"scans.parquet is missing or differs from manifest.json"):
        shards_info(tmp_path / "shards")


def test_no_heavy_library_is_imported(manifest):
    code = (
        "import sys; from infra import cli; cli.run(['shards', 'info', sys.argv[1]]); "
        "print([m for m in ('pandas', 'nibabel', 'scipy', 'torch', 'webdataset', 'ray') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code, str(manifest.root)], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "[]"


def test_large_manifests_agree_with_pandas(tmp_path):
    write_large_manifest(tmp_path, scans=30_000)
    info = shards_info(tmp_path)
    scans = pd.read_parquet(tmp_path / "scans.parquet")
    people = scans["dataset"] + "/" + scans["participant_id"]
    assert info["participants"] == people.nunique()
    assert {name: split["participants"] for name, split in info["splits"].items()} == people.groupby(
        scans["split"]
    ).nunique().to_dict()
    assert info["age"]["missing"] == int(scans["age"].isna().sum())
    assert info["age"]["mean"] == pytest.approx(float(np.nanmean(scans["age"])))


@pytest.mark.slow
def test_a_million_scans_are_summarised(tmp_path):
    # The benchmark measures the time (bench_shards: 0.6 s).
    write_large_manifest(tmp_path, scans=1_000_000)
    command = [sys.executable, "-m", "infra.cli", "shards", "info", str(tmp_path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "1000000" in printed.replace(",", ""), printed
