"""The images of the tested environment: Containerfile and Apptainer's definition install the same; the image's Python in jobs.

Neither image is built here: no registry of images can be reached, and Debian has no package of Apptainer.
"""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.runs import ROOT

LAUNCH = ROOT / "infra" / "launch"
CONTAINERFILE = (LAUNCH / "Containerfile").read_text()
DEFINITION = (LAUNCH / "yaware.def").read_text()
WRAPPER = LAUNCH / "apptainer_python.sh"


def sections():
    """Return the sections of the definition: name -> lines without comments."""
    parts = re.split(r"^%(\w+)\n", DEFINITION, flags=re.MULTILINE)
    return {
        name: [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
        for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def debian_packages(text):
    (found,) = re.findall(r"apt-get install -y --no-install-recommends (.*)", text)
    return sorted(found.rstrip("\\").split())


def test_both_images_start_from_the_same_system_with_the_same_packages():
    assert re.findall(r"^From: (.*)$", DEFINITION, re.MULTILINE) == re.findall(
        r"^FROM (.*)$", CONTAINERFILE, re.MULTILINE
    )
    assert debian_packages(DEFINITION) == debian_packages(CONTAINERFILE)
    (pip,) = [line for line in sections()["post"] if "pip install" in line]
    assert pip in CONTAINERFILE


def test_both_images_get_the_same_files_and_all_exist():
    copied = [line.split() for line in re.findall(r"^COPY (.*)$", CONTAINERFILE, re.MULTILINE)]
    in_container = {source for *sources, _ in copied for source in sources}
    files = [line.split() for line in sections()["files"]]
    assert {source for source, _ in files} == in_container
    assert all(target == f"/opt/yaware/{source}" for source, target in files)
    assert all((ROOT / source).exists() for source, _ in files)


def test_the_definition_has_sections_that_the_shell_accepts_and_an_environment_that_a_read_only_image_can_use():
    found = sections()
    assert set(found) == {"files", "post", "environment", "runscript", "test", "labels", "help"}
    for name in ("post", "environment", "runscript", "test"):
        subprocess.run(["sh", "-n", "-c", "\n".join(found[name])], check=True)
    script = "\n".join([*found["environment"], 'echo "$TORCH_EXTENSIONS_DIR"'])
    for given, expected in ({"HOME": "/home/a"}, "/home/a/.cache/"), ({"TORCH_EXTENSIONS_DIR": "/scratch"}, "/scratch"):
        done = subprocess.run(["sh", "-c", script], env={"PATH": "/bin", **given}, capture_output=True, text=True)
        assert done.stdout.startswith(expected)


def test_the_tests_of_the_image_are_commands_of_this_checkout():
    import contextlib
    import io

    from infra import cli

    commands = [line.split()[1:] for line in sections()["test"] if line.startswith("yaware ")]
    assert ["--version"] in commands
    assert len(commands) == 2
    for command in commands:
        if command[0] == "plan":
            from pretrain.config import load_recipe

            assert load_recipe(command[command.index("--config") + 1], []).batch.global_
        else:
            with contextlib.redirect_stdout(io.StringIO()):
                assert cli.run(command) == 0


@pytest.fixture
def fake(tmp_path):
    """A folder with a program ``apptainer`` that prints its arguments, and an image."""
    program = tmp_path / "bin/apptainer"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    (tmp_path / "yaware.sif").touch()
    return tmp_path


def wrapped(folder, *arguments, **variables):
    given = {"PATH": f"{folder}/bin:/usr/bin:/bin", **variables}
    return subprocess.run([WRAPPER, *arguments], cwd=folder, env=given, capture_output=True, text=True)


def test_a_job_runs_the_python_of_the_image_with_gpus_and_bound_folders(fake):
    done = wrapped(
        fake, "-m", "pretrain.train", "a b", YAWARE_IMAGE=str(fake / "yaware.sif"), YAWARE_BIND="/data,/scratch"
    )
    assert done.stdout.splitlines() == [
        "exec", "--nv", "--pwd", str(fake), "--bind", f"{fake},/data,/scratch", str(fake / "yaware.sif"),
        "/opt/yaware/.venv/bin/python", "-m", "pretrain.train", "a b",
    ]  # fmt: skip
    assert f"--bind\n{fake}\n" in wrapped(fake, YAWARE_IMAGE=str(fake / "yaware.sif")).stdout


def test_a_missing_image_is_named(fake):
    assert "set YAWARE_IMAGE" in wrapped(fake).stderr
    done = wrapped(fake, YAWARE_IMAGE=str(fake / "none.sif"))
    assert done.returncode == 2
    assert f"YAWARE_IMAGE={fake}/none.sif is missing on " in done.stderr
    assert done.stderr.count("\n") == 1
