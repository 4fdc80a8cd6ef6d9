"""The answers of a piece in a small file: fit to be committed, and exact enough for AUC.

An AUC depends on the order of the scores alone. Of the scores of a training set's model only their place among 64 equal
parts is kept; scores of one part count as ties. This changes an AUC by less than 0.001 (a test says so) and takes six bits
a test person after compression. Numbers (ages) are kept as float32.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.experiments.answers import MethodAnswers
from evaluation.experiments.plan import DISEASES
from infra.errors import UserError
from infra.files import atomic_write, regular_file
from infra.machine import git_tags

PARTS = 64


def save_piece(path: Path, digest: str, answers: list[MethodAnswers]) -> None:
    """Write the answers of a piece, atomically. All answers to one task are about the same test people."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries, names, arrays = [], dict[str, str](), dict[str, Any]()
    for number, entry in enumerate(answers):
        is_disease = entry.task in DISEASES
        entries.append({
            **{name: getattr(entry, name) for name in ("clinic", "method", "variant", "seed", "task")},
            "sizes": np.asarray(entry.sizes).tolist(), "draws": np.asarray(entry.draws).tolist(),
        })  # fmt: skip
        arrays[f"answers.{number}"] = coded(entry.answers) if is_disease else np.asarray(entry.answers, np.float32)
        people, codes = np.unique(np.asarray(entry.people, dtype=str), return_inverse=True)
        arrays[f"people.{entry.task}"] = codes.reshape(-1).astype(np.uint16)
        arrays[f"labels.{entry.task}"] = np.asarray(entry.labels, np.uint8 if is_disease else np.float32)
        names[entry.task] = hashlib.sha256("\n".join(people).encode()).hexdigest()
    about = {"digest": digest, "entries": entries, "people": names, "code": git_tags(Path(__file__).parent)}
    with atomic_write(path) as stream:
        np.savez_compressed(stream, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays)


def read_about(stored: Any) -> dict[str, Any]:
    """Return digest, entries (what each answer is about) and digests of the test people of an open file."""
    about: dict[str, Any] = json.loads(stored["about"].tobytes())
    return about


def code_of(files: list[Path]) -> dict[str, list[str]]:
    """Return the commits of the code that made the pieces, each with its files; ``changed``: with changes beside a commit."""
    made: dict[str, list[str]] = {}
    for path in files:
        with np.load(regular_file(path)) as stored:
            code = read_about(stored)["code"]
        commit = code.get("mlflow.source.git.commit", "unknown")[:12]
        name = commit if code.get("yaware.git_dirty") == "false" else f"{commit} (changed)"
        made.setdefault(name, []).append(path.stem)
    return made


def coded(scores: NDArray[Any]) -> NDArray[np.uint8]:
    """Return for each row of scores (R, T) the part, 0 to 63, of each score; equal scores are in the same part."""
    codes = np.empty(scores.shape, np.uint8)
    for number, row in enumerate(np.asarray(scores)):
        below = np.searchsorted(np.sort(row), row, side="left")  # number of lower scores
        codes[number] = below * PARTS // max(1, row.size)
    return codes


def stored_digest(path: Path) -> str | None:
    """Return the digest of a stored piece; None if there is no such file, or it cannot be read."""
    try:
        with np.load(regular_file(path)) as stored:
            return str(read_about(stored)["digest"])
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def load_piece(path: Path) -> list[MethodAnswers]:
    """Read the answers of a piece. People are codes, equal for the same people in the pieces of a level."""
    with np.load(regular_file(path)) as stored:
        return [
            MethodAnswers(**{
                **entry, "sizes": np.array(entry["sizes"]), "draws": np.array(entry["draws"]),
                "answers": stored[f"answers.{number}"].astype(np.float32),
                "labels": stored[f"labels.{entry['task']}"].astype(np.float64),
                "people": stored[f"people.{entry['task']}"].astype(np.int64),
            })
            for number, entry in enumerate(read_about(stored)["entries"])
        ]  # fmt: skip


def check_same_people(files: list[Path]) -> None:
    """Raise UserError if two pieces of a level were evaluated on other test people: they could not be paired."""
    first: dict[tuple[str, str], tuple[Path, str]] = {}
    for path in files:
        with np.load(regular_file(path)) as stored:
            about = read_about(stored)
        for entry in about["entries"]:
            level, task = entry["clinic"], entry["task"]
            known, names = first.setdefault((level, task), (path, about["people"][task]))
            if names != about["people"][task]:
                raise UserError(
                    f"{path} and {known.name} hold answers about other test people; remove the one whose simulation was "
                    "another, and run the experiment again"
                )
