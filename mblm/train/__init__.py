"""Train MBLMs by a configuration; for loops of one's own, the optimizer and its groups."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mblm.train.core.muon import Muon
    from mblm.train.recipe import param_groups

__all__ = ["Muon", "param_groups"]


def __getattr__(name: str) -> Any:  # what is not asked for is not imported
    if name == "Muon":
        from mblm.train.core.muon import Muon

        return Muon
    if name == "param_groups":
        from mblm.train.recipe import param_groups

        return param_groups
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
