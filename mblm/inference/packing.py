"""What compiled decoding stands in for, and linear layers' weights as it reads them."""

import itertools
import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from mblm.inference.huge_pages import HugePages
from mblm.model.plain import Part, is_plain
from mblm.ops import _native

# What compiled code takes for a tensor that there is not.
NONE = torch.empty(0, dtype=torch.float32, device="cpu")

WEIGHT_TYPES = ("float32", "bfloat16", "int8")

# Rows and columns of a tile, which csrc/cpu/matrix.h calls outputs and inputs.
_TILE = (4, 64)


def round_weight(weight: Tensor, weights: str) -> tuple[Tensor, Tensor]:
    """A weight ``(N, K)`` in the type asked for, and int8's scales ``(N,)``, empty otherwise."""
    if weights == "bfloat16":
        return weight.bfloat16(), NONE
    if weights == "int8":
        scale = (weight.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        return (weight / scale[:, None]).round().to(torch.int8), scale
    return weight, NONE


def pack_linear(linear: nn.Linear, weights: str, memory: HugePages) -> list[Tensor]:
    """Weight, int8's scales ``(N,)`` and bias ``(N,)``, as compiled code reads them.

    What there is not is `NONE`. A float32 weight is the layer's own, others are kept in
    ``memory``. A weight is ``(N, K)``; int8 on a CPU is cut into tiles, which are filled up with
    zeros: ``(ceil(N / 4), ceil(K / 64), 4, 64)``. What int8 weights are multiplied with is rounded
    to 16 bits, one scale per row, so that sums of integers are exact.
    """
    weight, scale = round_weight(linear.weight.detach(), weights)
    if weights == "int8" and not is_on_gpu(weight):
        weight = _in_tiles(weight)
    if weights != "float32":
        weight = memory.keep(weight)
    return [weight, scale, NONE if linear.bias is None else linear.bias.detach()]


def _in_tiles(weight: Tensor) -> Tensor:
    (n, k), (rows, columns) = weight.shape, _TILE
    filled = nn.functional.pad(weight, (0, -k % columns, 0, -n % rows))
    tiles = filled.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))
    return tiles.transpose(-3, -2).contiguous()


class Guard:
    """Watches over modules that compiled code stands in for, at the cost of a few microseconds."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self._modules = [module for module, _ in parts]
        self._kinds = [kind for _, kind in parts]
        self._forwards = [(kind, kind.forward) for kind in set(self._kinds)]
        self._own = [module.__dict__ for module in self._modules]
        names = ("_forward_hooks", "_forward_pre_hooks")
        self._hooks = [own[name] for own in self._own for name in names]
        self._hooks += [_global_forward_hooks, _global_forward_pre_hooks]
        self._dropping = [module for module in self._modules if _drops(module)]

    def holds(self) -> bool:
        """Whether they still compute what they did when compiled code was made of them."""
        return not (
            any(self._hooks)
            or any(map(operator.contains, self._own, itertools.repeat("forward")))
            or any(module.training for module in self._dropping)
            or list(map(type, self._modules)) != self._kinds
            or any(kind.forward is not own for kind, own in self._forwards)
        )


def guard(parts: Iterable[Part]) -> Guard | None:
    """A guard of modules that compiled code can stand in for: plain, and in float32.

    None where it cannot.
    """
    if not _native.is_loaded():
        return None
    devices = ("cpu", torch.ops.mblm.device_kind())
    guarded: list[Part] = []
    for module, kind in parts:
        if not is_plain(module, kind) or not all(
            p.dtype == torch.float32 and p.device.type in devices and p.is_contiguous()
            for p in module.parameters(recurse=False)
        ):
            return None
        guarded.append((module, kind))
    made = Guard(guarded)
    return made if made.holds() else None


def _drops(module: nn.Module) -> bool:
    return bool(module.p if isinstance(module, nn.Dropout) else getattr(module, "dropout", 0.0))


def is_on_gpu(tensor: Tensor) -> bool:
    """Whether compiled code takes a tensor to a GPU, or to one that is emulated."""
    return _native.is_loaded() and tensor.device.type == torch.ops.mblm.device_kind()
