"""Where the Mamba stages choose between mamba_ssm's CUDA kernels and this package's operators."""

# A, B, C and D are the paper's names.
# ruff: noqa: N803

import functools
import importlib
import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor

from mblm.model.derivatives import with_derivatives
from mblm.ops.selective_scan import selective_scan
from mblm.ops.ssd import ssd

# What is scanned, step sizes, A, B, C and D.
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

# Positions per chunk of mamba_ssm's kernel, its own default.
_KERNEL_CHUNK_SIZE = 256


def mamba1_scan(inputs: Inputs, state: Tensor | None, *, y_only: bool) -> tuple[Tensor, Tensor]:
    """:func:`mblm.ops.selective_scan.selective_scan`, by mamba_ssm's kernel where it serves.

    That kernel takes no initial state and gives no gradient to the final one: ``y_only`` says
    that none will be asked for.
    """
    x, _, rates, *_ = inputs
    serves = _may_serve(x, rates) and rates.shape[1] <= 256
    if serves and state is None and (y_only or not torch.is_grad_enabled()):
        kernel = _mamba_ssm("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
        if kernel is not None:
            return _mamba1_by(kernel, *inputs)
    return selective_scan(*inputs, state)


def mamba2_scan(inputs: Inputs, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """:func:`mblm.ops.ssd.ssd`, by mamba_ssm's kernel where it serves."""
    x, _, rates, *_ = inputs
    if _may_serve(x, rates):
        kernel = _mamba_ssm("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
        if kernel is not None:
            return _mamba2_by(kernel, *inputs, *(() if state is None else (state,)))
    return ssd(*inputs, state)


def _may_serve(x: Tensor, rates: Tensor) -> bool:
    return x.is_cuda and x.shape[1] > 0 and rates.dtype == torch.float32


def _mamba1_by(
    kernel: Any, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> tuple[Tensor, Tensor]:
    """By mamba_ssm's ``selective_scan_fn``, which takes positions last."""

    def own(
        x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
    ) -> tuple[Tensor, Tensor]:
        y, final_state = selective_scan(x.mT, delta.mT, A, B.mT, C.mT, D)
        return y.mT, final_state

    run = functools.partial(kernel, return_last_state=True)
    x_t, delta_t, b_t, c_t = (t.float().mT.contiguous() for t in (x, delta, B, C))
    y, final_state = with_derivatives(run, own, x_t, delta_t, A, b_t, c_t, D)
    return y.mT.to(x.dtype), final_state


def _mamba2_by(kernel: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """By mamba_ssm's ``mamba_chunk_scan_combined``; a state may be the last input."""

    def run(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *state: Tensor
    ) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = kernel(
            x,
            dt,
            A,
            B.unsqueeze(2),  # one group for all heads
            C.unsqueeze(2),
            _KERNEL_CHUNK_SIZE,
            D=D,
            initial_states=state[0] if state else None,
            return_final_states=True,
        )
        return out

    out: tuple[Tensor, Tensor] = with_derivatives(run, ssd, *inputs)
    return out


@functools.cache
def _mamba_ssm(module: str, name: str) -> Any | None:
    """A function of mamba_ssm, or None where it is not installed or (with a warning) broken."""
    if importlib.util.find_spec("mamba_ssm") is None:
        return None
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        warnings.warn(
            f"mamba_ssm is installed but {module} cannot be imported ({error}); "
            "mblm's own operators run instead",
            stacklevel=2,
        )
        return None
