"""What caches of every engine refuse, in the same words."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mblm.utils.checks import check_number, check_token_ids


def check_model(model: Any) -> None:
    """Refuse what does not decode."""
    if not hasattr(model, "empty_logits"):
        raise TypeError(f"model: expected an mblm.MBLM, got {type(model).__name__}")
    if model.device.type == "meta":
        raise ValueError("model: it is on the device meta, where weights have no values")


def check_count(name: str, given: Any, rows: Sequence[Any]) -> None:
    """Refuse what is no list with an item for each row."""
    if not isinstance(given, (list, tuple)) or len(given) != len(rows):
        count = len(given) if isinstance(given, (list, tuple)) else type(given).__name__
        raise ValueError(f"{name}: expected a list of {len(rows)}, one for each row, got {count}")


def check_seconds(seconds: Any) -> float:
    """Refuse what is not a number, or NaN."""
    if math.isnan(seconds := check_number("seconds", seconds)):
        raise ValueError("seconds: expected a number, got nan")
    return seconds


def check_draft(name: str, draft: Tensor | None, num_tokens: int) -> Tensor | None:
    """Refuse what is no draft ``(n,)``; returns it as int64 on the CPU."""
    if draft is None:
        return None
    ids = check_token_ids(name, draft, num_tokens)
    if ids.ndim != 1:
        raise ValueError(f"{name}: expected shape (n,), got {tuple(ids.shape)}")
    return ids.cpu()


def check_choice(
    ids: Tensor | None, logits: Tensor | None, mask: Tensor | None, shape: tuple[int, int]
) -> None:
    """Refuse what does not choose a byte for each row, ``shape`` being (rows, V)."""
    if sum(given is not None for given in (ids, logits, mask)) != 1:
        raise ValueError("pass exactly one of ids, logits and mask")
    _check_tensor("ids", ids, shape[:1])
    _check_tensor("logits", logits, shape)
    _check_tensor("mask", mask, shape)


def _check_tensor(name: str, tensor: Any, shape: tuple[int, ...]) -> None:
    """Refuse ids, logits or a mask of another kind or shape."""
    kinds: dict[str, tuple[str, Callable[[torch.dtype], bool]]] = {
        "ids": ("integers", lambda dtype: not dtype.is_floating_point and dtype != torch.bool),
        "logits": ("floating point numbers", lambda dtype: dtype.is_floating_point),
        "mask": ("bool", lambda dtype: dtype == torch.bool),
    }
    what, fits = kinds[name]
    if tensor is None:
        return
    if not isinstance(tensor, Tensor) or not fits(tensor.dtype):
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{name}: expected a tensor of {what}, got {kind}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
