"""The CUDA sources on a machine without a GPU: they compile, keep to registers and need no torch.

What they compute is tested by csrc/tests/cuda_*_test.cpp, which run them on the CPU.
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

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
KERNELS = sorted(CSRC.glob("cuda/*.cu"))
GLUE = sorted(
    path
    for folder in ("torch", "decode")
    for path in CSRC.glob(f"{folder}/*.cpp")
    if re.search("MBLM_CUDA|kCuda", path.read_text())
)
NVCC = shutil.which("nvcc") or shutil.which(
    "nvcc", path=str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"))
)
CXX = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")

# Compiled by default: an operator's, and one that includes what decoding shares with the CPU.
QUICK = {"linear_rows.cu", "linear_rows.cpp", "decode_rows.cu"}


def slow_but_few(paths: list[Path]) -> list[object]:
    return [
        pytest.param(path, id=path.name, marks=[] if path.name in QUICK else [pytest.mark.slow])
        for path in paths
    ]


def test_there_are_kernels_and_glue() -> None:
    operators = {path.stem for path in KERNELS if not path.stem.startswith("decode_")}
    assert operators | {"device_cache", "library"} <= {path.stem for path in GLUE}


@pytest.mark.parametrize("path", sorted(CSRC.glob("cuda/*")), ids=lambda path: path.name)
def test_sources_name_no_torch_header(path: Path) -> None:
    included = re.findall(r'#include ([<"].*[>"])', path.read_text())
    strange = [name for name in included if not re.fullmatch(r'<[a-z_]+>|"(cpu|cuda)/.*"', name)]
    assert not strange, "only the standard library's headers and those of kernels"


@pytest.mark.skipif(not NVCC, reason="no CUDA toolkit: nvcc is neither on PATH nor in CUDA_HOME")
@pytest.mark.parametrize("path", slow_but_few(KERNELS))
@pytest.mark.parametrize("architecture", [pytest.param("80", marks=pytest.mark.slow), "90"])
def test_compiles_without_spills(path: Path, architecture: str, tmp_path: Path) -> None:
    command = [NVCC, "-std=c++20", "-O3", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-Werror"]
    command += ["all-warnings", f"-I{CSRC}", "-c", str(path), "-o", str(tmp_path / "kernels.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = used_by_kernels(done.stderr)
    for name, (registers, spilled) in kernels.items():
        print(f"{path.name} {architecture} {registers:4} registers {spilled:4} B spilled  {name}")
    assert bool(kernels) == ("__global__" in path.read_text())
    # Divisions in float64 are calls, around which a few registers are saved.
    spilling = [name for name, (_, spilled) in kernels.items() if spilled and "double" not in name]
    assert not spilling


def used_by_kernels(report: str) -> dict[str, tuple[int, int]]:
    """Registers and spilled bytes by kernel, from what ptxas reports."""
    pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    found = re.findall(pattern, report, flags=re.DOTALL)
    readable = [names_and_types(name) for name, _, _ in found]
    return {
        name: (int(registers), int(spilled))
        for name, (_, spilled, registers) in zip(readable, found, strict=True)
    }


def names_and_types(mangled: str) -> str:
    """A readable name: demangled where a tool for that is at hand."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if not tool:
        return re.sub(r"Id(?=[EL])", "double", mangled)
    return subprocess.run(
        [tool, mangled], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_the_report_is_read() -> None:
    report = """
ptxas info    : Compiling entry function '_Z1fv' for 'sm_90'
ptxas info    : Function properties for _Z1fv
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers
"""
    assert list(used_by_kernels(report).values()) == [(40, 4)]


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


RUN_WITH_LIBRARY = """
import sys, pytest
from pathlib import Path
from mblm.ops import _native
_native._library = _native.load_library(Path(sys.argv[1]))
sys.exit(pytest.main(sys.argv[2:]))
"""


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
    parity = ["tests/ops", "-k", "test_native_equals_reference or float64_on_the_cpu or one_order"]
    decoding = ["tests/inference/test_session.py", "tests/inference/test_device_cache.py"]
    every_cache = ["tests/inference/test_cache.py", "-k", "native and not any_schedule"]
    commands = [
        ["cmake", "-S", str(ROOT), "-B", str(tmp_path), *defines],
        ["cmake", "--build", str(tmp_path), "--parallel", "2", "--target", "_C"],
        [sys.executable, "-c", RUN_WITH_LIBRARY, str(tmp_path), "-q", *parity],
        [sys.executable, "-c", RUN_WITH_LIBRARY, str(tmp_path), "-q", *decoding],
        [sys.executable, "-c", RUN_WITH_LIBRARY, str(tmp_path), "-q", *every_cache],
    ]
    for command in commands:
        environment = {**os.environ, "MBLM_NATIVE": "0"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert command[0] == "cmake" or " passed" in done.stdout
