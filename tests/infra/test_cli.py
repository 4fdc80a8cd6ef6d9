"""The command ``yaware``: help texts, error lines, exit statuses, and ``yaware doctor``."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from infra import cli, doctor


def test_help_lists_every_command(capsys):
    assert cli.run(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in cli.SUBCOMMANDS)


def test_no_command_prints_the_usage_with_status_2(capsys):
    assert cli.run([]) == 2
    assert "usage" in capsys.readouterr().out


def test_an_unknown_command_names_the_closest_one(capsys):
    assert cli.run(["pretrian"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("yaware: error: unknown command 'pretrian' (did you mean 'pretrain'?)")
    assert printed.count("\n") == 1


@pytest.mark.parametrize("name", sorted(cli.SUBCOMMANDS))
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.run([name, "--help"])
    assert stopped.value.code == 0
    assert f"yaware {name}" in capsys.readouterr().out


@pytest.fixture
def free_gib(monkeypatch):
    """Set the free disk space that the doctor sees."""

    def set_free(gib):
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=gib * 2**30))

    return set_free


def test_doctor_passes_on_a_machine_that_is_set_up(free_gib, capsys):
    free_gib(6)
    assert cli.run(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["ok", name] for name in ("python", "compiler", "packages", "collectives", "devices", "disk")
    ]
    assert "deepspeed" in lines[2]


@pytest.mark.parametrize("missing", ["g++", "ninja"])
def test_doctor_fails_and_names_a_missing_compiler_tool(missing, free_gib, monkeypatch, capsys):
    free_gib(6)
    monkeypatch.setattr(doctor.shutil, "which", lambda tool: None if tool == missing else tool)
    assert cli.run(["doctor"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert failed == [f"FAIL compiler     missing: {missing}"]


def test_doctor_fails_and_names_a_missing_package(free_gib, monkeypatch, capsys):
    free_gib(6)
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    assert cli.run(["doctor"]) == 1
    assert "FAIL packages     missing: no-such-package; run `make setup`" in capsys.readouterr().out


def test_doctor_fails_on_a_full_disk(free_gib, capsys):
    free_gib(4)
    assert cli.run(["doctor"]) == 1
    assert "FAIL disk         4 GiB free here; at least 5 GiB are needed" in capsys.readouterr().out
