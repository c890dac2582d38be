"""Rows of different lengths in one tensor, padded at their ends."""

import torch
from torch import Tensor


def align_left(ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rotate rows so that what is padded at the beginning is at the end.

    Args:
        ids: Token ids ``(B, L)``.
        attention_mask: Not 0 where there are bytes, ``(B, L)``; None: everywhere.

    Returns:
        The ids, and by how many positions each row was rotated, ``(B,)``, or None if none was.
    """
    first, _ = _bounds(ids, attention_mask)
    if first is None or not first.any():
        return ids, None
    return _rotate(ids, first), first


def align_right(values: Tensor, shift: Tensor | None) -> Tensor:
    """Undo `align_left` for values ``(B, L, ..)`` per position."""
    return values if shift is None else _rotate(values, -shift)


def rows_of(ids: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    """Each row's ids without padding, ``(n,)``; arguments and errors are those of `align_left`."""
    first, counts = _bounds(ids, attention_mask)
    if first is None or counts is None:
        return list(ids)
    return [row[a : a + n] for row, a, n in zip(ids, first.tolist(), counts.tolist(), strict=True)]


def _bounds(
    ids: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Where each row begins and how long it is, ``(B,)``; None without padding."""
    if attention_mask is None:
        return None, None
    if attention_mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask: expected the shape of input_ids, {tuple(ids.shape)}, got "
            f"{tuple(attention_mask.shape)}"
        )
    mask = attention_mask != 0
    if mask.all():
        return None, None
    first, counts = mask.int().argmax(1), mask.sum(1)
    positions = torch.arange(mask.shape[1], device=mask.device) - first[:, None]
    if not torch.equal(mask, (positions >= 0) & (positions < counts[:, None])):
        raise ValueError("attention_mask: expected padding at the ends of rows alone, got gaps")
    return first, counts


def _rotate(values: Tensor, by: Tensor) -> Tensor:
    """Row b of ``values (B, L, ..)``, rotated to the left by ``by[b]`` positions."""
    positions = torch.arange(values.shape[1], device=values.device)
    index = (positions + by.to(values.device)[:, None]) % values.shape[1]
    return values[torch.arange(len(values), device=values.device)[:, None], index]
