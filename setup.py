"""Compiles the native library with CMake against the installed torch.

Environment:
    MBLM_BUILD: ``cpu`` or ``cuda`` make anything that stands in the way an error, ``none`` compiles
        nothing. Unset, what can be compiled is; if nothing can, the install is pure Python and
        says so.
    MBLM_TORCH_PYTHON: Python interpreter of the environment whose torch to compile against, where
        it cannot be found from the build.
    CXX, MAX_JOBS, TORCH_CUDA_ARCH_LIST: as for torch's own extensions; GPU architectures are
        8.0 and 9.0, and newer ones through PTX, where none are named.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
DEFAULT_CUDA_ARCHITECTURES = "8.0;9.0+PTX"
LIBRARY, RECORD = "_C.so", "_build.json"


class NotCompiledError(Exception):
    """Why there is no native library."""


def torch_facts() -> dict[str, Any]:
    """What `cmake/torch_facts.py` says of the torch that the package will run with."""
    inherited = dict(os.environ)
    # pip hides the environment it installs into behind these two.
    outer = {k: v for k, v in inherited.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    given = os.environ.get("MBLM_TORCH_PYTHON")
    python = given or sys.executable
    tries = [(python, inherited), (python, outer)]
    if "UV" in os.environ and not given:
        # uv builds in an environment of its own: the one it installs into is the activated one,
        # next on PATH, or the project's .venv.
        folders = [*os.environ["PATH"].split(os.pathsep), str(ROOT / ".venv" / "bin")]
        pythons = [Path(folder, "python") for folder in folders]
        tries += [(str(python), outer) for python in pythons if python.is_file()]
    problems = []
    for python, environment in tries:
        command = [python, str(ROOT / "cmake" / "torch_facts.py")]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
        except OSError as error:
            problems.append(f"{python}: {error}")
            continue
        if done.returncode == 0:
            facts = json.loads(done.stdout)
            if facts["python"] == sys.implementation.cache_tag:
                return facts
            problems.append(f"{python} is {facts['python']}")
        else:
            problems.append(done.stderr.strip().rpartition("\n")[2])
    raise NotCompiledError(
        f"no torch to compile against was found ({'; '.join(dict.fromkeys(problems))}): install"
        " torch first, or set MBLM_TORCH_PYTHON to the Python of the environment that has it"
    )


def tool(name: str) -> str | None:
    """Path of a build tool on PATH or beside the interpreter."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def compiler() -> str:
    """Path of the C++ compiler: CXX's, or the first that there is."""
    given = os.environ.get("CXX")
    names = [shlex.split(given)[0]] if given else ["c++", "g++", "clang++"]
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    raise NotCompiledError(
        f"no C++ compiler was found (looked for {', '.join(names)}): install one, for instance g++,"
        " or set CXX"
    )


def run(command: list[str]) -> None:
    """Run a build command, passing its output on; its last lines tell why it failed."""
    print("+", shlex.join(command), flush=True)
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    print(done.stdout, flush=True)
    if done.returncode:
        tail = "\n".join(done.stdout.strip().splitlines()[-15:])
        raise NotCompiledError(f"`{shlex.join(command[:3])} ...` failed:\n{tail}")


def cuda_architectures(torch_list: str) -> str:
    """CMake's notation for TORCH_CUDA_ARCH_LIST's: ``"8.0;9.0a+PTX"`` -> ``"80-real;90a"``."""
    names = torch_list.replace(" ", ";").replace(".", "").split(";")
    return ";".join(
        name.removesuffix("+PTX") if name.endswith("+PTX") else f"{name}-real"
        for name in names
        if name
    )


def nvcc() -> str | None:
    """Path of CUDA's compiler: on PATH, beside the interpreter, or in CUDA_HOME."""
    home = os.environ.get("CUDA_HOME")
    return tool("nvcc") or (shutil.which("nvcc", path=str(Path(home, "bin"))) if home else None)


