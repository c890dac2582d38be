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
WHAT_LACKS = "nvcc, on PATH or in CUDA_HOME" if not NVCC else "nvidia-cuda-cuobjdump and -nvdisasm"

# Opcodes, as `Kernel.places` takes them.
WAIT = "ACQBULK"  # for the kernels ahead on the stream: griddepcontrol.wait
BARRIER = "BAR.SYNC"
SHUFFLE = "SHFL"
LOAD, STORE, SHARED_STORE = "LDG", "STG", "STS"  # of global memory, of shared memory
COPY = "LDGSTS"  # cp.async, from global to shared memory
PREFETCH = "UBLKPF"  # cp.async.bulk.prefetch


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
        return [place for place, text in enumerate(self.code) if _is_any_of(text, opcodes)]


def _is_any_of(text: str, opcodes: tuple[str, ...]) -> bool:
    return any(re.match(re.escape(opcode) + r"\b", text) for opcode in opcodes)


@functools.cache
def compiled(path: Path, architecture: str) -> tuple[Path, str]:
    """Compiles a source, once per session: the object file, and what the assembler reports."""
    folder = tempfile.TemporaryDirectory()
    _folders.append(folder)
    target = Path(folder.name, path.stem + ".o")
    command = [str(NVCC), "-std=c++20", "-O3", f"-arch=sm_{architecture}", "-Xptxas", "-v"]
    command += ["-Werror", "all-warnings", f"-I{CSRC}", "-c", str(path), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target, done.stderr


_folders: list[tempfile.TemporaryDirectory[str]] = []  # removed at the session's end


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
def kernels_of(source: str) -> tuple[Kernel, ...]:
    """The kernels of csrc/cuda/<source> as machine code for compute capability 9.0."""
    target, report = compiled(CSRC / "cuda" / source, "90")
    command = [str(CUOBJDUMP), "-sass", str(target)]
    path = f"{Path(command[0]).parent}{os.pathsep}{os.environ['PATH']}"  # nvdisasm is beside it
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
    )
    return kernels_in(done.stdout, used_by_kernels(report))


def kernels_in(listing: str, used: dict[str, Used]) -> tuple[Kernel, ...]:
    instruction = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*?)\s*;")
    _, *parts = re.split(r"Function : (?=\w+)", listing)
    named = [(names_and_types(part.split(maxsplit=1)[0]), part) for part in parts]
    return tuple(
        Kernel(
            name, used[name], tuple(" ".join(text.split()) for text in instruction.findall(part))
        )
        for name, part in named
    )


def names_and_types(mangled: str) -> str:
    """A readable name: demangled where a tool for that is at hand."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if not tool:
        return re.sub(r"Id(?=[EL])", "double", mangled)
    return subprocess.run(
        [tool, mangled], capture_output=True, text=True, check=True
    ).stdout.strip()
