"""Loads the compiled kernels and tells what is compiled, what is not, and why."""

import importlib.util
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parent.parent
REBUILD = "in the source folder, run `pip install --no-deps --force-reinstall -e .`"

_loaded = False


def load() -> None:
    """Load the compiled kernels, after which the operators use them.

    The environment variable ``MBLM_NATIVE`` decides: unset, absent kernels are a warning;
    ``require`` makes them an error; ``0`` loads nothing.

    Raises:
        ValueError: ``MBLM_NATIVE`` has another value.
        ImportError: the kernels are required and cannot be loaded.
    """
    global _loaded
    setting = os.environ.get("MBLM_NATIVE", "")
    if setting not in ("", "0", "require"):
        raise ValueError(f"MBLM_NATIVE is {setting!r}; expected 0, require or nothing")
    if _loaded or setting == "0":
        return
    problem = _problem(_record())
    if problem is None:
        try:
            torch.ops.load_library(str(PACKAGE / "_C.so"))
            _loaded = True
            return
        except OSError as error:
            problem = f"cannot be loaded ({error})"
    message = f"mblm's native kernels are not used: {problem}. To get them, {REBUILD}."
    if setting == "require":
        raise ImportError(message)
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def is_loaded() -> bool:
    """Whether the compiled kernels are in use."""
    return _loaded


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
    reason = None
    if not _loaded:
        reason = _problem(record) or (
            "MBLM_NATIVE=0 is set" if os.environ.get("MBLM_NATIVE") == "0" else "cannot be loaded"
        )
    facts = json.loads(torch.ops.mblm.compiled_with()) if _loaded else {}
    info = {
        "compiled": "torch" in record,
        "loaded": _loaded,
        "reason": reason,
        "torch_built": record.get("torch"),
        "torch_running": str(torch.__version__),
        "mode": record.get("mode"),
        "compiler": facts.get("compiler"),
        "openmp": facts.get("openmp"),
        "gpu_architectures": record.get("cuda_architectures"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    return {**info, "missing": _missing(info)}


def _record() -> dict[str, Any]:
    """What setup.py wrote down; nothing in a source folder that was never built."""
    path = PACKAGE / "_build.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _problem(record: dict[str, Any]) -> str | None:
    """Why the kernels of this record cannot be loaded, None if they can."""
    if "reason" in record:
        return f"they were not compiled: {record['reason']}"
    if "torch" not in record or not (PACKAGE / "_C.so").exists():
        return f"none were compiled in {PACKAGE}"
    if record["torch"] != str(torch.__version__):
        return f"they were compiled for torch {record['torch']}, this is torch {torch.__version__}"
    return None


def _missing(info: dict[str, Any]) -> list[str]:
    """What a user of this machine could have and does not, with how to get it."""
    missing = []
    if not info["loaded"]:
        missing.append(f"native kernels: {info['reason']}; {REBUILD}")
    elif not info["openmp"]:
        missing.append(f"several threads in native kernels: with g++ (CXX=g++), {REBUILD}")
    if torch.version.cuda and info["mode"] != "cuda":
        missing.append(f"native CUDA kernels: with the CUDA toolkit installed, {REBUILD}")
    if torch.version.cuda and importlib.util.find_spec("mamba_ssm") is None:
        missing.append("mamba_ssm's CUDA kernels: `pip install mamba-ssm causal-conv1d`")
    return missing
