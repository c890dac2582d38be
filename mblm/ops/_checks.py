"""Checks on arguments that several operators' references share.

The native glue refuses the same input in the same words.
"""

import torch
from torch import Tensor

from mblm.utils.transforms import is_traced, values_of


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What results of ``dtype`` are computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """``tensor`` has the dtype and is on the device of ``other``."""
    if tensor.dtype != other.dtype:
        raise TypeError(
            f"{name} must have the dtype of {other_name}, {other.dtype}, got {tensor.dtype}"
        )
    check_device(name, tensor, other_name, other)


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}, got {tensor.device}"
        )


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")


def check_ids_type(ids: Tensor) -> None:
    if ids.dtype != torch.int64:
        raise TypeError(f"ids must be int64, got {ids.dtype}")
    if ids.dim() != 2:
        raise ValueError(f"ids must have two dimensions, got {list(ids.shape)}")


def check_ids_range(ids: Tensor, num_embeddings: int) -> None:
    """Every id lies in [0, num_embeddings), where ids have values."""
    ids = values_of(ids)
    if type(ids) is not Tensor or ids.is_meta or is_traced():
        return
    outside = ((ids < 0) | (ids >= num_embeddings)).flatten()
    if outside.any():
        index = int(outside.to(torch.uint8).argmax())
        raise ValueError(
            f"ids must lie in [0, {num_embeddings}), "
            f"got {int(ids.flatten()[index])} at index {index}"
        )
