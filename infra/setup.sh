#!/usr/bin/env bash
# Create a virtual environment with the pinned packages and compile DeepSpeed's collectives.
# usage: infra/setup.sh PYTHON VENV
set -euo pipefail
python=$1
venv=$2
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"

say() { printf '\n== %s\n' "$*"; }
fail() { printf 'setup: error: %s\n' "$*" >&2; exit 2; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
    fail "$python is not Python 3.10 or newer (found: $("$python" --version 2>&1 || echo none)); run: make PYTHON=/path/to/python3.11 setup"
command -v g++ >/dev/null || fail "g++ not found; DeepSpeed needs it to compile its CPU collectives; install it (Debian: apt-get install g++)"

say "1/3 virtual environment in $venv"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"

say "2/3 packages, pinned by infra/constraints.txt (about 2.6 GB, two to four minutes)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c infra/constraints.txt -e '.[dev]'

say "3/3 compiling DeepSpeed's CPU collectives (about a minute, once)"
"$venv/bin/python" -c "from pretrain.engine.engine import warm; warm()"
say "ready: $venv/bin/yaware --help"
