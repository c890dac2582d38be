"""Checks of what comes from outside; each refuses bad input by name."""

import operator
from typing import Any

import torch

from mblm.utils.transforms import is_traced, values_of

_ID_DTYPES = frozenset(
    getattr(torch, sign + width) for sign in ("int", "uint") for width in ("8", "16", "32", "64")
)


def kind_of(value: object) -> str:
    """What came, for an error: the dtype of a tensor, of anything else the type."""
    return str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__


def check_integer(name: str, value: Any, least: int | None = None) -> int:
    """Refuse what is not an integer, a bool being none, or is below the least that may be."""
    try:
        integer = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        integer = None
    if integer is None:
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if least is not None and integer < least:
        raise ValueError(f"{name}: expected a number >= {least}, got {integer}")
    return integer


def check_sizes(**sizes: Any) -> None:
    """Refuse what is not an integer of at least 1, by the names of the arguments."""
    for name, size in sizes.items():
        if check_integer(name, size) < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def check_number(name: str, value: Any) -> float:
    """Refuse what is not a number; a bool or a text is none."""
    try:
        if not isinstance(value, (bool, str, bytes)):
            return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise TypeError(f"{name}: expected a number, got {value!r}")


def check_id_dtype(name: str, ids: torch.Tensor | None) -> torch.Tensor:
    """Refuse what is not a tensor of integers; returns it as int64."""
    if not isinstance(ids, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor of token ids, got {type(ids).__name__}")
    if ids.dtype not in _ID_DTYPES:
        raise TypeError(f"{name}: expected integer token ids (torch.long), got {ids.dtype}")
    if ids.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {ids.layout}")
    return ids.long()


def check_token_ids(name: str, ids: torch.Tensor | None, num_tokens: int) -> torch.Tensor:
    """Refuse what is not a tensor of token ids in ``[0, num_tokens)``; returns them as int64.

    The range is not checked while a graph is traced, where values do not exist.
    """
    given = ids
    ids = check_id_dtype(name, ids)
    if ids.numel() and not ids.is_meta and not is_traced():
        values = values_of(ids)
        lowest, highest = (int(bound) for bound in torch.aminmax(values))
        if lowest < 0 or highest >= num_tokens:
            position = tuple(((values < 0) | (values >= num_tokens)).nonzero()[0].tolist())
            token = values_of(given)[position].item()
            bounds = f"outside [0, {num_tokens}), the vocabulary of num_tokens = {num_tokens}"
            wrong = "negative" if token < 0 else bounds
            raise ValueError(f"{name}: token id {token} at position {position} is {wrong}")
    return ids


def check_finite_weights(module: torch.nn.Module) -> None:
    """Refuse NaN or infinite weights; those of other types (quantized) are not read."""
    for name, parameter in module.named_parameters():
        if type(parameter) is not torch.nn.Parameter or parameter.is_meta:
            continue
        # A sum is one fast pass; it is looked at closely only if it is not finite itself.
        if torch.isfinite(parameter.detach().sum()):
            continue
        if broken := int((~torch.isfinite(parameter)).sum()):
            raise ValueError(
                f"weights: {name} {tuple(parameter.shape)} holds {broken} NaN or infinite values"
            )
