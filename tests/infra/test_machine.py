"""System metrics and git tags."""

from __future__ import annotations

import os
import subprocess

from infra import machine


def test_system_metrics_have_mlflows_names(tmp_path):
    metrics = machine.system_metrics(tmp_path)
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= metrics.keys()
    assert 0 < metrics["system/system_memory_usage_percentage"] < 100
    free = os.statvfs(tmp_path)
    assert 0 <= metrics["system/disk_available_megabytes"] <= free.f_bfree * free.f_frsize / 1e6 + 1000
    assert 0.01 < machine.memory_gb() < 1000
    assert "system/disk_available_megabytes" not in machine.system_metrics(tmp_path / "nowhere")


def test_git_tags_hold_the_commit_and_whether_files_differ_from_it(tmp_path, monkeypatch):
    def git(*arguments):
        author = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *author, *arguments], check=True, capture_output=True)

    file = tmp_path / "infra" / "machine.py"
    file.parent.mkdir()
    file.write_text("x = 1\n")
    monkeypatch.setattr(machine, "__file__", str(file))
    assert machine.git_tags(tmp_path) == {}
    git("init")
    assert machine.git_tags(tmp_path) == {}
    git("add", ".")
    git("commit", "-m", "first")
    clean = machine.git_tags(tmp_path)
    assert clean["yaware.git_dirty"] == "false"
    assert len(clean["mlflow.source.git.commit"]) == 40
    file.write_text("x = 2\n")
    assert machine.git_tags(tmp_path) == {**clean, "yaware.git_dirty": "true"}
    # This package may be installed in a virtual environment inside another project's checkout.
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "untracked.py"))
    assert machine.git_tags(tmp_path) == {}
