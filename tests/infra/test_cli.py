"""The command ``yaware``: help texts, error lines and exit statuses."""

from __future__ import annotations

import pytest

from infra import cli


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
