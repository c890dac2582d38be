"""Linear layers, computed the fastest way there is at their size where they are plain."""

from torch import Tensor, nn

from mblm.model.plain import is_plain
from mblm.ops.linear import linear


def apply(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``; a plain ``torch.nn.Linear`` is computed by `mblm.ops.linear.linear`."""
    if is_plain(layer, nn.Linear):
        return linear(x, layer.weight, layer.bias)  # type: ignore[arg-type]
    out: Tensor = layer(x)
    return out


def apply_in_order(layers: nn.Module, x: Tensor) -> Tensor:
    """``layers(x)`` of an ``nn.Sequential``, each as by `apply`."""
    if not is_plain(layers, nn.Sequential):
        out: Tensor = layers(x)
        return out
    for layer in layers:  # type: ignore[attr-defined]
        x = apply(layer, x)
    return x
