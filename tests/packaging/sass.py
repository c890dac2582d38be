"""What nvcc makes of the CUDA sources: registers, stack, and the machine code of a GPU (SASS).

Nothing here needs a GPU. Machine code is read by NVIDIA's disassembler, of the test extra.
"""

import functools
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
NVCC = shutil.which("nvcc") or shutil.which(
    "nvcc", path=str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"))
)


def _disassembler() -> str | None:
    try:
        of_package = [f for f in files("nvidia-cuda-cuobjdump") or [] if f.name == "cuobjdump"]
        files("nvidia-cuda-nvdisasm")  # which cuobjdump runs
    except PackageNotFoundError:
        return shutil.which("cuobjdump")
    return str(of_package[0].locate()) if of_package else None


CUOBJDUMP = _disassembler()
FOLDER = tempfile.TemporaryDirectory()  # of object files, removed at the session's end
WHAT_LACKS = "nvcc, on PATH or in CUDA_HOME" if not NVCC else "nvidia-cuda-cuobjdump and -nvdisasm"

# Opcodes, as `Kernel.places` takes them.
WAIT = "ACQBULK"  # for the kernels ahead on the stream: griddepcontrol.wait
BARRIER = "BAR.SYNC"
SHUFFLE = "SHFL"
LOAD, STORE, SHARED_STORE = "LDG", "STG", "STS"  # of global memory, of shared memory
COPY = "LDGSTS"  # cp.async, from global to shared memory
PREFETCH = "UBLKPF"  # cp.async.bulk.prefetch

# Compiled by default: kernels that include what decoding shares with the CPU, and glue.
QUICK = {"decode_scan.cu", "groups.cpp"}


def slow_but_few(sources: list[Path]) -> list[object]:
    """Sources, as cases of a test."""
    return [
        pytest.param(path, id=path.name, marks=[] if path.name in QUICK else [pytest.mark.slow])
        for path in sources
    ]


@dataclass(frozen=True)
class Used:
    """What a kernel takes: registers of a thread, bytes of its stack, bytes spilled to memory."""

    registers: int
    stack: int
    spilled: int


@dataclass(frozen=True)
class Kernel:
    name: str  # demangled, with its template arguments and parameters
    used: Used
    code: tuple[str, ...]  # an instruction each, without its predicate: "LDG.E.128 R4, ..."

    def places(self, *opcodes: str) -> list[int]:
        """Where in the code the instructions are that begin with any of these opcodes."""
        pattern = re.compile(rf"({'|'.join(map(re.escape, opcodes))})\b")
        return [place for place, text in enumerate(self.code) if pattern.match(text)]


@functools.cache
def compiled(path: Path, architecture: str) -> tuple[Path, str]:
    """Compiles a source, once per session: the object file, and what the assembler reports."""
    target = Path(FOLDER.name, f"{path.stem}-{architecture}.o")
    command = [str(NVCC), "-std=c++20", "-O3", f"-arch=sm_{architecture}", "-Xptxas", "-v"]
    command += ["-Werror", "all-warnings", f"-I{CSRC}", "-c", str(path), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target, done.stderr


def used_by_kernels(report: str) -> dict[str, Used]:
    """What each kernel takes, from what the assembler reports."""
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores.*?Used (\d+) registers"
    )
    found = re.findall(pattern, report, flags=re.DOTALL)
    readable = [names_and_types(name) for name, *_ in found]
    return {
        name: Used(int(registers), int(stack), int(spilled))
        for name, (_, stack, spilled, registers) in zip(readable, found, strict=True)
    }


@functools.cache
def kernels_of(source: Path) -> tuple[Kernel, ...]:
    """The kernels of a source as machine code for compute capability 9.0."""
    target, report = compiled(source, "90")
    command = [str(CUOBJDUMP), "-sass", str(target)]
    path = f"{Path(command[0]).parent}{os.pathsep}{os.environ['PATH']}"  # nvdisasm is beside it
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
    )
    used = used_by_kernels(report)
    instruction = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*?)\s*;")
    found = []
    for listing in re.split(r"Function : (?=\w+)", done.stdout)[1:]:
        name = names_and_types(listing.split(maxsplit=1)[0])
        code = tuple(" ".join(text.split()) for text in instruction.findall(listing))
        found.append(Kernel(name, used[name], code))
    return tuple(found)


def names_and_types(mangled: str) -> str:
    """A readable name: demangled where a tool for that is at hand."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if not tool:
        return re.sub(r"Id(?=[EL])", "double", mangled)
    return subprocess.run(
        [tool, mangled], capture_output=True, text=True, check=True
    ).stdout.strip()
