"""The hostfile of ``yaware launch``."""

from __future__ import annotations

import re
from pathlib import Path

from infra.errors import UserError
from infra.files import read_text

# A name or address, perhaps after a user's name and @.
HOST = re.compile(r"[A-Za-z0-9_:][\w.:@-]*", re.ASCII)


def read_hostfile(path: Path) -> dict[str, int]:
    """Return the number of ranks of each host, by name.

    As for DeepSpeed, each line is ``name slots=N``, and # begins a comment. Raises UserError for any other line, and for a name
    with a character that pdsh or a shell would interpret: pdsh expands node[1-2], and a comma begins another host.
    """
    try:
        lines = read_text(path).splitlines()
    except OSError as error:
        raise UserError(f"hostfile {path} cannot be read: {error.strerror}; see infra/launch/hostfile") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", text)
        if match and not HOST.fullmatch(match[1]):
            raise UserError(
                f"hostfile {path}, line {number}: {match[1]!r} is not the name of one host; allowed: letters, digits and "
                ". _ - : @; write one line a host"
            )
        if not match or match[1] in hosts:
            why = "names a host for a second time" if match else "is not of the form `name slots=8`"
            raise UserError(f"hostfile {path}, line {number}: {text!r} {why}; one line a host")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise UserError(f"hostfile {path} names no host; write one line a host, as `node01 slots=8`")
    return hosts
