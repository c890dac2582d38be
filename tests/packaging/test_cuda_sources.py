"""The CUDA sources on a machine without a GPU: they compile, keep to registers and need no torch.

What they compute is tested on the CPU, where they are emulated: by the tests of operators and of
decoding, and by csrc/tests/cuda_*_test.cpp.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from tests.packaging.sass import CSRC, NVCC, ROOT, compiled, slow_but_few, used_by_kernels

KERNELS = sorted(CSRC.glob("cuda/*.cu"))
GLUE = sorted(
    path
    for path in CSRC.glob("**/torch/*.cpp")
    if re.search('MBLM_CUDA|kCuda|#include "cuda/', path.read_text())
)
CXX = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


def test_there_are_kernels_and_glue() -> None:
    sources = {path.stem for path in KERNELS if path.with_suffix(".h").exists()}
    operators = {name for name in sources if not name.startswith("decode_")}
    assert operators <= {path.stem for path in CSRC.glob("torch/*.h")}
    assert {"device_cache", "library"} <= {path.stem for path in GLUE}


@pytest.mark.parametrize("path", sorted(CSRC.glob("cuda/*")), ids=lambda path: path.name)
def test_sources_name_no_torch_header(path: Path) -> None:
    included = re.findall(r'#include ([<"].*[>"])', path.read_text())
    strange = [name for name in included if not re.fullmatch(r'<[a-z_]+>|"(cpu|cuda)/.*"', name)]
    assert not strange, "only the standard library's headers and those of kernels"


@pytest.mark.skipif(not NVCC, reason="no CUDA toolkit: nvcc is neither on PATH nor in CUDA_HOME")
@pytest.mark.parametrize("path", slow_but_few(KERNELS))
@pytest.mark.parametrize("architecture", [pytest.param("80", marks=pytest.mark.slow), "90"])
def test_kernels_live_in_registers(path: Path, architecture: str) -> None:
    """Without a stack, which arrays that are indexed while a kernel runs would need, or spills."""
    _, report = compiled(path, architecture)
    kernels = used_by_kernels(report)
    for name, used in kernels.items():
        print(f"{path.name} {architecture} {used}  {name}")
    assert bool(kernels) == ("__global__" in path.read_text())
    # Divisions in float64 are calls, around which a few registers are saved.
    spilling = {
        name: used
        for name, used in kernels.items()
        if (used.spilled or used.stack) and "double" not in name
    }
    assert not spilling


@pytest.mark.skipif(not CXX, reason="no C++ compiler on this machine")
@pytest.mark.parametrize("path", slow_but_few(GLUE))
def test_glue_compiles_without_cuda(path: Path) -> None:
    """With MBLM_CUDA against the headers of whatever torch there is, and none of CUDA's."""
    include = Path(torch.__file__).parent / "include"
    command = [CXX, "-std=c++20", "-DMBLM_CUDA", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    command += ["-fvisibility=hidden"]  # as setup.py does: what holds Python's objects is hidden
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}", f"-I{CSRC}"]
    command += ["-isystem", str(include), "-isystem", sysconfig.get_path("include")]
    command += ["-isystem", str(include / "torch" / "csrc" / "api" / "include"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not (CXX and shutil.which("cmake")), reason="no C++ compiler, or no cmake")
def test_glue_passes_tests_with_emulated_kernels(tmp_path: Path) -> None:
    """The glue of a GPU and its kernels, built to take tensors on the CPU, in the tests of parity.

    Sessions then decode with the kernels of a GPU.
    """
    options = {
        "MBLM_BUILD_EXTENSION": "ON",
        "MBLM_CUDA_EMULATED": "ON",
        "Python_EXECUTABLE": sys.executable,
    }
    defines = [f"-D{name}={value}" for name, value in options.items()]
    # Which rows wait within a patch is not seen where a unit takes a row to its patch's end.
    chosen = "native and not any_schedule and not fewer_rows_wait"
    every_cache = ["tests/inference/test_cache.py", "-k", chosen]
    run = [sys.executable, "-m", "tests.packaging.emulated", str(tmp_path)]
    commands = [
        ["cmake", "-S", str(ROOT), "-B", str(tmp_path), *defines],
        ["cmake", "--build", str(tmp_path), "--parallel", "2", "--target", "_C"],
        run,
        [*run, "tests/inference/test_session.py"],
        [*run, *every_cache],
    ]
    for command in commands:
        environment = {**os.environ, "MBLM_NATIVE": "0"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert command[0] == "cmake" or " passed" in done.stdout
