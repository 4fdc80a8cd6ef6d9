"""Stored results come back as they were, and no stored file can run code."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from infra import tuning
from infra.errors import UserError
from infra.trust.results import read_result, to_bytes


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self):
        return Path.touch, (self.sprung,)


def test_a_nested_result_comes_back_as_it_was(tmp_path):
    result = {
        "inner": np.array([0.1, np.nan, -np.inf]), "predicted": np.arange(6, dtype=np.float32).reshape(2, 3),
        "curve": [(5, np.int64(0), np.float64(0.3), None, np.zeros(0, np.float32))], "seconds": 0.1 + 0.2,
        "params": {"array": "a name", "dict": {"dict": 1}, "penalty": 1e-300}, "done": np.bool_(True), "flag": False,
        "text": np.array(["ä", "b\n"]),
    }  # fmt: skip
    path = tmp_path / "0.npz"
    path.write_bytes(to_bytes(result))
    found = read_result(path)
    assert found.keys() == result.keys()
    for name in ("inner", "predicted", "text"):
        assert found[name].dtype == result[name].dtype
        np.testing.assert_array_equal(found[name], result[name])
    assert (found["seconds"], found["params"], found["done"], found["flag"]) == (
        0.1 + 0.2,
        result["params"],
        True,
        False,
    )
    assert found["done"] is True
    [(size, number, score, nothing, values)] = found["curve"]
    assert (size, number, score, nothing, values.dtype) == (5, 0, 0.3, None, np.float32)


@pytest.mark.parametrize("value", [{1, 2}, Path("a"), {1: 2}, np.array([{}]), b"bytes"])
def test_what_would_need_a_pickle_is_an_error_of_the_program(value):
    with pytest.raises(TypeError, match="pickle|must be texts"):
        to_bytes({"a": value})


def planted(kind: str, sprung: Path) -> bytes:
    """Return a file that runs the payload if it is unpickled."""
    payload = pickle.dumps(Payload(sprung))
    stream = io.BytesIO()
    if kind == "pickle":
        return payload
    if kind == "array of objects":
        np.save(stream, np.array([Payload(sprung)], dtype=object), allow_pickle=True)
        return stream.getvalue()
    if kind == "objects in an npz":
        tree = np.frombuffer(json.dumps({"array": 0}).encode(), np.uint8)
        np.savez(stream, allow_pickle=True, tree=tree, **{"0": np.array([Payload(sprung)], dtype=object)})
        return stream.getvalue()
    with zipfile.ZipFile(stream, "w") as archive:  # a member that is a bare pickle
        archive.writestr("tree.npy", payload)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["pickle", "array of objects", "objects in an npz", "pickle in an npz"])
def test_a_planted_payload_in_a_stored_result_is_never_run(tmp_path, kind):
    sprung, path = tmp_path / "sprung", tmp_path / "0.npz"
    path.write_bytes(planted(kind, sprung))
    with pytest.raises(UserError, match=r"0\.npz is not a stored result .*; remove it, and it is computed again"):
        read_result(path)
    assert not sprung.exists()


def double(point, data):
    return {**point, "y": np.float64(2 * point["x"]), "z": np.array([point["x"]])}


def search(storage, points):
    return tuning.tune_grid(double, points, data={}, storage=storage, name="grid", in_process=True)


def test_a_search_continues_from_its_own_files_only(tmp_path):
    storage, sprung = tmp_path / "storage", tmp_path / "sprung"
    points = [{"x": 1, "task": object()}, {"x": 2, "task": object()}]  # entries of any type stay with the point
    first = search(storage, points)
    assert [(row["x"], row["task"], row["y"]) for row in first] == [(p["x"], p["task"], 2 * p["x"]) for p in points]
    target = storage / "grid-results" / "0.npz"
    target.write_bytes(planted("pickle", sprung))
    with pytest.raises(UserError, match="is not a stored result"):
        search(storage, points)
    target.unlink()
    (storage / "grid-results" / "0.pkl").write_bytes(planted("pickle", sprung))  # as earlier versions stored results
    assert [row["y"] for row in search(storage, points)] == [2, 4]
    storage.chmod(0o777)
    with pytest.raises(UserError, match="others may write to it"):
        search(storage, points)
    assert not sprung.exists()


def test_tunes_own_pickles_are_not_read_from_a_folder_of_others(tmp_path):
    storage, sprung = tmp_path / "storage", tmp_path / "sprung"
    for name in ("tuner.pkl", "trainable.pkl", "experiment_state-2026.json", "searcher-state-2026.pkl"):
        (storage / "search").mkdir(parents=True, exist_ok=True)
        (storage / "search" / name).write_bytes(planted("pickle", sprung))
    storage.chmod(0o777)
    space = {"x": ("uniform", 0.0, 1.0)}
    with pytest.raises(UserError, match="others may write to it"):
        tuning.tune_search(double, space, data={}, samples=2, storage=storage, name="search", seed=0)
    with pytest.raises(UserError, match="others may write to it"):
        tuning.train_ranks(double, {}, ranks=1, storage=storage, name="search")
    assert not sprung.exists()
