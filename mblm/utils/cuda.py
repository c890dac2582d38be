"""What devices there are and how much of a GPU's memory is used.

``IS_CUDA_AVAILABLE`` and ``IS_BF16_AVAILABLE`` are found out when they are first asked for:
importing this module does not touch a device.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

IS_CUDA_AVAILABLE: bool
IS_BF16_AVAILABLE: bool

_GIBIBYTE = 1024**3


def __getattr__(name: str) -> Any:
    if name == "IS_CUDA_AVAILABLE":
        value = torch.cuda.is_available()
    elif name == "IS_BF16_AVAILABLE":
        value = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


@dataclass
class CudaProperties:
    """CUDA as torch sees it; a device reads ``name_bytes_major.minor``."""

    cuda_available: bool
    cuda_version: str | None
    cuda_devices: list[str]


def cuda_properties() -> CudaProperties:
    """Describe CUDA: whether it is available, its version, its devices."""
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return CudaProperties(
        cuda_available=torch.cuda.is_available(),
        cuda_version=torch.version.cuda,
        cuda_devices=[f"{d.name}_{d.total_memory}_{d.major}.{d.minor}" for d in devices],
    )


@dataclass
class CudaMemorySnapshot:
    """Memory of one device at one moment, in units of 1024**3 bytes."""

    allocated: float
    allocated_max: float
    reserved: float
    reserved_max: float
    total: float
    unit: Literal["GB"] = "GB"


def cuda_memory_snapshot(
    device: torch.device | str | int | None, dec_prec: int = 3
) -> CudaMemorySnapshot:
    """Measure a device's memory: allocated and reserved by torch, now and at most, and its total.

    Args:
        device: A CUDA device, None for the current one. For a CPU, and without CUDA, all is 0.
        dec_prec: Decimal places to round to.
    """
    # Without an accelerator torch refuses to make a device of an index.
    is_cpu = isinstance(device, (str, torch.device)) and torch.device(device).type == "cpu"
    if is_cpu or not torch.cuda.is_available():
        return CudaMemorySnapshot(0.0, 0.0, 0.0, 0.0, 0.0)

    def gigabytes(size: int) -> float:
        return round(size / _GIBIBYTE, dec_prec)

    return CudaMemorySnapshot(
        allocated=gigabytes(torch.cuda.memory_allocated(device)),
        allocated_max=gigabytes(torch.cuda.max_memory_allocated(device)),
        reserved=gigabytes(torch.cuda.memory_reserved(device)),
        reserved_max=gigabytes(torch.cuda.max_memory_reserved(device)),
        total=gigabytes(torch.cuda.get_device_properties(device).total_memory),
    )


def find_device(name: str | None) -> torch.device:
    """A device that computes, by its name; None is a GPU if there is one."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return check_device("device", name, with_values=True)


def check_device(name: str, device: Any, *, with_values: bool = False) -> torch.device:
    """Refuse what is no device that works; ``name`` is what errors call it, None is the CPU."""
    try:
        place = torch.device("cpu" if device is None else device)
        one = torch.ones(1, device=place)
        if with_values or not one.is_meta:
            one.item()
    except Exception as error:  # each backend raises its own, an ImportError where it is missing
        raise ValueError(f"{name}: {device} cannot be used: {error}") from error
    return place
