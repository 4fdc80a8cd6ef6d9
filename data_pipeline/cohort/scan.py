"""The record of one scan, shared by all stages."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.errors import UserError


@dataclass(frozen=True)
class Scan:
    """One image of one participant.

    Attributes:
        path: the image's file.
        dataset: name of the data set.
        participant_id: without ``sub-``.
        session: without ``ses-``.
        run: without ``run-``; empty if there is only one.
        site: empty if missing.
        age: in years; NaN if missing.
        sex: ``F``, ``M``, ``O`` or empty.
        extra: the other columns of the participants' table: numbers as float, text as str, None if missing.
        orientation: declared orientation of an .npy array, for example ``LAS``; empty for that of its known grid.
        shown_as: the name of the file in reports if ids are pseudonyms.
        unlisted: why no table lists the scan; empty if one does, or if none lists its participant.
    """

    path: Path
    dataset: str
    participant_id: str
    session: str = "1"
    run: str = ""
    site: str = ""
    age: float = float("nan")
    sex: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    orientation: str = ""
    shown_as: str = ""
    unlisted: str = field(default="", repr=False)

    @property
    def key(self) -> str:
        """``<dataset>_sub-<id>_ses-<id>[_run-<n>]``, without dots, because WebDataset cuts names at a dot."""
        run = f"_run-{self.run}" if self.run else ""
        return safe_name(f"{self.dataset}_sub-{self.participant_id}_ses-{self.session}{run}")

    @property
    def reported_path(self) -> str:
        """The file as reports may name it: its path, or a name made of the key if ids are pseudonyms."""
        return self.shown_as or str(self.path)


def safe_name(name: str) -> str:
    """Replace every character that a sample key must not contain (dots, slashes, spaces) by a hyphen."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", name)


def array_orientations(scans: Iterable[Scan]) -> dict[str, str]:
    """Return the declared orientation of the .npy arrays of each data set that has any; empty for that of the shape."""
    return {scan.dataset: scan.orientation for scan in scans if scan.path.suffix.lower() == ".npy"}


def bytes_of(scans: Iterable[Scan]) -> int:
    """Return the size of the files of scans; a file that cannot be found counts as empty."""
    total = 0
    for scan in scans:
        with suppress(OSError):
            total += scan.path.stat().st_size
    return total


def check_readable(folders: Iterable[Path]) -> None:
    """Raise UserError for a folder that may not be read: its scans would be missing in silence."""
    for folder in folders:
        try:
            os.scandir(folder).close()
        except NotADirectoryError:
            continue
        except OSError as error:
            _refuse(error)


def paths_below(folder: Path) -> Iterator[Path]:
    """All files and folders below ``folder``, except in hidden folders; links to folders are not followed.

    Raises UserError if a folder may not be read.
    """
    for home, folders, files in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(home, name) for name in (*folders, *files))


def _refuse(error: OSError) -> None:
    raise UserError(
        f"{error.filename} cannot be read: {error.strerror}; change its permissions, or move it out of the cohort"
    )


def entities(path: Path, root: Path) -> tuple[str, str, str]:
    """Participant, session and run of a file below ``root``; names of folders take precedence over the file's name."""
    parts = path.relative_to(root).parts[:-1]
    folders = parts[next(n for n, part in enumerate(parts) if part.startswith("sub-")) :]
    named = entities_of([*path.name.partition(".")[0].split("_"), *folders])
    return folders[0].removeprefix("sub-"), named.get("ses", ""), named.get("run", "")


def entities_of(words: Iterable[str]) -> dict[str, str]:
    """BIDS entities: name -> label of every word ``name-label``; the last one counts."""
    return {word.partition("-")[0]: word.partition("-")[2] for word in words if "-" in word}


def visible(folder: Path, paths: Iterable[Path]) -> Iterator[Path]:
    """The paths below ``folder`` without hidden files and folders, such as macOS's ``._*`` and ``__MACOSX``."""
    for path in paths:
        if not any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(folder).parts):
            yield path
