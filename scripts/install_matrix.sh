#!/usr/bin/env bash
# Installs the package with several Pythons and releases of torch, each in an environment of its
# own, and tests it there: for a maintainer, before a release. It downloads gigabytes.
#
#   bash scripts/install_matrix.sh [PYTHON:TORCH...]
#
# PYTHON is a version that uv has or gets, TORCH a version (nothing: the newest). TORCH_INDEX names an
# index of torch's wheels, such as PyTorch's own for the CPU; OUT is the folder of environments and logs.
set -uo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- 3.10:2.7.1 3.12:2.6.0 3.11:2.13.0 3.13:
index=(${TORCH_INDEX:+--index "$TORCH_INDEX" --index-strategy unsafe-best-match})
out=${OUT:-$PWD/build/matrix}
mkdir -p "$out"
rows=()

try() { # python, torch's version or nothing, environment
  uv venv -q --clear --seed --python "$1" "$3" || return
  local python="$3/bin/python"
  uv pip install -q --python "$python" "${index[@]}" "torch${2:+==$2}" numpy || return
  MBLM_BUILD=cpu "$python" -m pip install '.[test]' || return
  "$python" -c 'from importlib.metadata import version; print("version", version("mblm"))'
  # In a folder that has the tests but not the package, so that they import what was installed.
  rm -rf "$3/tests" && mkdir "$3/tests" && cp -r tests pyproject.toml "$3/tests" || return
  (cd "$3/tests" && MBLM_NATIVE=require OMP_NUM_THREADS=1 \
    "$python" -m pytest -q -p no:cacheprovider tests/ops tests/inference)
}

failed=0
for pair in "$@"; do
  name="${pair/:/-torch-}"
  result=ok
  try "${pair%%:*}" "${pair#*:}" "$out/$name" >"$out/$name.log" 2>&1 || { result=FAILED failed=1; }
  rows+=("$name|$result|$(sed -n 's/^version //p' "$out/$name.log")|$(tail -n 1 "$out/$name.log")")
done
printf '%s\n' "${rows[@]}" | column -t -s '|'
exit $failed
