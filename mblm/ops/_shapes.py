"""What references refuse: shapes that do not fit, some of which PyTorch would stretch silently."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch


def check_shapes(shapes: str, names: Sequence[str], arguments: Sequence[Any]) -> None:
    """Refuse tensors whose shapes do not fit one another.

    Args:
        shapes: Such as ``x: .. L D, weight: D, window: D-1 D/2, table: >=L D``. The first of a name
            tells its size; ``..`` are any sizes, and ``V D | B L D`` goes by the dimensions.
        names: Of the arguments.
        arguments: Tensors among them may be None.

    Raises:
        ValueError: One does not fit.
    """
    _check(shapes, tuple(names), tuple(getattr(value, "shape", None) for value in arguments))


@lru_cache(maxsize=1024)  # those of decoding come again with every byte
def _check(
    shapes: str, names: tuple[str, ...], of_arguments: tuple[torch.Size | None, ...]
) -> None:
    given = dict(zip(names, of_arguments, strict=True))
    sizes: dict[str, Any] = {}
    for name, ways in (named.strip().split(": ") for named in shapes.split(",")):
        if (shape := given[name]) is None:
            continue
        got: list[Any] = list(shape)
        several = [way.split() for way in ways.split("|")]
        dims = next((way for way in several if len(way) == len(got)), several[0])
        if dims[0] == ".." and len(dims) <= len(got) + 1:
            first = len(got) - len(dims) + 1
            got[:first] = [got[:first]]
        if fits := len(got) == len(dims):
            for dim, size in zip(dims, got, strict=True):
                sizes.setdefault(dim, size)
        wanted = [_size(dim, sizes) for dim in dims]
        if not fits or not all(map(_fits, dims, got, wanted)):
            words = ", ".join(map(_words, dims, wanted))
            raise ValueError(f"{name} must have shape [{words}], got {list(shape)}")


def _size(dim: str, sizes: dict[str, Any]) -> Any:
    """The size that a dimension tells of, or what it is called."""
    name = dim.lstrip("<=>").removesuffix("-1").removesuffix("/2")
    size = int(name) if name.isdigit() else sizes.get(name, name)
    if isinstance(size, str):
        return dim
    return size - 1 if dim.endswith("-1") else size // 2 if dim.endswith("/2") else size


def _fits(dim: str, size: Any, wanted: Any) -> bool:
    if dim.startswith(">="):
        return bool(size >= wanted)
    return bool(size <= wanted) if dim.startswith("<=") else bool(size == wanted)


def _words(dim: str, wanted: Any) -> str:
    if isinstance(wanted, list):
        return ", ".join(map(str, wanted)) or ".."
    return f"{dim[:2]} {wanted}" if dim[0] in "<>" and wanted != dim else str(wanted)
