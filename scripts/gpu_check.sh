#!/usr/bin/env bash
# Builds, tests and measures the CUDA kernels on a machine with a GPU, in under nine minutes.
#
#   bash scripts/gpu_check.sh OUTDIR [WHEELS [REFERENCE]]
#
# Needs torch with CUDA, nvcc and no network. Python packages that the machine lacks are taken from
# WHEELS, a folder of wheels. REFERENCE is another, with what the published release needs beside
# torch and this package: the wheels of mblm 0.4.2, megabyte-pytorch, einops, beartype and mambapy;
# to compare Mamba-2, too, those of mamba_ssm and what it needs. Without it, training is measured on
# this side alone. `pip download --no-deps -d REFERENCE mblm==0.4.2 megabyte-pytorch einops beartype
# mambapy` gets them. OUTDIR gets summary.json, the benchmarks' gpu.json, gpu_decode.json and
# gpu_train.json and a log of each step. PYTHON is the interpreter, python3 by default. Ends with
# one table; fails if a step did.
set -uo pipefail

if [ $# -lt 1 ]; then
  echo "usage: $0 OUTDIR [WHEELS [REFERENCE]]" >&2
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
wheels=${2:+$(cd "$2" && pwd)}
reference=${3:+$(cd "$3" && pwd)}
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export MAX_JOBS=${MAX_JOBS:-$(nproc)}

if [ -n "$wheels" ]; then
  "$python" -m pip install -q --no-index --no-deps --upgrade --target "$out/site" "$wheels"/*.whl || exit 2
  export PYTHONPATH="$PYTHONPATH:$out/site" PATH="$out/site/bin:$PATH"
fi

# What is here, and what is missing, said before anything is begun.
"$python" - "$out" <<'PYTHON' || exit 2
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

NEEDED = {"torch": "torch", "numpy": "numpy", "pydantic": "pydantic", "yaml": "pyyaml",
          "mambapy": "mambapy", "tqdm": "tqdm", "safetensors": "safetensors", "typer": "typer",
          "typing_extensions": "typing_extensions", "pytest": "pytest", "hypothesis": "hypothesis",
          "setuptools": "setuptools"}
missing = [package for name, package in NEEDED.items() if importlib.util.find_spec(name) is None]
missing += [tool for tool in ("ninja",) if not shutil.which(tool)]
if missing:
    sys.exit(f"missing: {' '.join(missing)}; put their wheels into a folder and name it")
import torch

if torch.version.cuda is None or not torch.cuda.is_available():
    sys.exit(f"no GPU: torch {torch.__version__} sees none")
driver = subprocess.run(
    ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
    capture_output=True, text=True,
).stdout.strip()
capability = "{}.{}".format(*torch.cuda.get_device_capability())
facts = {"device": torch.cuda.get_device_name(), "capability": capability, "driver": driver,
         "torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0]}
Path(sys.argv[1], "facts.json").write_text(json.dumps(facts) + "\n")
print(", ".join(f"{name} {value}" for name, value in facts.items()))
PYTHON

rows=()
failed=0
# step NAME SECONDS COMMAND...: its output goes to a log, its last line to the table.
step() {
  local name=$1 limit=$2 log="$out/$1.log" start=$SECONDS status=ok
  shift 2
  echo "== $name: $*"
  timeout "$limit" "$@" >"$log" 2>&1
  local code=$?
  if [ $code -ne 0 ]; then
    status="failed ($code)"
    failed=1
    tail -n 25 "$log"
  fi
  rows+=("$name|$status|$((SECONDS - start))|$(grep -v '^ *$' "$log" | tail -n 1 | cut -c1-100 | tr '|' ' ')")
}

capability=$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')
step build 160 env MBLM_BUILD=cuda TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$capability}" \
  "$python" setup.py build_ext --inplace
if [ $failed -eq 0 ]; then
  export MBLM_NATIVE=require
  step tests 125 "$python" -m pytest -q -m gpu tests/ops tests/model tests/inference
  memcheck=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
  if [ -x "$memcheck" ]; then
    step memcheck 40 "$memcheck" --tool memcheck --error-exitcode 9 \
      "$python" -m pytest -q -p no:cacheprovider -m gpu tests/ops/test_devices.py -k two_runs
  else
    rows+=("memcheck|left out|0|no compute-sanitizer")
  fi
  step benchmark 60 "$python" benchmarks/gpu.py --json "$out/gpu.json"
  cat "$out/benchmark.log"
  step decoding 60 "$python" benchmarks/gpu_decode.py --json "$out/gpu_decode.json"
  cat "$out/decoding.log"
  step training 90 "$python" benchmarks/gpu_train.py ${reference:+--wheels "$reference"} \
    --runs 1 --steps 3 --seconds 8 --json "$out/gpu_train.json"
  cat "$out/training.log"
fi

printf '\n%-10s %-12s %8s  %s\n' step result seconds "last line"
for row in "${rows[@]}"; do
  IFS='|' read -r name status seconds line <<<"$row"
  printf '%-10s %-12s %8s  %s\n' "$name" "$status" "$seconds" "$line"
done
printf '%s\n' "${rows[@]}" | "$python" -c '
import json, sys
from pathlib import Path
out = Path(sys.argv[1])
names = ("step", "result", "seconds", "last_line")
steps = [dict(zip(names, line.rstrip("\n").split("|"))) for line in sys.stdin]
facts = json.loads((out / "facts.json").read_text())
(out / "summary.json").write_text(json.dumps({**facts, "steps": steps}, indent=1) + "\n")
' "$out"
exit $failed
