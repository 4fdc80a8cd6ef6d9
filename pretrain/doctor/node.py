"""What the doctor starts on every node: ``python -m pretrain.doctor.node REQUEST [NAME [-]]``. It prints its answer.

srun and pdsh break long lines and mix those of several nodes. So the answer is written in short lines, each with its node and
number. The line STARTED comes first.

NAME is the node's name in the hostfile; in a job step of SLURM, name and nodes are those of the step. With ``-`` the first line
of the standard input holds environment variables as JSON: secrets, which would be read by everybody on a command line.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import sys
from typing import Any

from infra.distributed import expand_hosts
from pretrain.doctor.checks import look_at_all
from pretrain.doctor.row import Request

MARK = "yaware-doctor: "
STARTED = "yaware-doctor-started"
LINE = 600


def encoded(request: Request) -> str:
    """Return a request as a word that no shell changes."""
    return base64.urlsafe_b64encode(request.to_json().encode()).decode()


def lines_of(node: str, answer: Any) -> list[str]:
    """Return the lines that hold a node's answer."""
    text = base64.b64encode(json.dumps(answer).encode()).decode()
    parts = [text[first : first + LINE] for first in range(0, len(text), LINE)]
    return [f"{MARK}{node} {number} {len(parts)} {part}" for number, part in enumerate(parts)]


def read_lines(output: str) -> dict[str, Any]:
    """Return the whole answers in the output of several nodes, by node; lines may have something before their mark."""
    parts: dict[str, dict[int, str]] = {}
    counts: dict[str, int] = {}
    for line in output.splitlines():
        words = line.partition(MARK)[2].split()
        if len(words) == 4:
            parts.setdefault(words[0], {})[int(words[1])] = words[3]
            counts[words[0]] = int(words[2])
    whole = {
        node: "".join(found[n] for n in sorted(found)) for node, found in parts.items() if len(found) == counts[node]
    }
    return {node: json.loads(base64.b64decode(text)) for node, text in whole.items()}


def main(arguments: list[str]) -> int:
    """Answer the request."""
    print(STARTED, flush=True)
    request = Request.from_json(base64.urlsafe_b64decode(arguments[0]).decode())
    if arguments[2:] == ["-"]:
        os.environ.update(json.loads(sys.stdin.readline()))
    if len(arguments) > 1:
        own, nodes = arguments[1], list(request.hosts)
    else:
        own = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        nodes = expand_hosts(os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST") or own)
    answer = look_at_all(request, own, nodes)
    print("\n".join(lines_of(own, answer)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
