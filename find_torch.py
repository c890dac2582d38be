"""Finds the torch that the native library is compiled against."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ASK = "import json, sys; print(json.dumps([sys.implementation.cache_tag, sys.path]))"


class NotCompiledError(RuntimeError):
    """Why there are no native kernels."""


def import_torch() -> Any:
    """Import the torch that mblm will run with: an isolated build hides it."""
    given = os.environ.get("MBLM_TORCH_PYTHON")
    own, problems = list(sys.path), []
    for python in [given] if given else outer_pythons():
        try:
            folders = ask(python)
            # Last, so that the build's own tools stay what they are; unless it was named.
            sys.path[:] = [*folders, *own] if given else [*own, *folders]
            torch: Any = importlib.import_module("torch")
            break
        except Exception as error:
            sys.path[:] = own
            problems.append(f"{python}: {error}")
    else:
        raise NotCompiledError(
            f"no torch to compile against was found ({'; '.join(problems)}): install torch first,"
            " or set MBLM_TORCH_PYTHON to the Python of the environment that has it"
        )
    if [int(part) for part in torch.__version__.split(".")[:2]] < [2, 6]:
        raise NotCompiledError(f"torch {torch.__version__} is older than 2.6")
    return torch


def outer_pythons() -> list[str]:
    """The Pythons that an isolated build may be for."""
    pythons = [sys.executable]
    if "UV" in os.environ or Path(sys.prefix).name.startswith("build-env-"):
        # uv and `python -m build` build in an environment of their own: the one that it is for is
        # the activated one, next on PATH, or the project's .venv.
        folders = [*os.environ["PATH"].split(os.pathsep), ".venv/bin"]
        pythons += [str(path) for f in folders if (path := Path(f, "python").absolute()).is_file()]
    return list(dict.fromkeys(pythons))


def ask(python: str) -> list[str]:
    """Where an interpreter of this version imports from, which pip hides behind two variables."""
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    done = subprocess.run([python, "-c", ASK], env=environment, check=True, stdout=subprocess.PIPE)
    tag, folders = json.loads(done.stdout)
    if tag != sys.implementation.cache_tag:
        raise ValueError(f"it is {tag}")
    return [folder for folder in folders if folder]
