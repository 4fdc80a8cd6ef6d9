"""Nested results with arrays in one .npz file, without pickles: reading it runs no code.

The file holds the arrays ``0``, ``1``, ... and ``tree``, JSON text in which ``{"array": 3}`` stands for array 3 and
``{"dict": {...}}`` for a dictionary. Tuples become lists and NumPy scalars become Python numbers.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from infra.errors import UserError
from infra.files import open_file

Arrays = list[NDArray[Any]]


def to_bytes(result: Any) -> bytes:
    """Return the file's bytes for a result of dictionaries, lists, texts, numbers, None and arrays.

    Raises TypeError, naming the type, for anything else.
    """
    arrays: Arrays = []
    tree = json.dumps(_encode(result, arrays))
    stream = io.BytesIO()
    named = {str(number): array for number, array in enumerate(arrays)}
    np.savez(stream, allow_pickle=False, tree=np.frombuffer(tree.encode(), np.uint8), **named)
    return stream.getvalue()


def read_result(path: Path) -> Any:
    """Return what ``to_bytes`` was given. Raises UserError if the file is no such result; nothing in it is run."""
    try:
        # A zip file: np.load would open any other file as an array or a pickle.
        with open_file(path) as stream, np.lib.npyio.NpzFile(stream, allow_pickle=False) as stored:
            arrays = [stored[str(number)] for number in range(len(stored.files) - 1)]
            return _decode(json.loads(stored["tree"].tobytes()), arrays)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, BadZipFile, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} is not a stored result ({reason}); remove it, and it is computed again") from None


def _encode(value: Any, arrays: Arrays) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise TypeError(f"an array of {value.dtype} would need a pickle")
        arrays.append(value)
        return {"array": len(arrays) - 1}
    if isinstance(value, np.generic):
        return _encode(value.item(), arrays)
    if isinstance(value, dict):
        if not all(isinstance(name, str) for name in value):
            raise TypeError("the keys of a result must be texts")
        return {"dict": {name: _encode(entry, arrays) for name, entry in value.items()}}
    if isinstance(value, list | tuple):
        return [_encode(entry, arrays) for entry in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be stored without a pickle")


def _decode(tree: Any, arrays: Arrays) -> Any:
    if isinstance(tree, list):
        return [_decode(entry, arrays) for entry in tree]
    if not isinstance(tree, dict):
        return tree
    if "array" in tree:
        return arrays[tree["array"]]
    return {name: _decode(entry, arrays) for name, entry in tree["dict"].items()}
