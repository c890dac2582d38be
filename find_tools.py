"""Finds what the native library is compiled with and against: torch, a C++ compiler, nvcc."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

ASK = "import json, sys; print(json.dumps([sys.implementation.cache_tag, sys.path]))"


class NotCompiledError(RuntimeError):
    """Why there are no native kernels."""


def import_torch() -> Any:
    """Import the torch that mblm will run with: an isolated build hides it."""
    given = os.environ.get("MBLM_TORCH_PYTHON")
    problems = []
    for python in [given] if given else outer_pythons():
        try:
            tag, folders = ask(python)
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            problems.append(f"{python}: {error}")
            continue
        if tag != sys.implementation.cache_tag:
            problems.append(f"{python} is {tag}")
        elif not PathFinder.find_spec("torch", folders if given else [*sys.path, *folders]):
            problems.append(f"{python} has no torch")
        else:
            # Last, so that the build's own tools stay what they are; unless it was named.
            at = 0 if given else len(sys.path)
            sys.path[at:at] = [folder for folder in folders if folder not in sys.path]
            break
    else:
        raise NotCompiledError(
            f"no torch to compile against was found ({'; '.join(problems)}): install torch first,"
            " or set MBLM_TORCH_PYTHON to the Python of the environment that has it"
        )
    try:
        torch: Any = importlib.import_module("torch")
    except Exception as error:
        raise NotCompiledError(f"torch cannot be imported: {error}") from error
    if [int(part) for part in torch.__version__.split(".")[:2]] < [2, 6]:
        raise NotCompiledError(f"torch {torch.__version__} is older than 2.6")
    return torch


def outer_pythons() -> list[str]:
    """The Pythons that an isolated build may be for."""
    pythons = [sys.executable]
    if "UV" in os.environ:
        # uv builds in an environment of its own: the one it installs into is the activated one,
        # next on PATH, or the project's .venv.
        folders = [*os.environ["PATH"].split(os.pathsep), ".venv/bin"]
        pythons += [str(path) for f in folders if (path := Path(f, "python").absolute()).is_file()]
    return list(dict.fromkeys(pythons))


def ask(python: str) -> tuple[str, list[str]]:
    """An interpreter's tag and where it imports from, which pip hides behind two variables."""
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    done = subprocess.run([python, "-c", ASK], env=environment, check=True, stdout=subprocess.PIPE)
    tag, folders = json.loads(done.stdout)
    return tag, [folder for folder in folders if folder]


def check_compiler() -> None:
    """Look for the compiler, which is then in CXX, and for Python's headers."""
    given = os.environ.get("CXX")
    if given and len(given.split()) > 1:  # which torch quotes as one
        raise NotCompiledError(
            f"CXX is {given!r}: name a compiler without further words, or a script that runs it"
        )
    names = [given] if given else ["c++", "g++", "clang++"]
    found = next(filter(shutil.which, names), None)
    if not found:
        raise NotCompiledError(
            f"no C++ compiler was found (looked for {', '.join(names)}): install one, for instance"
            " g++, or set CXX"
        )
    os.environ["CXX"] = found
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        raise NotCompiledError(f"{header} is missing: install Python's headers, as in python3-dev")


def check_nvcc(torch: Any) -> None:
    """Look for a CUDA toolkit of torch's major version."""
    from torch.utils.cpp_extension import CUDA_HOME

    if not torch.version.cuda:
        raise NotCompiledError(f"torch {torch.__version__} was built without CUDA")
    nvcc = Path(CUDA_HOME or "", "bin", "nvcc")
    if not nvcc.exists():
        raise NotCompiledError("nvcc was not found: install the CUDA toolkit, and set CUDA_HOME")
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)", said)
    if not release or release[1] != torch.version.cuda.split(".")[0]:
        raise NotCompiledError(
            f"{nvcc} is of CUDA {release[1] if release else '?'}, torch's is {torch.version.cuda}:"
            " install a toolkit of that version, and set CUDA_HOME to it"
        )
