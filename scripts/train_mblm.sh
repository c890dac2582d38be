#!/usr/bin/env bash
# Train from a configuration with every GPU of this machine, or on the CPU.
#
#   bash scripts/train_mblm.sh -c CONFIG [options of `mblm train`]
#
# PYTHON is the interpreter, python by default.
set -euo pipefail

if [ "${1:-}" = "-c" ]; then
  shift
fi
if [ $# -eq 0 ]; then
  echo "usage: $0 -c CONFIG [options of mblm train]" >&2
  exit 2
fi
exec "${PYTHON:-python}" -m mblm train "$@"
