"""What CMake builds: the C++ tests of kernels and decoding, and those of sanitizers."""

import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.skipif(not shutil.which("cmake"), reason="no cmake on PATH"),
    pytest.mark.skipif(
        not (os.environ.get("CXX") or shutil.which("c++")), reason="no C++ compiler on this machine"
    ),
]


@pytest.mark.parametrize("without", ["^cuda_", pytest.param("^$", marks=pytest.mark.slow)])
def test_kernels_pass_their_own_tests(without: str) -> None:
    """Those of CUDA, by emulation, are slow: they hold all kernels for every type."""
    # Kept, so that another run compiles what has changed, where the clone stays where it is.
    folder = str(ROOT / "build" / f"tests-{zlib.crc32(bytes(ROOT))}")
    # -O1 compiles in half the time.
    flags = ["-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1", f"-DMBLM_TESTS_WITHOUT={without}"]
    compiled = ROOT / "build" / "kernels"  # by `make test`
    flags.append(f"-DMBLM_KERNEL_OBJECTS={compiled if compiled.exists() else ''}")
    for command in (
        ["cmake", "-S", str(ROOT), "-B", folder, "-DMBLM_BUILD_TESTS=ON", *flags],
        ["cmake", "--build", folder, "--parallel", "2"],
        ["ctest", "--test-dir", folder, "--output-on-failure", "--no-tests=error"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert Path(folder, "compile_commands.json").exists()
    if emulator := shutil.which("qemu-x86_64"):  # a machine of 2008, which ends at any AVX
        subprocess.run([emulator, "-cpu", "Nehalem", f"{folder}/stages_test"], check=True)


@pytest.mark.slow
def test_decoding_passes_its_tests_under_sanitizers() -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        [ROOT / "scripts" / "sanitize.sh"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
