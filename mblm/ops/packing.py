"""Linear layers' weights as compiled decoding reads them."""

import torch
from torch import Tensor, nn

from mblm.ops import _native
from mblm.utils.huge_pages import HugePages

WEIGHT_TYPES = ("float32", "bfloat16", "int8")

# What compiled code takes for a tensor that there is not.
NONE = torch.empty(0, dtype=torch.float32, device="cpu")

# Rows and columns of a tile, which csrc/cpu/matrix.h calls outputs and inputs.
_TILE = (32, 4)


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

    What there is not is `NONE`. A float32 weight is the layer's own, others are kept in ``memory``.
    A weight is ``(N, K)``; int8 on a CPU is cut into tiles, which are filled up with zeros:
    ``(ceil(N / 32), ceil(K / 4), 32, 4)``. What int8 weights are multiplied with is rounded to
    16 bits, one scale per row, so that sums of integers are exact.
    """
    weight, scale = round_weight(linear.weight.detach(), weights)
    if weights == "int8" and not is_on_gpu(weight):
        weight = _in_tiles(weight)
    if weights != "float32":
        weight = memory.keep(weight)
    return [weight, scale, NONE if linear.bias is None else linear.bias.detach()]


def is_on_gpu(tensor: Tensor) -> bool:
    """Whether compiled code takes a tensor to a GPU, or to one that is emulated."""
    return _native.is_loaded() and tensor.device.type == torch.ops.mblm.device_kind()


def _in_tiles(weight: Tensor) -> Tensor:
    (n, k), (rows, columns) = weight.shape, _TILE
    filled = nn.functional.pad(weight, (0, -k % columns, 0, -n % rows))
    tiles = filled.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))
    return tiles.transpose(-3, -2).contiguous()
