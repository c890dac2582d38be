"""Compiles the native library, ``mblm._C``; imported when torch can be."""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch
from setuptools import Extension
from torch.utils import cpp_extension

from find_torch import NotCompiledError

ROOT = Path(__file__).resolve().parent
CSRC = str(ROOT / "csrc")


def native_library(cuda: bool, kernel_folder: Path) -> Extension:
    """The extension, with what ``BuildLibrary`` compiles before it in ``kernels``.

    Raises:
        NotCompiledError: Something that compiles it is missing.
    """
    check_compiler()
    # After Python's own flags, some of which slow the compiler or the kernels down. A message with
    # __FILE__ tells the path inside the project, wherever that is.
    flags = ["-std=c++20", "-g0", "-fno-wrapv", "-fvisibility=hidden"]
    flags += [f"-fmacro-prefix-map={ROOT}/=", f"-fmacro-prefix-map={torch.__path__[0]}/=torch/"]
    # No kernel traps. Where GCC need not think of that, it vectorizes loops with bounds: exp, gelu.
    kernel_flags = {"cxx": [*flags, "-O3", "-fno-trapping-math"]}
    kernels = sources("cpu/*.cpp", "decode/*.cpp")
    glue_flags = [*flags, "-O1"]  # it calls the kernels, and is quick to compile
    if cpp_extension.check_compiler_is_gcc(os.environ["CXX"]):
        # at::parallel_for is inlined and must meet torch's own runtime: none is linked.
        glue_flags.append("-fopenmp")
    extension = cpp_extension.CppExtension
    if cuda:
        # In a flag, so that what another toolkit of the same path has compiled is compiled again.
        toolkit = f"-DMBLM_TOOLKIT={check_nvcc()}"
        kernel_flags["nvcc"] = ["-std=c++20", "-O3", "-Xcompiler=-fvisibility=hidden", toolkit]
        kernels = sources("cuda/*.cu", "cuda/*.cpp") + kernels
        glue_flags.append("-DMBLM_CUDA")
        extension = cpp_extension.CUDAExtension
    glue = sources("torch/*.cpp", "decode/torch/*.cpp")
    glue.sort(key=lambda path: not path.endswith("library.cpp"))  # which takes the longest
    library = extension("mblm._C", glue, include_dirs=[CSRC], extra_compile_args=glue_flags)
    library.kernels = {
        "sources": kernels,
        "output_dir": str(kernel_folder),
        "include_dirs": [CSRC],
        "extra_postargs": kernel_flags,
    }
    return library


def sources(*patterns: str) -> list[str]:
    """The files, the longest first: compiled side by side, they then end together."""
    found = [path for pattern in patterns for path in Path("csrc").glob(pattern)]
    if not found:
        raise NotCompiledError(f"csrc holds no {' or '.join(patterns)}: the sources are not whole")
    return [str(path) for path in sorted(found, key=lambda path: -path.stat().st_size)]


def check_compiler() -> None:
    """Look for the compiler, which is then in CXX, and for Python's headers."""
    names = [given] if (given := os.environ.get("CXX")) else ["c++", "g++", "clang++"]
    found = next(filter(shutil.which, names), None)
    if not found:
        raise NotCompiledError(
            f"no C++ compiler was found (looked for {', '.join(names)}): install one, for instance"
            " g++, or set CXX to one word, a compiler or a script that runs it"
        )
    os.environ["CXX"] = found
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        raise NotCompiledError(f"{header} is missing: install Python's headers, as in python3-dev")


def check_nvcc() -> str:
    """Look for a CUDA toolkit of torch's major version, which is returned."""
    if not torch.version.cuda:
        raise NotCompiledError(f"torch {torch.__version__} was built without CUDA")
    nvcc = Path(cpp_extension.CUDA_HOME or "", "bin", "nvcc")
    if not nvcc.exists():
        raise NotCompiledError("nvcc was not found: install the CUDA toolkit, and set CUDA_HOME")
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)", said)
    if not release or release[1] != torch.version.cuda.split(".")[0]:
        raise NotCompiledError(
            f"{nvcc} is of CUDA {release[1] if release else '?'}, torch's is {torch.version.cuda}:"
            " install a toolkit of that version, and set CUDA_HOME to it"
        )
    return release[1]


class BuildLibrary(cpp_extension.BuildExtension):
    """Compiles and links; what the compiler says of a mistake is the error's message."""

    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except Exception as error:
            folders = self.extensions[0].kernels["output_dir"], self.build_temp
            said = next(filter(None, map(compiler_output, folders)), error)
            raise NotCompiledError(f"it did not compile: {said}") from error

    def build_extension(self, library: Extension) -> None:
        library.extra_objects = self.compiler.compile(**library.kernels)
        super().build_extension(library)


def compiler_output(folder: str) -> str:
    """What the compiler says to what does not compile in a folder: the build only showed it."""
    if not Path(folder, "build.ninja").exists():
        return ""
    done = subprocess.run(["ninja", "-C", folder], capture_output=True, text=True, errors="replace")
    lines = done.stdout.strip().splitlines() if done.returncode else []
    return "\n".join([line for line in lines if "error" in line][:8] or lines[-8:])