def compile_library(mode: str) -> tuple[Path, dict[str, Any]]:
    """Build the library; returns its path and what to record of it."""
    if mode == "none":
        raise NotCompiledError("MBLM_BUILD=none was set when it was installed")
    facts = torch_facts()
    if mode:
        return compile_for(mode, facts)
    if facts["cuda"] and nvcc():
        try:
            return compile_for("cuda", facts)
        except NotCompiledError as why:
            print(framed(f"mblm is compiled WITHOUT its CUDA kernels.\n{why}"), file=sys.stderr)
    return compile_for("cpu", facts)


def compile_for(mode: str, facts: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Build the library with the kernels of the CPU, or of CUDA too."""
    cxx = compiler()
    cmake, ninja = tool("cmake"), tool("ninja")
    if not cmake:
        raise NotCompiledError("cmake was not found: `pip install cmake ninja`")
    options = {
        "MBLM_TORCH_ROOT": facts["root"],
        "MBLM_TORCH_CXX11_ABI": facts["cxx11_abi"],
        "MBLM_CUDA": "ON" if mode == "cuda" else "OFF",
    }
    architectures = None
    if mode == "cuda":
        if not facts["cuda"]:
            raise NotCompiledError(f"torch {facts['version']} was built without CUDA")
        cuda_compiler = nvcc()
        if not cuda_compiler:
            raise NotCompiledError(
                "nvcc was not found: install the CUDA toolkit, and set CUDA_HOME or PATH to it"
            )
        wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_CUDA_ARCHITECTURES
        architectures = cuda_architectures(wanted)
        options["CMAKE_CUDA_COMPILER"] = cuda_compiler
        options["MBLM_CUDA_ARCHITECTURES"] = architectures
    # A folder for each set of settings, kept: what has not changed is not compiled again.
    key = hashlib.sha256(repr((cxx, bool(ninja), options)).encode()).hexdigest()[:8]
    folder = ROOT / "build" / f"cmake-{facts['version']}-{key}"
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    defines = [f"-D{name}={value}" for name, value in options.items()]
    run([cmake, "-S", str(ROOT), "-B", str(folder), *generator, *defines])
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    run([cmake, "--build", str(folder), "--parallel", jobs])
    record = {"torch": facts["version"], "mode": mode, "cuda_architectures": architectures}
    return folder / LIBRARY, record


def framed(text: str) -> str:
    """The text in a frame that is hard to overlook."""
    line = "!" * 80
    return f"\n{line}\n{text}\n{line}\n"


class BuildAfresh(build):
    """Builds a wheel's content without what an earlier build of this folder left."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildLibrary(build_ext):
    """Puts the native library, and the record of how it was built, into the package."""

    def run(self) -> None:
        mode = os.environ.get("MBLM_BUILD", "")
        if mode not in ("", "cpu", "cuda", "none"):
            raise SetupError(f"MBLM_BUILD is {mode!r}; expected cpu, cuda, none or nothing")
        package = ROOT / "mblm" if self.inplace else Path(self.build_lib, "mblm")
        package.mkdir(parents=True, exist_ok=True)
        for name in (LIBRARY, RECORD):
            (package / name).unlink(missing_ok=True)
        try:
            library, record = compile_library(mode)
            shutil.copy2(library, package / LIBRARY)
        except NotCompiledError as why:
            if mode in ("cpu", "cuda"):
                raise SetupError(f"MBLM_BUILD={mode}, but {why}") from None
            record = {"reason": str(why)}
            print(
                framed(
                    f"mblm is installed WITHOUT its native kernels: it works, but slowly.\n{why}"
                ),
                file=sys.stderr,
            )
        (package / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def get_outputs(self) -> list[str]:
        return list(self.get_output_mapping()) or [
            str(path)
            for name in (LIBRARY, RECORD)
            if (path := Path(self.build_lib, "mblm", name)).exists()
        ]

    def get_output_mapping(self) -> dict[str, str]:
        if not self.inplace:
            return {}
        paths = [
            Path("mblm", name) for name in (LIBRARY, RECORD) if (ROOT / "mblm" / name).exists()
        ]
        return {str(Path(self.build_lib, path)): str(path) for path in paths}


setup(
    # Named so that the build runs and the wheel belongs to a platform; CMake knows the sources.
    ext_modules=[Extension("mblm._C", sources=[])],
    cmdclass={"build": BuildAfresh, "build_ext": BuildLibrary},
)
