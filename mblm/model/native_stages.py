"""Packs the weights of built-in stage models for the compiled stages that decode.

A compiled stage (``torch.classes.mblm.Stage``) holds weights and no state: forks share it. It reads
a float32 model's own weights, but for copies of small ones. ``bfloat16`` and ``int8`` round the
weights of linear layers, int8 with one scale per output row; everything else, activations included,
stays float32.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mblm.inference.packing import guard
from mblm.ops.packing import is_on_gpu, pack_linear
from mblm.utils.huge_pages import HugePages

if TYPE_CHECKING:
    from mblm.model.mamba_layers import MambaStage
    from mblm.model.transformer import TransformerDecoder

_WIDEST_HEAD_ON_GPU = 256


def native_transformer(stage: "TransformerDecoder", weights: str) -> Any:
    """The compiled stage of a Transformer, or None where it has none."""
    if guard(stage.parts()) is None:
        return None
    if is_on_gpu(stage.norm.g) and stage.head_dim > _WIDEST_HEAD_ON_GPU:
        return None
    memory = HugePages()
    tensors: list[Tensor] = [stage.norm.g]
    for attention, feed_forward in stage.layer_pairs():
        parts: Any = feed_forward
        norm, expand, _, _, contract = parts
        tensors.append(attention.norm.g)
        tensors += pack_linear(attention.to_q, weights, memory)
        tensors += pack_linear(attention.to_kv, weights, memory)
        tensors += pack_linear(attention.to_out, weights, memory)
        tensors.append(norm.g)
        tensors += pack_linear(expand, weights, memory)
        tensors += pack_linear(contract, weights, memory)
    return torch.ops.mblm.transformer_stage(_detached(tensors), stage.num_heads)


def native_mamba(stage: "MambaStage", weights: str) -> Any:
    """The compiled stage of a Mamba, or None where it has none."""
    from mblm.model.mamba2 import Mamba2

    if guard(stage.parts()) is None:
        return None
    return (_build_mamba2 if isinstance(stage, Mamba2) else _build_mamba1)(stage, weights)


def _build_mamba1(stage: Any, weights: str) -> Any:
    memory = HugePages()
    tensors: list[Tensor] = []
    layer: Any
    for layer in stage.layers:
        mixer = layer.mixer
        tensors += [layer.norm.weight, layer.norm.weight.new_tensor([layer.norm.eps])]
        tensors += [-torch.exp(mixer.A_log), mixer.conv1d.weight.flatten(1), mixer.conv1d.bias]
        tensors.append(mixer.D)
        for linear in (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj):
            tensors += pack_linear(linear, weights, memory)
    return torch.ops.mblm.mamba1_stage(_detached(tensors))


def _build_mamba2(stage: Any, weights: str) -> Any:
    norms = [module for module, kind in stage.parts() if kind is torch.nn.RMSNorm]
    if any(norm.eps != stage.norm_f.eps for norm in norms):
        return None
    memory = HugePages()
    tensors: list[Tensor] = [stage.norm_f.weight]
    layer: Any
    for layer in stage.layers:
        mixer = layer.mixer
        tensors += [layer.norm.weight, mixer.norm.weight, -torch.exp(mixer.A_log)]
        tensors += [mixer.conv1d.weight.flatten(1), mixer.conv1d.bias, mixer.dt_bias, mixer.D]
        for linear in (mixer.in_proj, mixer.out_proj):
            tensors += pack_linear(linear, weights, memory)
    return torch.ops.mblm.mamba2_stage(_detached(tensors), stage.norm_f.eps)


def _detached(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.detach().contiguous() for tensor in tensors]
