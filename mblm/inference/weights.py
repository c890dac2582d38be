"""A model's weights as the compiled engine reads them: packed once per type, shared by all caches.

A stage is *native* where it, and what embeds its tokens and gives its context, is what it seems
and packs itself; otherwise it is *hosted*: Python steps it. The local stage must be native, and on
a GPU every stage, or there is no native cache at all.

Packed weights belong to the weights that they were made of, which a guard watches: modules,
parameters, their memory, and PyTorch's count of writes to them. What it cannot see is a write past
that count: through numpy, through ``parameter.data``, or to tensors made in inference mode.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from mblm.inference.hosted import HostedStage
from mblm.model.plain import Part, is_plain
from mblm.model.utils import RoPE
from mblm.ops import _native
from mblm.ops.packing import NONE, WEIGHT_TYPES, is_on_gpu, pack_linear
from mblm.utils.huge_pages import HugePages

_lock = threading.RLock()


def _renew_lock() -> None:
    """In a child, where the thread that held it is not."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


@dataclass(frozen=True, eq=False)
class Weights:
    """Packed weights; they are never changed.

    Attributes:
        hierarchy: ``mblm._C.Hierarchy``.
        hosted: The stages that Python steps, by number.
        refused: Those of them that could not be packed.
        is_on_gpu: Whether they are a GPU's, or an emulated one's.
        holds: Whether they still are the model's, and it computes what they are packed for. It
            takes a few microseconds.
    """

    hierarchy: Any
    hosted: Mapping[int, HostedStage]
    refused: frozenset[int]
    is_on_gpu: bool
    holds: Callable[[], bool]


def weights_of(model: Any, weights: str = "float32") -> Weights | None:
    """A model's packed weights, those that there are if they still hold.

    Args:
        model: An `mblm.MBLM`, whose copies and files have no part in it.
        weights: The type of linear layers' weights: ``"float32"``, ``"bfloat16"`` or ``"int8"``.

    Returns:
        None where there is no native cache: kernels that are not loaded; a local stage, or what is
        around it, that is not as built, not float32, not contiguous, or with dropout in training;
        on a GPU, any such stage.
    """
    if weights not in WEIGHT_TYPES:
        raise ValueError(f"weights: expected one of {', '.join(WEIGHT_TYPES)}, got {weights!r}")
    found = _valid(model, weights)
    if found is not None or not _native.is_loaded():
        return found
    with _lock:  # two threads share what the first one packs
        found = _valid(model, weights)
        if found is None:
            found = _pack(model, weights)
            model.packed_weights.pop(weights, None)
            if found is not None:
                model.packed_weights[weights] = found
    return found


def _valid(model: Any, weights: str) -> Weights | None:
    found: Weights | None = model.packed_weights.get(weights)
    if found is None or not found.holds():
        return None
    if any(_is_native(model, n) for n in found.hosted.keys() - found.refused):
        return None
    # No guard watches hosted stages: what they give for the start token tells.
    same = (
        torch.equal(_host(model, n).start_output, h.start_output) for n, h in found.hosted.items()
    )
    return found if all(same) else None


def _host(model: Any, n: int) -> HostedStage:
    with torch.inference_mode(), torch.autocast(model.device.type, enabled=False):
        return HostedStage(model.stage_models[n], model.start_token(n, 1)[0])


def _is_native(model: Any, n: int) -> bool:
    """Whether the engine can stand in for a stage and what is beside it, here and now."""
    stage = model.stage_models[n]
    if not (hasattr(stage, "pack") and hasattr(stage, "parts")):
        return False
    parts = []
    for part in _parts(model, n):
        if not _is_packable(part, model.device):  # and may have no parts of its own
            return False
        parts.append(part)
    return _guard(parts).holds()


def _parts(model: Any, n: int) -> Iterator[Part]:
    return chain(model.stage_models[n].parts(), model.parts_beside(n))


def _is_packable(part: Part, device: torch.device) -> bool:
    module, kind = part
    return (
        device.type in ("cpu", torch.ops.mblm.device_kind())
        and is_plain(module, kind)
        and all(
            p.dtype == torch.float32 and p.device == device and p.is_contiguous()
            for p in module.parameters(recurse=False)
        )
    )


def _pack(model: Any, weights: str) -> Weights | None:
    count = len(model.seq_lens)
    native = [n for n in range(count) if _is_native(model, n)]
    if count - 1 not in native:
        return None
    # First, so that it sees what is written meanwhile.
    guard = _guard([part for n in native for part in _parts(model, n)], model.modules())
    with torch.inference_mode(), torch.autocast(model.device.type, enabled=False):
        memory = HugePages()
        packed = {n: model.stage_models[n].pack(weights, memory) for n in native}
        refused = frozenset(n for n in native if packed[n] is None)
        others = [n for n in range(count) if packed.get(n) is None]
        on_gpu = is_on_gpu(model.local_table)
        # A GPU multiplies by packs of eight weights.
        is_odd = any(model.start_token(n, 1).shape[-1] % 8 for n in native)
        if count - 1 in refused or (on_gpu and (others or is_odd)):
            return None
        hosts = {n: _host(model, n) for n in others}
        for n, host in hosts.items():
            packed[n] = _native.library().Stage.hosted(host.dim)
        stages = [packed[n] for n in range(count)]
        tensors, eps = _between(model, weights, hosts, memory)
        hierarchy = _native.library().Hierarchy(stages, list(model.seq_lens), tensors, eps)
    return Weights(hierarchy, hosts, refused, on_gpu, guard.holds)


def _between(
    model: Any, weights: str, hosts: Mapping[int, HostedStage], memory: HugePages
) -> tuple[list[Tensor], list[float]]:
    """All but the stages, as csrc/decode/torch/weights.h lists it."""
    tensors = [model.local_table, *pack_linear(model.to_logits, weights, memory)]
    tensors.append(model.empty_logits(1)[0, 0])
    eps: list[float] = []
    for n, seq_len in enumerate(model.seq_lens):
        tensors.append(model.start_token(n, 1)[0])
        if n in hosts:
            output = hosts[n].start_output
            tensors += [NONE, NONE, output[0], model.project_context(n, output[:, None])[0]]
            eps += [0.0, 0.0]
            continue
        positions: Any = model.pos_embs[n]
        fixed = positions.weight[:seq_len] if isinstance(positions, nn.Embedding) else NONE
        tensors += [fixed, positions.theta if isinstance(positions, RoPE) else NONE]
        if n + 1 < len(model.seq_lens):
            embedding, flat_norm, project, norm, context = model.parts_of_patches(n)
            tensors += [embedding.weight, flat_norm.weight, flat_norm.bias]
            tensors += pack_linear(project, weights, memory)
            tensors += [norm.weight, norm.bias, *pack_linear(context, weights, memory)]
            eps += [flat_norm.eps, norm.eps]
    return [tensor.detach().contiguous() for tensor in tensors], eps


def _guard(parts: list[Part], modules: Iterable[nn.Module] = ()) -> Any:
    """Watches what parts compute, and which modules and parameters others hold."""
    dicts: list[dict[str, Any]] = [part._buffers for part, _ in parts if part._buffers]
    dicts += [entries for of in modules for entries in (of._modules, of._parameters) if entries]
    hooks = [_global_forward_hooks, _global_forward_pre_hooks]
    return _native.library().Guard(parts, hooks, dicts)
