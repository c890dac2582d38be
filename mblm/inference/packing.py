"""What compiled decoding stands in for, and linear layers' weights as it reads them."""

import torch
from torch import Tensor, nn

from mblm.inference.huge_pages import HugePages
from mblm.ops import _native

# What compiled code takes for a tensor that there is not.
NONE = torch.empty(0, dtype=torch.float32, device="cpu")

WEIGHT_TYPES = ("float32", "bfloat16", "int8")

# Rows and columns of a tile, which csrc/cpu/matrix.h calls outputs and inputs.
_TILE = (4, 64)
# Weights of a matrix that is small: see pack_linear.
_MOST_HALVED = 1 << 17

# What built-in stages consist of.
_PLAIN_PARTS = {
    "mblm.model.transformer.TransformerDecoder",
    "mblm.model.transformer_layers.Attention",
    "mblm.model.transformer_layers.FeedForward",
    "mblm.model.transformer_layers.RMSNorm",
    "mblm.model.transformer_layers.RotaryEmbedding",
    "mblm.model.mamba1.Mamba1",
    "mambapy.mamba.ResidualBlock",
    "mambapy.mamba.MambaBlock",
    "mambapy.mamba.RMSNorm",
    "mblm.model.mamba2.Mamba2",
    "mblm.model.mamba2._Layer",
    "mblm.model.mamba2._Mixer",
    "mblm.model.linear.Linear",
    "torch.nn.modules.linear.Linear",
    "mblm.model.embeddings.LocalTokenEmbedding",
    "mblm.model.embeddings.PatchTokenEmbedding",
    "mblm.model.utils.RoPE",
    "torch.nn.modules.conv.Conv1d",
    "torch.nn.modules.normalization.RMSNorm",
    "torch.nn.modules.activation.GELU",
    "torch.nn.modules.dropout.Dropout",
    "torch.nn.modules.container.ModuleList",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.flatten.Flatten",
    "torch.nn.modules.flatten.Unflatten",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.normalization.LayerNorm",
    "torch.nn.modules.sparse.Embedding",
}


def round_weight(weight: Tensor, weights: str) -> tuple[Tensor, Tensor]:
    """A weight ``(N, K)`` in the type asked for, and int8's scales ``(N,)``, empty otherwise."""
    if weights == "bfloat16":
        return weight.bfloat16(), NONE
    if weights == "int8":
        scale = (weight.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        return (weight / scale[:, None]).round().to(torch.int8), scale
    return weight, NONE


def pack_linear(
    linear: nn.Linear, weights: str, memory: HugePages, *, may_be_halved: bool = False
) -> list[Tensor]:
    """Weight, int8's scales ``(N,)`` and bias ``(N,)``, as compiled code reads them.

    What there is not is `NONE`. A float32 weight is the layer's own unless it is halved,
    others are kept in ``memory``. A weight is ``(N, K)``; int8 on a CPU is cut into tiles, which
    are filled up with zeros: ``(ceil(N / 4), ceil(K / 64), 4, 64)``. What int8 weights are
    multiplied with is rounded to 16 bits, one scale per row, so that sums of integers are exact.

    A small weight on a CPU is halved if it may be: ``(2, N, K / 2)``, or as many tiles as that
    takes. Two threads that each add up a half of the inputs wait for each other less often; where
    there is more to add up, that is no gain.
    """
    weight, scale = round_weight(linear.weight.detach(), weights)
    if not is_on_gpu(weight):
        if may_be_halved and weight.numel() <= _MOST_HALVED and weight.shape[1] % 32 == 0:
            weight = torch.stack(weight.chunk(2, dim=1))
        if weights == "int8":
            weight = _in_tiles(weight)
    if weights != "float32":
        weight = memory.keep(weight)
    return [weight, scale, NONE if linear.bias is None else linear.bias.detach()]


def _in_tiles(weight: Tensor) -> Tensor:
    (n, k), (rows, columns) = weight.shape[-2:], _TILE
    filled = nn.functional.pad(weight, (0, -k % columns, 0, -n % rows))
    tiles = filled.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))
    return tiles.transpose(-3, -2).contiguous()


def is_plain(module: nn.Module) -> bool:
    """Whether compiled code computes what a module does: its own parts alone, in float32.

    A part that somebody replaced, subclassed, hooked into or patched is left to PyTorch.
    """
    if not _native.is_loaded():
        return False
    devices = ("cpu", torch.ops.mblm.device_kind())
    return all(_is_plain_part(part, devices) for part in module.modules())


def is_on_gpu(tensor: Tensor) -> bool:
    """Whether compiled code takes a tensor to a GPU, or to one that is emulated."""
    return _native.is_loaded() and tensor.device.type == torch.ops.mblm.device_kind()


def _is_plain_part(part: nn.Module, devices: tuple[str, ...]) -> bool:
    kind = type(part)
    drops = getattr(part, "dropout", 0.0) if not isinstance(part, nn.Dropout) else part.p
    return (
        f"{kind.__module__}.{kind.__qualname__}" in _PLAIN_PARTS
        and not part._forward_hooks
        and not part._forward_pre_hooks
        and "forward" not in part.__dict__
        and not (part.training and drops)
        and getattr(part, "approximate", "none") == "none"
        and all(
            p.dtype == torch.float32 and p.device.type in devices and p.is_contiguous()
            for p in part.parameters(recurse=False)
        )
    )
