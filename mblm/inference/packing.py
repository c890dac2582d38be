"""What compiled decoding stands in for, and linear layers' weights as it reads them."""

import torch
from torch import Tensor, nn

from mblm.ops import _native

WEIGHT_TYPES = ("float32", "bfloat16", "int8")

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


def pack_linear(linear: nn.Linear, weights: str) -> list[Tensor]:
    """Weight ``(N, K)`` of the type asked for, int8's scales ``(N,)``, bias ``(N,)``.

    What there is not is an empty tensor. A float32 weight is the layer's own. What int8 weights are
    multiplied with is rounded to 16 bits, one scale per row, so that sums of integers are exact.
    """
    weight, none = linear.weight.detach(), torch.empty(0)
    bias = none if linear.bias is None else linear.bias.detach()
    if weights == "bfloat16":
        return [weight.bfloat16(), none, bias]
    if weights == "int8":
        scale = (weight.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        return [(weight / scale[:, None]).round().to(torch.int8), scale, bias]
    return [weight, none, bias]


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
