"""What references refuse: arguments that do not fit, which PyTorch might stretch or cast."""

import math
import operator
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_KINDS = {"float": _FLOATS, "wide": _FLOATS[2:], "float32": _FLOATS[2:3], "int64": (torch.int64,)}
_of = operator.attrgetter("shape", "dtype")


def check_arguments(wanted: str, names: tuple[str, ...], arguments: Sequence[Any]) -> None:
    """Refuse arguments that do not fit one another.

    Args:
        wanted: Such as ``size: > 0, x: .. L D float, window: D-1 D/2 x, table: >=L size*D float``:
            sizes of a tensor, then its kind or the argument whose dtype it has; a number's least.
            The first of a name tells its size; ``..`` are any sizes, and ``V D | B L D`` goes by
            the dimensions.
        names: Of the arguments.
        arguments: Tensors among them may be None.

    Raises:
        TypeError: A dtype does not fit.
        ValueError: Anything else does not.
    """
    _check(wanted, names, tuple([_of(a) if isinstance(a, Tensor) else a for a in arguments]))


@lru_cache(maxsize=1024)  # those of decoding come again with every byte
def _check(wanted: str, names: tuple[str, ...], arguments: tuple[Any, ...]) -> None:
    given = dict(zip(names, arguments, strict=True))
    sizes: dict[str, Any] = {}
    dtypes: list[torch.dtype] = []
    for name, text in (named.strip().split(": ") for named in wanted.split(",")):
        *dims, kind = text.split()
        if (value := given[name]) is None:
            continue
        if not isinstance(value, tuple):
            holds = {">": operator.gt, ">=": operator.ge}[dims[0]]
            if not holds(value, int(kind)):
                raise ValueError(f"{name} must be {text}, got {value}")
            sizes[name] = value
            continue
        shape, dtype = value
        fitting: tuple[Any, ...]
        if kind == "computed":  # what results are computed in
            fitting = (torch.float64 if torch.float64 in dtypes else torch.float32,)
        else:
            fitting = _KINDS.get(kind) or (given[kind][1],)
        if dtype not in fitting:
            kinds = " or ".join(str(one).removeprefix("torch.") for one in fitting)
            of = f", the dtype of {kind}" if kind in given else ""
            raise TypeError(f"{name} must be {kinds}{of}, got {dtype}")
        dtypes.append(dtype)
        _check_shape(name, shape, " ".join(dims).split("|"), sizes)


def _check_shape(name: str, shape: Sequence[int], ways: list[str], sizes: dict[str, Any]) -> None:
    got: list[Any] = list(shape)
    several = [way.split() for way in ways]
    dims = next((way for way in several if len(way) == len(got)), several[0])
    if dims[0] == ".." and len(dims) <= len(got) + 1:
        first = len(got) - len(dims) + 1
        got[:first] = [got[:first]]
    if fits := len(got) == len(dims):
        for dim, size in zip(dims, got, strict=True):
            sizes.setdefault(dim, size)
    expected = [_size(dim, sizes) for dim in dims]
    if not fits or not all(map(_fits, dims, got, expected)):
        words = ", ".join(map(_words, dims, expected))
        raise ValueError(f"{name} must have shape [{words}], got {list(shape)}")


def _size(dim: str, sizes: dict[str, Any]) -> Any:
    """The size that a dimension tells of, or what it is called."""
    if "*" in dim:
        return math.prod(sizes[part] for part in dim.split("*"))
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
