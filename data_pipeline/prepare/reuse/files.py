"""Files that an encoder is given: which are raw and which prepared, and the preparation of a raw one.

The steps of a preparation are imported when the first raw scan comes: most encoders never see one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from data_pipeline.cohort.scan import Scan, safe_name
from data_pipeline.prepare.prepared import GREY_MATTER, MARK, PREPROCESSED, stem_of
from data_pipeline.prepare.reuse.record import difference, recipe_of
from data_pipeline.prepare.settings import PrepareRecipe
from data_pipeline.volume.errors import BadScan
from data_pipeline.volume.grid import Grid
from infra import ray_cluster
from infra.errors import UserError
from infra.files import read_object, regular_file, sha256_of
from infra.processes.scratch import scratch_folder

ENDINGS = (".nii.gz", ".nii", ".mgz", ".mgh")
DIGITS = 12  # of a file's digest, in the name of its prepared volume
_one_at_a_time = threading.Lock()  # ANTs' temporary folder and torch's number of threads belong to the process


@dataclass(frozen=True)
class PreparedFile:
    """A prepared volume and the figures of its preparation; empty if they are not known."""

    path: Path
    figures: Mapping[str, float]


class FilesOfRecipe:
    """Prepares files as an encoder's training scans were.

    Args:
        preparation: of the training scans, see ``record.training_preparation``.
        folder: where prepared scans stay, to be found again; None for a temporary folder for each.
    """

    def __init__(self, preparation: Mapping[str, Any], folder: Path | None = None) -> None:
        self.preparation, self.folder = preparation, folder
        self._recipe: PrepareRecipe | None = None

    @property
    def recipe(self) -> PrepareRecipe:
        """The recipe. Raises UserError if it is of another version, or if the folder holds scans of another recipe."""
        if self._recipe is None:
            self._recipe = recipe_of(self.preparation["recipe"], "the encoder")
            if self.folder is not None:
                from data_pipeline.prepare.derivative import claim

                claim(self.folder, self._recipe, name="raw scans", simulated=False)
        return self._recipe

    def figures(self, path: Path) -> Mapping[str, float] | None:
        """Return the figures of a prepared volume, from the JSON beside it; None if none says that it is prepared.

        Raises UserError if it was prepared otherwise than the training scans, and BadScan if the JSON cannot be read.
        """
        described = _described(path)
        if described is None:
            return None
        if fault := difference(described["Preparation"], self.preparation["recipe"]):
            raise UserError(
                f"{path} was prepared otherwise than the encoder's training scans: {fault}; give the raw scan, which is then "
                "prepared as they were"
            )
        figures = described.get("Figures")
        found = figures if isinstance(figures, Mapping) else {}
        return {str(name): float(value) for name, value in found.items() if type(value) in (int, float)}

    def is_raw(self, path: Path) -> bool:
        """Return whether a file without a description of its preparation is a raw scan.

        A volume is not raw if it lies on the grid of the prepared ones, its header says who prepared it, or its name says in
        which template's space it is. Arrays are not raw, and a file that cannot be read is left to its reader.
        """
        if not path.name.lower().endswith(ENDINGS) or "_space-" in path.name:
            return False
        try:
            image: Any = nibabel.load(regular_file(path))
            shape, affine = image.shape[:3], np.asarray(image.affine)
            mark = bytes(image.header["descrip"].tobytes()) if "descrip" in image.header else b""
        except Exception:  # `read_voxels` says what is wrong with the file
            return False
        if mark.startswith(MARK) or len(shape) < 3:
            return False
        return bool(Grid.of(shape, affine) != self.recipe.grid)

    @contextmanager
    def prepared(self, path: Path) -> Iterator[PreparedFile]:
        """Prepare a raw scan; the volume exists inside the block, and stays in the folder if there is one.

        The same file and recipe give the same bytes as ``prepare_cohort``. Raises BadScan if the scan is refused, and
        UserError if a library is missing.
        """
        from data_pipeline.prepare.job import ScanTask, prepare_one

        recipe = self.recipe
        with _one_at_a_time, _home(self.folder) as home:
            with ray_cluster.one_thread():
                outcome = prepare_one(ScanTask(scan=_scan(path), root=str(home), recipe=recipe))
            if outcome.error is not None:
                raise outcome.error
            main = PREPROCESSED if recipe.pipeline == "quasiraw" else GREY_MATTER
            yield PreparedFile(home / f"{stem_of(_scan(path))}_{main}.nii.gz", outcome.figures)

    def other_libraries(self) -> str:
        """Return which libraries have other versions than those that prepared the training scans; empty if none has."""
        from data_pipeline.prepare.job import versions

        own = versions()
        return ", ".join(
            f"{name} {own[name] or 'missing'} instead of {version}"
            for name, version in sorted(self.preparation["libraries"].items()) if own.get(name, version) != version
        )  # fmt: skip


@contextmanager
def _home(folder: Path | None) -> Iterator[Path]:
    """The folder of prepared scans: the given one, or a temporary one."""
    if folder is not None:
        yield folder
        return
    with scratch_folder("prepared") as temporary:
        yield temporary


def _scan(path: Path) -> Scan:
    """A raw file as a scan, named after its file and content."""
    stem = path.name.lower().partition(".")[0]
    try:
        digest = sha256_of(path)[:DIGITS]
    except (OSError, UserError):  # the preparation says why it cannot be read
        digest = "unreadable"
    return Scan(path=path.resolve(), dataset="raw", participant_id=safe_name(f"{stem.removeprefix('sub-')}-{digest}"))


def _described(path: Path) -> dict[str, Any] | None:
    """The JSON beside a file, if it describes a preparation. Raises BadScan if it is no JSON object."""
    ending = next((ending for ending in ENDINGS if path.name.lower().endswith(ending)), None)
    if ending is None:
        return None
    beside = path.with_name(path.name[: -len(ending)] + ".json")
    try:
        content = read_object(beside, "remove it, or write it again")
    except OSError:
        return None
    except UserError as error:
        raise BadScan(str(error)) from None
    return content if isinstance(content.get("Preparation"), Mapping) else None
