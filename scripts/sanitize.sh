#!/usr/bin/env bash
# Runs compiled code under sanitizers: thread for the C++ tests of decoding, address and undefined
# behavior for all C++ tests and the Python tests of decoding and of operators, the latter with a
# GPU's kernels, emulated, too.
#
#   bash scripts/sanitize.sh [arguments of pytest instead of those tests]
#
# PYTHON is the interpreter that has torch and pytest, python by default; MAX_JOBS is how many
# files are compiled at a time. All is built in build/sanitize: what is installed stays as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$("${PYTHON:-python}" -c 'import sys; print(sys.executable)')
out=$PWD/build/sanitize

memory=address,undefined,float-cast-overflow

options=(-DMBLM_BUILD_TESTS=ON)
build() { # folder, sanitizers, targets
  # -O1 compiles quickly and optimizes fewer accesses away than what is shipped.
  cmake -S . -B "$out/$1" -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS=-O1 "${options[@]}" \
    -DMBLM_BUILD_EXTENSION=ON -DMBLM_SANITIZE="$2" -DPython_EXECUTABLE="$python"
  cmake --build "$out/$1" --parallel "${MAX_JOBS:-$(nproc)}" --target "${@:3}"
}

build thread thread decode_test stages_test run_test
ctest --test-dir "$out/thread" --output-on-failure --no-tests=error -R '^(decode|stages|run)_test$'

build address "$memory" all
ctest --test-dir "$out/address" --output-on-failure --no-tests=error

# A package loads the library beside its own files, so this library gets a copy of the package.
rm -rf "$out/package"
mkdir "$out/package"
cp -r mblm tests pyproject.toml "$out/package"
rm -f "$out/package/mblm/"_C*.so  # of an editable install, whose name Python prefers
cp "$out/address/"_C*.so "$out/package/mblm"
"$python" - >"$out/package/mblm/_build.json" <<'END'
import json, torch
print(json.dumps({"torch": str(torch.__version__), "mode": "cpu", "cuda_architectures": None}))
END

# The interpreter is not sanitized: the sanitizer is loaded before it, and the C++ library too, for
# the sanitizer looks up `throw` when it starts. Leaks are not looked for: what Python and torch
# keep until the process ends would be taken for leaks.
compiler=$(sed -n 's/^CMAKE_CXX_COMPILER:[A-Z]*=//p' "$out/address/CMakeCache.txt")
runtimes="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libstdc++.so)"
run() { # a module and its arguments
  (cd "$out/package" && LD_PRELOAD=$runtimes ASAN_OPTIONS=detect_leaks=0 "$python" -m "$@")
}
if [ $# -gt 0 ]; then
  MBLM_NATIVE=require run pytest "$@"
  exit
fi
MBLM_NATIVE=require run pytest tests/inference tests/model/test_golden.py tests/ops \
  --deselect tests/model/test_golden.py::test_all_of_this_without_native_kernels

options=(-DMBLM_CUDA_EMULATED=ON -DMBLM_KERNEL_OBJECTS="$out/address/CMakeFiles/kernels.dir")
build emulated "$memory" _C
MBLM_NATIVE=0 run tests.packaging.emulated "$out/emulated"
