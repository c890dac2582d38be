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

from mblm.ops.selective_scan import selective_scan
from mblm.ops.ssd import ssd
from mblm.utils.transforms import is_transformed

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
            return _mamba2_by(kernel, inputs, state)
    return ssd(*inputs, state)


def _may_serve(x: Tensor, rates: Tensor) -> bool:
    is_plain = x.is_cuda and not is_transformed()
    return is_plain and x.shape[1] > 1 and rates.dtype == torch.float32


def _mamba1_by(
    kernel: Any, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> tuple[Tensor, Tensor]:
    """By mamba_ssm's ``selective_scan_fn``, which takes positions last."""
    x_t, delta_t, b_t, c_t = (t.float().mT.contiguous() for t in (x, delta, B, C))
    y, final_state = kernel(x_t, delta_t, A, b_t, c_t, D, return_last_state=True)
    return _differentiable_once(y).mT.to(x.dtype), final_state


def _mamba2_by(kernel: Any, inputs: Inputs, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """By mamba_ssm's ``mamba_chunk_scan_combined``."""
    x, dt, rates, weight_in, weight_out, direct = inputs
    y, final_state = kernel(
        *(x, dt, rates),
        weight_in.unsqueeze(2),  # one group for all heads
        weight_out.unsqueeze(2),
        _KERNEL_CHUNK_SIZE,
        D=direct,
        initial_states=state,
        return_final_states=True,
    )
    return _differentiable_once(y), final_state


def _differentiable_once(y: Tensor) -> Tensor:
    """Refuse second derivatives, which would be wrong: kernels' gradients count as constants."""
    if y.requires_grad and not torch.compiler.is_compiling():
        y.register_hook(_refuse_a_graph)
    return y


def _refuse_a_graph(_: Tensor) -> None:
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "mamba_ssm's kernels have no second derivatives (create_graph=True); take them on a "
            "CPU or in float64, where this package's own operators run"
        )


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
