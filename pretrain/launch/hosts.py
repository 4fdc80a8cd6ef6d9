"""``yaware launch``: a recipe on the hosts of a hostfile, through deepspeed's own launcher."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from infra.errors import UserError

# What a shell on another host would expand or cut: pdsh hands it the line as text.
SHELL = set("{}[]()*?$&|;<>~`'\"\\ \t")


def read_hostfile(path: Path) -> dict[str, int]:
    """Ranks of each host, as deepspeed reads them: lines ``name slots=N``, comments with #. UserError for other lines."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"hostfile {path} cannot be read: {error.strerror}; see infra/launch/hostfile") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", text)
        if not match or match[1] in hosts:
            why = "names a host for a second time" if match else "is not of the form `name slots=8`"
            raise UserError(f"hostfile {path}, line {number}: {text!r} {why}; one line a host")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise UserError(f"hostfile {path} names no host; write one line a host, as `node01 slots=8`")
    return hosts


def launch_command(
    hostfile: Path, hosts: dict[str, int], recipe: Sequence[str], *, node_rank: int | None, master_addr: str | None,
    master_port: int,
) -> list[str]:  # fmt: skip
    """The command that starts all hosts over pdsh, or with ``node_rank`` this host alone."""
    if node_rank is not None and not 0 <= node_rank < len(hosts):
        raise UserError(
            f"--node_rank={node_rank} is no host of {hostfile}; it names {len(hosts)}: 0 to {len(hosts) - 1}"
        )
    for word in recipe if node_rank is None else ():
        if SHELL & set(word):
            raise UserError(
                f"{word!r} would be taken apart by the shells of the other hosts; write it into a recipe file and give its path"
            )
    alone = [] if node_rank is None else ["--no_ssh", "--node_rank", str(node_rank)]
    return [
        sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), *alone, "--master_addr",
        master_addr or next(iter(hosts)), "--master_port", str(master_port), "--module", "pretrain.train", "--config", *recipe,
    ]  # fmt: skip
