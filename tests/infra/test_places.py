"""Where files may be written: a chosen folder, the user's cache, the temporary folder; on machines unlike the developer's."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from infra.errors import UserError
from infra.files import SHORT, lock, locked_file, short_temporary_folder, writable_folder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Make XDG_CACHE_HOME, HOME and TMPDIR folders of this test; return their parent."""
    for name, variable in (("xdg", "XDG_CACHE_HOME"), ("home", "HOME"), ("tmp", "TMPDIR")):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / name))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def block(folder: Path) -> None:
    """Let nothing be written below a folder, by root neither."""
    folder.rmdir()
    folder.write_text("a file is here")


def test_the_order_of_the_places(places):
    chosen = places / "chosen"
    assert writable_folder("x", chosen, "--storage") == chosen
    assert writable_folder("x") == places / "xdg/yaware/x"
    (places / "xdg/yaware/x").rmdir()
    (places / "xdg/yaware").rmdir()
    block(places / "xdg")
    assert writable_folder("x") == places / "home/.cache/yaware/x"
    for folder in ("home/.cache/yaware/x", "home/.cache/yaware", "home/.cache"):
        (places / folder).rmdir()
    block(places / "home")
    own = places / "tmp" / f"yaware-{os.getuid()}"
    assert writable_folder("x") == own / "x"
    assert own.stat().st_mode & 0o777 == 0o700


def test_no_place_at_all_is_one_line(places):
    block(places / "xdg")
    block(places / "home")
    (places / "tmp" / f"yaware-{os.getuid()}").symlink_to(places)  # somebody else's: it is not used
    with pytest.raises(UserError, match="no folder can be written for x .*give --storage, or set XDG_CACHE_HOME"):
        writable_folder("x", option="--storage")


def test_a_chosen_place_that_cannot_be_written_is_named(places):
    block(places / "xdg")
    with pytest.raises(
        UserError, match=r"--storage=.*xdg/deep cannot be written \(Not a directory\); choose another folder"
    ):
        writable_folder("x", places / "xdg" / "deep", "--storage")


def test_programs_are_not_put_where_they_cannot_run(places):
    block(places / "xdg")
    block(places / "home")
    mount = f"mount --bind {places}/tmp {places}/tmp && mount -o remount,bind,noexec {places}/tmp"
    own = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    inside = ["unshare", *own, "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh"]
    if subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("no right to mount")
    code = (
        "from infra.files import writable_folder; import sys; print(writable_folder('x'), writable_folder('x', programs=True));"
        "writable_folder('x', sys.argv[1], 'TORCH_EXTENSIONS_DIR', programs=True)"
    )
    names = ("XDG_CACHE_HOME", "HOME", "TMPDIR")
    done = subprocess.run(
        [*inside, sys.executable, "-c", code, places / "tmp" / "chosen"], capture_output=True, text=True,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)} | {name: os.environ[name] for name in names},
    )  # fmt: skip
    name = f"yaware-{os.geteuid()}/x"
    assert done.stdout.split() == [f"{places}/tmp/{name}", f"/tmp/{name}"]
    assert (
        "chosen cannot be used (mounted with noexec, programs in it cannot run); choose another folder" in done.stderr
    )
    Path(f"/tmp/{name}").rmdir()


def test_sockets_get_a_short_folder(places):
    assert len(str(places / "tmp")) > SHORT
    assert short_temporary_folder("RAY_TMPDIR") in (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path, monkeypatch, number):
    def no_locks(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locked_file(tmp_path / "lock"):
        pass
    with (tmp_path / "lock").open() as stream:
        assert not lock(stream, wait=False)


def test_a_lock_that_another_process_holds(tmp_path):
    with locked_file(tmp_path / "lock"), (tmp_path / "lock").open() as stream, pytest.raises(BlockingIOError):
        lock(stream, wait=False)


def run(code: str, variables: dict[str, str], *before: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        [*before, sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600
    )


AS_A_NUMBER = ("unshare", "--user", "--map-user=12345", "--map-group=12345")


def test_a_user_without_name_and_home(tmp_path):
    if subprocess.run([*AS_A_NUMBER, "true"], capture_output=True).returncode:
        pytest.skip("no right to make a user namespace")
    code = (
        "import infra, getpass, pathlib; print(getpass.getuser(), pathlib.Path.home());"
        "from infra.files import writable_folder; print(writable_folder('x'))"
    )
    done = run(code, {"TMPDIR": str(tmp_path)}, *AS_A_NUMBER)
    home = tmp_path / "yaware-12345"
    assert done.stdout.split() == ["user12345", str(home), str(home / ".cache/yaware/x")], done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_a_console_that_is_no_utf8(encoding):
    code = "from infra.cli import print_any_text; print_any_text(); print('80 ± 3 — Größe 日本 ≤ 5')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"80" in done.stdout
    assert b"?" in done.stdout
