"""Train MBLMs by a configuration; for loops of one's own, the optimizer and its groups."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mblm.train.core.muon import Muon
    from mblm.train.recipe import param_groups

_MODULES = {"Muon": "core.muon", "param_groups": "recipe"}

__all__ = ["Muon", "param_groups"]


def __getattr__(name: str) -> Any:  # what is not asked for is not imported
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
