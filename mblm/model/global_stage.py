"""How the most global stage keeps its activations: recomputed, or in the host's memory."""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mblm.model import recomputation
from mblm.model.gradients import with_weights_of_now
from mblm.model.plain import is_bare


def run_recomputed(model: Any, x: Tensor, *inputs: Tensor | None, segment: int) -> Tensor:
    """Run a stage model on ``(B, S, D)``, to be computed again piece by piece in the backward pass.

    A Transformer goes layer by layer, of which the inputs are kept; another stage with a state
    (``forward_with_state``) in segments of positions, of which the inputs and the states are kept;
    any other as a whole.
    """
    if getattr(model, "takes_recompute_layers", False):
        out: Tensor = model(x, *inputs, recompute_layers=True)
        return out
    # A hook is to see the call of the whole; FSDP's are not needed, see below.
    in_segments = is_bare(model) or getattr(model, "_is_fsdp_managed_module", False)
    if not inputs and in_segments and hasattr(model, "forward_with_state"):
        if getattr(model, "has_state_of_pairs", False) and recomputation.suits(model, x):
            return recomputation.run_in_segments(model, x, segment)
        _gather_for_segments(model)
        outputs, state = [], None
        run = with_weights_of_now(model, model.forward_with_state)
        for part in x.split(segment, dim=1):
            # What is offloaded comes back contiguous, and must be computed with as it was.
            part = part.contiguous()
            out, state = checkpoint(run, part, state, use_reentrant=False)
            outputs.append(out)
        return torch.cat(outputs, dim=1)
    run = with_weights_of_now(model, model)
    whole: Tensor = checkpoint(run, x, *inputs, use_reentrant=False)
    return whole


def _gather_for_segments(model: nn.Module) -> None:
    """Where FSDP shards the stage, have it gather the weights for this method as for a call."""
    if getattr(model, "_is_fsdp_managed_module", False):
        from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

        if isinstance(model, FSDPModule) and "forward_with_state" not in vars(model):
            register_fsdp_forward_method(model, "forward_with_state")


def saved_on_host() -> contextlib.AbstractContextManager[Any]:
    """Keep what is saved for the backward pass in the host's memory; weights stay where they are.

    On a GPU, the copies are in pinned memory, and the host does not wait for them.
    """

    def pack(tensor: Tensor) -> Any:
        if isinstance(tensor, nn.Parameter) or tensor.is_meta or not tensor.numel():
            return tensor
        pinned = tensor.device.type == "cuda"
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
        host.copy_(tensor, non_blocking=pinned)
        return tensor.device, host

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, host = packed
        return host.to(device, non_blocking=host.is_pinned())

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
