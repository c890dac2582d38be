"""What compiled decoding stands in for."""

import itertools
import operator
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from mblm.model.plain import Part, is_plain
from mblm.ops import _native


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
