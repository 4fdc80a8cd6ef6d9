#!/usr/bin/env bash
# Joins what pack.sh cut, checks it, installs it beside the torch that is there already, and runs the GPU tests.
#
# usage: bash unpack.sh [--check | --no-test] [DEST]      (run where the parts lie, or give PARTS=folder)
#   --check     join, check and unpack, install nothing
#   --no-test   install, but run no tests
# DEST (default: ./yaware-gpu) gets wheels/ and yaware/, the checkout with its .venv. `make test-gpu` works in it.
set -euo pipefail
parts=${PARTS:-$(cd "$(dirname "$0")" && pwd)}
python=${PYTHON:-python3}
mode=test dest=''
fail() { printf 'unpack: error: %s\n' "$*" >&2; exit 2; }

for argument in "$@"; do
    case $argument in
        --check) mode=check ;;
        --no-test) mode=install ;;
        -*) fail "unknown option $argument; allowed: --check, --no-test" ;;
        *) dest=$argument ;;
    esac
done
dest=${dest:-$PWD/yaware-gpu}

[ -f "$parts/SHA256SUMS" ] || fail "$parts/SHA256SUMS is missing; carry the whole folder that pack.sh wrote"
bad=$(cd "$parts" && sha256sum --check --quiet SHA256SUMS 2>/dev/null | grep ': FAILED' | cut -d : -f 1 | tr '\n' ' ') || true
[ -z "$bad" ] || fail "missing or damaged: ${bad% }; carry it over again"
[ ! -e "$dest/yaware" ] || fail "$dest/yaware exists already; remove it or give another folder"
mkdir -p "$dest"
# The list's own order and no other file: a part left over from an older pack must not slip in.
(cd "$parts" && awk '$2 ~ /^yaware-gpu\.tar\./ {print $2}' SHA256SUMS | sort | xargs cat) | tar -C "$dest" -xf -
tar -C "$dest" -xf "$dest/source.tar"
rm "$dest/source.tar"
printf 'unpack: commit %s and %s wheels in %s\n' "$(cut -c 1-12 "$dest/COMMIT")" "$(find "$dest/wheels" -name '*.whl' | wc -l)" "$dest"
[ "$mode" != check ] || exit 0

"$python" -c 'import torch' 2>/dev/null || fail "$python has no torch; set PYTHON to the one that has"
cd "$dest/yaware"
"$python" -m venv --without-pip .venv
# The new environment comes first, then what the old one has: torch and its CUDA libraries, pip.
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
    "$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
install=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-index --no-deps --ignore-installed)
"${install[@]}" "$dest"/wheels/*.whl
"${install[@]}" --no-build-isolation --editable .
touch .venv/.ready  # `make` need not set up anything
.venv/bin/python -c 'import torch; print("unpack: torch", torch.__version__, "CUDA", torch.version.cuda, "devices", torch.cuda.device_count())'
[ "$mode" != install ] || exit 0
.venv/bin/python -m pytest -q -rs -m gpu
