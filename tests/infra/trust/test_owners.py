"""Folders that others may write to, or own, are refused before anything in them is read."""

from __future__ import annotations

import os

import pytest

from infra.errors import UserError
from infra.trust.owners import foreign_owner, own_folder, user_name

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
OTHER = 65533


@pytest.fixture
def folder(tmp_path):
    made = own_folder(tmp_path / "a" / "storage")
    (made / "grid").mkdir()
    (made / "grid" / "0.npz").write_bytes(b"x")
    return made


def test_a_new_folder_is_private_and_is_accepted_again(folder):
    assert folder.stat().st_mode & 0o777 == 0o700
    assert own_folder(folder) == folder
    assert foreign_owner(folder) is None


def test_what_ray_made_group_writable_inside_a_private_folder_is_accepted(folder):
    (folder / "grid").chmod(0o775)
    assert own_folder(folder) == folder


@pytest.mark.parametrize("mode", [0o777, 0o720, 0o702, 0o1777])
def test_a_folder_that_others_may_write_to_is_refused(folder, mode):
    folder.chmod(mode)
    with pytest.raises(UserError, match=rf"storage has mode {mode:o}: others may write to it; .* chmod go-w"):
        own_folder(folder)


def test_an_open_folder_inside_a_readable_one_is_refused(folder):
    folder.chmod(0o755)
    (folder / "grid").chmod(0o777)
    with pytest.raises(UserError, match="grid has mode 777"):
        own_folder(folder)


def test_a_folder_that_everybody_may_replace_is_refused(folder):
    folder.parent.chmod(0o777)
    with pytest.raises(UserError, match=r"is below .*/a, where everybody may write and rename"):
        own_folder(folder)
    folder.parent.chmod(0o1777)  # as /tmp: only owners rename
    assert own_folder(folder) == folder


@needs_root
@pytest.mark.parametrize("entry", [".", "grid", "grid/0.npz"])
def test_what_another_user_owns_is_refused(folder, entry):
    os.chown(folder / entry, OTHER, OTHER)
    with pytest.raises(UserError, match=rf"belongs to {user_name(OTHER)}, not to {user_name(0)}"):
        own_folder(folder)
    assert foreign_owner(folder) == f"{folder / entry} belongs to {user_name(OTHER)}"


@needs_root
def test_a_link_to_a_file_of_another_user_is_seen(folder, tmp_path):
    (tmp_path / "theirs").write_bytes(b"x")
    os.chown(tmp_path / "theirs", OTHER, OTHER)
    (folder / "link").symlink_to(tmp_path / "theirs")
    assert foreign_owner(folder) == f"{folder / 'link'} belongs to {user_name(OTHER)}"
