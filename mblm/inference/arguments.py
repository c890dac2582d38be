"""What caches of every engine refuse, in the same words."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mblm.inference.prompt import as_ids
from mblm.model.stage import has_values
from mblm.utils.checks import check_number, check_token_ids, kind_of

MOST_ROWS = 1 << 24  # that a cache may have


def check_model(model: Any) -> None:
    """Refuse what does not decode."""
    if isinstance(model, type) or not hasattr(model, "empty_logits"):
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
    number = seconds if type(seconds) is float else check_number("seconds", seconds)
    if number != number:
        raise ValueError("seconds: expected a number, got nan")
    return number


def check_drafts(
    drafts: Sequence[Tensor | None], rows: Sequence[Any], num_tokens: int
) -> list[Tensor | None]:
    """Refuse what are no drafts ``(n,)`` of rows; returns them as int64 on the CPU."""
    check_count("drafts", drafts, rows)
    checked: list[Tensor | None] = []
    for index, draft in enumerate(drafts):
        name = f"drafts[{index}]"
        checked.append(None if draft is None else _row_of_ids(name, draft, num_tokens).cpu())
    return checked


def check_fed(ids: Sequence[bytes | Tensor], rows: Sequence[Any], num_tokens: int) -> list[Tensor]:
    """Refuse what are no bytes ``(n,)`` to be fed to rows; returns them as int64."""
    check_count("ids", ids, rows)
    given = (as_ids("ids", part) if isinstance(part, bytes) else part for part in ids)
    return [_row_of_ids(f"ids[{n}]", part, num_tokens) for n, part in enumerate(given)]


def _row_of_ids(name: str, given: Any, num_tokens: int) -> Tensor:
    ids = check_token_ids(name, has_values(name, given), num_tokens)
    if ids.ndim != 1:
        raise ValueError(f"{name}: expected shape (n,), got {tuple(ids.shape)}")
    return ids


def check_choice(
    ids: Tensor | None, logits: Tensor | None, mask: Tensor | None, shape: tuple[int, ...]
) -> None:
    """Refuse what does not choose a byte for each row, ``shape`` being (rows, V)."""
    all_three = {"ids": ids, "logits": logits, "mask": mask}
    given = [name for name, tensor in all_three.items() if tensor is not None]
    if len(given) != 1:
        raise ValueError("pass exactly one of ids, logits and mask")
    name, tensor = given[0], all_three[given[0]]
    expected = {"ids": "integers", "logits": "floating point numbers", "mask": "bool"}[name]
    if not isinstance(tensor, Tensor) or _kind(tensor) != expected:
        raise ValueError(f"{name}: expected a tensor of {expected}, got {kind_of(tensor)}")
    has_values(name, tensor)
    if tensor.shape != (shape := shape[:1] if name == "ids" else shape):
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")


def _kind(tensor: Tensor) -> str:
    if tensor.is_floating_point():
        return "floating point numbers"
    return "bool" if tensor.dtype == torch.bool else "integers"
