"""Loads the compiled kernels and tells what is compiled, what is not, and why."""

import importlib.util
import json
import os
import re
import warnings
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from mblm.ops._reinstall import how_to_compile

PACKAGE = Path(__file__).resolve().parent.parent

_library: ModuleType | None = None  # mblm._C
_reason: str | None = None  # why it is not loaded


def load() -> None:
    """Load the compiled kernels, after which the operators use them.

    The environment variable ``MBLM_NATIVE`` decides: unset, absent kernels are a warning;
    ``require`` makes them an error; ``0`` loads nothing.
    """
    global _library, _reason
    setting = os.environ.get("MBLM_NATIVE", "")
    if setting not in ("", "0", "require"):
        raise ValueError(f"MBLM_NATIVE is {setting!r}; expected 0, require or nothing")
    if _library:
        return
    if setting == "0":
        _reason = "MBLM_NATIVE=0 is set"
        return
    _reason = _problem(_record())
    if _reason is None:
        try:
            _library = load_library(PACKAGE)
            if hasattr(os, "register_at_fork"):
                os.register_at_fork(after_in_child=_use_one_thread_if_forked)
            return
        except ImportError as error:
            _reason = f"they cannot be loaded ({error})"
    message = (
        f"mblm's native kernels are not used: {_reason}. To get them, {how_to_compile(PACKAGE)}."
    )
    if setting == "require":
        raise ImportError(message)
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _use_one_thread_if_forked() -> None:
    """OpenMP would wait for threads that a forked process does not have, in PyTorch's code too."""
    if library().is_forked():
        torch.set_num_threads(1)


def load_library(folder: Path) -> ModuleType:
    """Load ``mblm._C`` from a folder; the operators then use its kernels."""
    spec = PathFinder.find_spec("mblm._C", [str(folder)])
    if spec is None or spec.loader is None:
        raise ImportError(f"{folder} holds none for this Python")
    library = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)
    return library


def is_loaded() -> bool:
    """Whether the compiled kernels are in use."""
    return _library is not None


def library() -> Any:
    """The module ``mblm._C``, or None where it is not loaded."""
    return _library


def build_info() -> dict[str, Any]:
    """What is compiled, for which torch and machine, and what is missing.

    Returns:
        A dictionary of plain values: ``compiled`` and ``loaded`` (bool), ``reason`` (str: why the
        kernels are not loaded, or None), ``torch_built`` and ``torch_running`` (version or None),
        ``mode`` (``"cpu"``, ``"cuda"`` or None), ``compiler`` (str or None), ``openmp`` (bool or
        None), ``gpu_architectures`` (str or None), ``cpu_capability`` (what this machine offers),
        ``missing`` (list of str: what is missing and how to get it).
    """
    record = _record()
    info = {
        "compiled": "torch" in record,
        "loaded": _library is not None,
        "reason": _reason,
        "torch_built": record.get("torch"),
        "torch_running": str(torch.__version__),
        "mode": record.get("mode"),
        "compiler": getattr(_library, "compiler", None),
        "openmp": getattr(_library, "openmp", None),
        "gpu_architectures": record.get("cuda_architectures"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    return {**info, "missing": _missing(info, record.get("without_cuda"))}


def _record() -> dict[str, Any]:
    """What setup.py wrote down; nothing in a source folder that was never built."""
    path = PACKAGE / "_build.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _problem(record: dict[str, Any]) -> str | None:
    """Why the kernels of this record cannot be loaded, None if they can."""
    if "reason" in record:
        return f"they were not compiled: {record['reason']}"
    if "torch" not in record:
        return f"none were compiled in {PACKAGE}"
    if _interface(record["torch"]) != _interface(torch.__version__):
        return f"they were compiled for torch {record['torch']}, this is torch {torch.__version__}"
    return None


def _interface(version: str) -> str:
    """What versions of torch share that have one binary interface: 2.13.0, 2.13.1 and 2.13.0+cpu.

    What is built ahead of a release, such as 2.13.0a0+git1, has its own.
    """
    release = re.fullmatch(r"(\d+\.\d+)\.\d+(\+.*)?", version)
    return release[1] if release else version


def _missing(info: dict[str, Any], without_cuda: str | None) -> list[str]:
    """What a user of this machine could have and does not, with how to get it."""
    missing, compile_again = [], how_to_compile(PACKAGE)
    if not info["loaded"]:
        missing.append(f"native kernels: {info['reason']}; {compile_again}")
    elif not info["openmp"]:
        missing.append(f"several threads in native kernels: with g++ (CXX=g++), {compile_again}")
    if torch.version.cuda and info["mode"] != "cuda":
        why = without_cuda or "with the CUDA toolkit installed"
        missing.append(f"native CUDA kernels: {why}; {compile_again}")
    if torch.version.cuda and importlib.util.find_spec("mamba_ssm") is None:
        missing.append("mamba_ssm's CUDA kernels: `pip install mamba-ssm causal-conv1d`")
    return missing
