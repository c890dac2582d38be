#!/usr/bin/env bash
# Builds, tests and measures the CUDA kernels on a machine with a GPU: see gpu_check.py.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_check.py" "$@"
