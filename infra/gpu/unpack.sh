#!/usr/bin/env bash
# Join and check the parts that pack.sh wrote, install them beside the installed torch, and run the GPU tests.
#
# usage: bash unpack.sh [--check | --no-test] [DEST]      (run it in the folder of the parts, or set PARTS=folder)
#   --check     join, check and unpack; install nothing
#   --no-test   install; run no tests
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

[ -f "$parts/SHA256SUMS" ] || fail "$parts/SHA256SUMS is missing; copy the whole folder that pack.sh wrote"
bad=$(cd "$parts" && sha256sum --check --quiet SHA256SUMS 2>/dev/null | grep ': FAILED' | cut -d : -f 1 | tr '\n' ' ') || true
[ -z "$bad" ] || fail "missing or damaged: ${bad% }; copy them again"
[ ! -e "$dest/yaware" ] || fail "$dest/yaware exists already; remove it or name another folder"
mkdir -p "$dest"
# Join exactly the parts that SHA256SUMS lists; the folder may contain parts of an older pack.
(cd "$parts" && awk '$2 ~ /^yaware-gpu\.tar\./ {print $2}' SHA256SUMS | sort | xargs cat) | tar -C "$dest" -xf -
tar -C "$dest" -xf "$dest/source.tar"
rm "$dest/source.tar"
printf 'unpack: commit %s and %s wheels in %s\n' "$(cut -c 1-12 "$dest/COMMIT")" "$(find "$dest/wheels" -name '*.whl' | wc -l)" "$dest"
[ "$mode" != check ] || exit 0

"$python" -c 'import torch' 2>/dev/null || fail "$python has no torch; set PYTHON to a Python that has torch"
cd "$dest/yaware"
"$python" -m venv --without-pip .venv
# Packages are searched in the new environment first, then in the old one, which has torch, CUDA libraries and pip.
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
    "$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
install=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-index --no-deps --ignore-installed)
"${install[@]}" "$dest"/wheels/*.whl
"${install[@]}" --no-build-isolation --editable .
touch .venv/.ready  # `make` must not set up the environment again
.venv/bin/python -c 'import torch; print("unpack: torch", torch.__version__, "CUDA", torch.version.cuda, "devices", torch.cuda.device_count())'
[ "$mode" != install ] || exit 0
.venv/bin/python -m pytest -q -rs -m gpu
