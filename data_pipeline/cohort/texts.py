"""Read text files of strangers: tables in UTF-8 or UTF-16, and JSON sidecars that may be damaged."""

from __future__ import annotations

import codecs
import json
import sys
from pathlib import Path
from typing import Any

from infra.errors import UserError
from infra.files import read_bytes

# Byte order marks and their encodings; UTF-32 first, because its mark begins with that of UTF-16.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
MANY_ZEROS = 0.2  # of a file's bytes: Latin letters in UTF-16 have one in two


def decode_text(content: bytes, name: str, kind: str = "text") -> str:
    """Decode a file's bytes: UTF-8, or UTF-16 or UTF-32 with a byte order mark. ``kind`` says what the file should be.

    Raises UserError, which begins with ``name`` and gives the command that converts the file, for any other encoding.
    """
    encoding = next((encoding for mark, encoding in MARKS.items() if content.startswith(mark)), "utf-8")
    if b"\0" in content and encoding.startswith("utf-8") and content.count(0) < len(content) * MANY_ZEROS:
        line = content.count(b"\n", 0, content.index(0)) + 1
        raise UserError(
            f"{name} is not {kind}: it has a byte of 0 in line {line}; remove it: "
            f"tr -d '\\000' < '{name}' > new && mv new '{name}'"
        )
    if b"\0" in content and encoding.startswith("utf-8"):
        guess = "UTF-16BE" if content[:1] == b"\0" else "UTF-16LE"
        raise UserError(
            f"{name} is not {kind}: it has bytes of 0, as UTF-16 without a byte order mark has; {_advice(name, guess)}"
        )
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        if not encoding.startswith("utf-8"):
            raise UserError(
                f"{name} is not {kind}: its mark says {encoding}, but it has no character at byte {error.start}; the file is "
                "damaged or cut off, copy it again"
            ) from None
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name} is not {kind}: '{encoding.removesuffix('-sig')}' codec does not know byte 0x{content[error.start]:02x} of "
            f"line {line}; {_advice(name, 'LATIN1')} (if the file is in Latin-1, as older Excel and SPSS write it)"
        ) from None


def _advice(name: str, encoding: str) -> str:
    return f"convert it: iconv -f {encoding} -t UTF-8 '{name}' > new && mv new '{name}'"


def read_text(path: Path, kind: str = "text") -> str:
    """Read a text file, see ``decode_text``. Raises UserError if it cannot be read."""
    try:
        content = read_bytes(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return decode_text(content, str(path), kind)


def read_sidecar(path: Path) -> dict[str, Any]:
    """Read a JSON file that describes another file; empty if it does not exist.

    A damaged sidecar does not stop the command: what is wrong is printed, and the result is empty.
    """
    if not path.is_file():
        return {}
    try:
        return parse_sidecar(read_bytes(path), str(path))
    except OSError as error:
        warn(f"{path} is ignored, it cannot be read: {error.strerror}")
        return {}


def parse_sidecar(content: bytes, name: str) -> dict[str, Any]:
    """Parse the bytes of the JSON file ``name``, see ``read_sidecar``."""
    try:
        parsed = json.loads(decode_text(content, name))
    except (UserError, ValueError, RecursionError) as error:
        warn(f"{name} is ignored, it is not JSON: {' '.join(str(error).removeprefix(name).split())}")
        return {}
    if not isinstance(parsed, dict):
        warn(f"{name} is ignored, it must hold keys and values, found {type(parsed).__name__}")
        return {}
    return parsed


def warn(text: str) -> None:
    """Print a warning about a cohort."""
    print(f"cohort: warning: {text}", file=sys.stderr, flush=True)
