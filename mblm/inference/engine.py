"""Which engine decodes a model."""

from typing import Any
from weakref import WeakSet

from mblm.inference.arguments import check_model
from mblm.inference.cache import Cache
from mblm.inference.native_cache import NativeCache
from mblm.inference.torch_cache import TorchCache
from mblm.inference.weights import Weights, weights_of
from mblm.utils.checks import check_finite_weights

_finite: "WeakSet[Weights]" = WeakSet()  # of models whose weights were looked at


def cache_for(model: Any, weights: str, rows: int = 1) -> Cache:
    """A cache without rows: the compiled engine's where that can stand in for the local stage.

    Args:
        model: An `mblm.MBLM`.
        weights: The type of weights that compiled code reads.
        rows: How many rows a GPU has slots for at first. Default 1.
    """
    check_model(model)
    packed = weights_of(model, weights)
    if packed is None or packed.hosted or packed not in _finite:
        check_finite_weights(model)
    if packed is None:
        return TorchCache(model)
    _finite.add(packed)
    return NativeCache(model, weights, rows, packed)
