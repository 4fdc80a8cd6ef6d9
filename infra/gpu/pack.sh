#!/usr/bin/env bash
# Pack the source and the wheels of all pinned packages for a GPU machine without network, in parts. torch, which that
# machine has, and the tools for development and documentation are left out.
#
# usage: infra/gpu/pack.sh [--list] [--wheels DIR] [--part-size 60M] [--python-version 3.12] OUT
#   --list          print the packages that would be downloaded, and stop
#   --wheels DIR    use the wheels in DIR and download nothing
# OUT gets yaware-gpu.tar.000, .001, ..., SHA256SUMS and unpack.sh. On the GPU machine: bash unpack.sh
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
part_size=60M version=3.12 wheels='' list='' out=''
fail() { printf 'pack: error: %s\n' "$*" >&2; exit 2; }

while [ $# -gt 0 ]; do
    case $1 in
        --list) list=yes ;;
        --wheels | --part-size | --python-version)
            [ $# -ge 2 ] || fail "$1 needs a value"
            case $1 in --wheels) wheels=$2 ;; --part-size) part_size=$2 ;; *) version=$2 ;; esac
            shift ;;
        -*) fail "unknown option $1; allowed: --list, --wheels DIR, --part-size SIZE, --python-version X.Y" ;;
        *) [ -z "$out" ] || fail "expected one folder, found $out and $1"; out=$1 ;;
    esac
    shift
done

left_out='torch|mypy|mypy_extensions|ruff|librt|ast_serialize|pathspec|pandas-stubs|scipy-stubs|optype|numpy-typing-compat|types-[A-Za-z]+'
left_out+='|ghp-import|griffelib|Markdown|mergedeep|mkdocs[a-z-]*|platformdirs|pymdown-extensions|pyyaml_env_tag|watchdog'
packages() {
    grep -vE "^(#|$|($left_out)==)" "$root/infra/constraints.txt"
    printf '%s\n' 'setuptools>=77' 'wheel>=0.45'  # they build the project itself
}

if [ -n "$list" ]; then packages; exit 0; fi
[ -n "$out" ] || fail "name the output folder: infra/gpu/pack.sh OUT"
mkdir -p "$out"
[ -z "$(ls -A "$out")" ] || fail "$out is not empty; choose another folder or empty it"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/wheels"

if [ -n "$wheels" ]; then
    compgen -G "$wheels/*.whl" >/dev/null || fail "no wheels (*.whl) in $wheels"
    cp "$wheels"/*.whl "$work/wheels/"
else
    platforms=()
    for glibc in 2014 _2_17 _2_24 _2_27 _2_28 _2_34; do platforms+=(--platform "manylinux${glibc}_x86_64"); done
    # Every package is pinned, so dependencies need not be resolved; resolving would download torch and CUDA libraries.
    packages | grep -v '^deepspeed==' > "$work/requirements.txt"
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: "${platforms[@]}" \
        --python-version "$version" --implementation cp --abi "cp${version/./}" --abi abi3 --abi none \
        --dest "$work/wheels" -r "$work/requirements.txt"
    # DeepSpeed is published as source only. Built without compiled parts, it is one wheel for every Python.
    DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
        --wheel-dir "$work/wheels" "$(packages | grep '^deepspeed==')"
    wanted=$(packages | wc -l) found=$(find "$work/wheels" -name '*.whl' | wc -l)
    [ "$found" -eq "$wanted" ] || fail "expected $wanted wheels, found $found"
fi

git -C "$root" archive --format=tar --prefix=yaware/ HEAD > "$work/source.tar"
git -C "$root" rev-parse HEAD > "$work/COMMIT"
tar -C "$work" -cf - COMMIT source.tar wheels | split --bytes="$part_size" --numeric-suffixes --suffix-length=3 - "$out/yaware-gpu.tar."
cp "$root/infra/gpu/unpack.sh" "$out/"
(cd "$out" && sha256sum yaware-gpu.tar.* unpack.sh > SHA256SUMS)
printf 'pack: %s wheels, %s in %s parts of at most %s: %s\n' "$(find "$work/wheels" -name '*.whl' | wc -l)" \
    "$(du -ch "$out"/yaware-gpu.tar.* | tail -1 | cut -f 1)" "$(find "$out" -name 'yaware-gpu.tar.*' | wc -l)" "$part_size" "$out"
