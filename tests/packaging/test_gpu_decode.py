"""benchmarks/gpu_rungs.cpp: what it takes from kernels' launches, beside a runtime that tells."""

import os
import subprocess
from pathlib import Path

import gpu_decode
import pytest

from tests.packaging.sass import NVCC, ROOT

RUNTIME = r"""
#include <cuda_runtime_api.h>
#include <cstdio>

extern "C" cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
  std::printf("launched:");
  for (unsigned i = 0; i < config->numAttrs; ++i) std::printf(" %d", int(config->attrs[i].id));
  return cudaSuccess;
}
extern "C" cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  std::printf(", recorded");
  return cudaSuccess;
}
"""
PROGRAM = r"""
#include <cuda_runtime_api.h>

int main() {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  cudaLaunchConfig_t config{};
  config.attrs = attributes;
  config.numAttrs = 2;
  cudaLaunchKernelExC(&config, nullptr, nullptr);
  cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeThreadLocal);
}
"""


@pytest.mark.skipif(not NVCC, reason="no CUDA toolkit: nvcc is neither on PATH nor in CUDA_HOME")
def test_lower_rungs_launch_without_what_they_lack(tmp_path: Path) -> None:
    """Programmatic launches are told by attribute 6, clusters by 4."""
    runtime, program = tmp_path / "libcudart.so.13", tmp_path / "program"
    Path(tmp_path, "runtime.cpp").write_text(RUNTIME)
    Path(tmp_path, "program.cpp").write_text(PROGRAM)
    shared = gpu_decode.compile_rung(NVCC, tmp_path / "runtime.cpp")
    subprocess.run([*shared, "-o", runtime], check=True)
    build = [str(NVCC), "-cudart", "none", "-Xlinker", runtime, tmp_path / "program.cpp"]
    subprocess.run([*build, "-o", program], check=True)

    def told(preloaded: Path | str) -> str:
        environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "LD_PRELOAD": str(preloaded)}
        return subprocess.run(
            [program], env=environment, check=True, capture_output=True, text=True
        ).stdout

    assert told("") == "launched: 6 4, recorded"
    expected = {"engine, one by one": "launched: 4", "engine, by graphs": "launched: 4, recorded"}
    for rung, flags in gpu_decode.LOWER_RUNGS.items():
        library = tmp_path / "rungs.so"
        command = gpu_decode.compile_rung(NVCC, ROOT / "benchmarks" / "gpu_rungs.cpp")
        subprocess.run([*command, *flags, "-o", library], check=True)
        assert told(library) == expected[rung]
