"""``linear``: a linear map, each by the library or kernel that is fastest at its size."""

import functools

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from mblm.ops import _native
from mblm.ops._library import Call, register_operator

# Up to this many rows, reading the weights takes longer than multiplying them.
MAX_ROWS = 8
# Multiplications below which calling oneDNN takes longer than it saves.
_LARGE = 2**22
# Rows of a sum that products are made for at a time.
_ADDED_ROWS = 256


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, by a native kernel, by oneDNN or as PyTorch chooses.

    On a CPU, few rows without gradients take a kernel, if the weight is contiguous as that reads
    it; a large product of float32 matrices takes oneDNN where the CPU has AVX-512 and PyTorch's
    choice does not use it.

    Args:
        x: ``(..., K)``.
        weight: ``(N, K)``.
        bias: ``(N,)`` or None.

    Returns:
        ``(..., N)``. A row's result does not depend on how many rows there are, up to `MAX_ROWS`.
    """
    if _is_plain(x, weight):
        if 0 < x.numel() <= MAX_ROWS * x.shape[-1]:
            takes_ours = not torch.is_grad_enabled() and weight.is_contiguous()
        else:
            takes_ours = _suits_onednn(x, weight)
        if takes_ours:
            out: Tensor = torch.ops.mblm.linear(x.reshape(-1, x.shape[-1]), weight, bias)
            return out.view(*x.shape[:-1], weight.shape[0])
    return F.linear(x, weight, bias)


def add_outer_products(to: Tensor, a: Tensor, b: Tensor) -> None:
    """``to += a.T @ b``, without gradients and without memory as large as ``to``.

    Args:
        to: ``(N, K)``.
        a: ``(M, N)``.
        b: ``(M, K)``.
    """
    if _is_plain(a.T, b.T) and _suits_onednn(a.T, b.T):
        for columns, part in zip(a.split(_ADDED_ROWS, 1), to.split(_ADDED_ROWS), strict=True):
            part += torch.ops.mblm.linear(columns.T, b.T, None)
    else:
        to.addmm_(a.T, b)


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels can be taken: on plain CPU tensors that fit, nothing else asked.

    What does not fit is refused as ``torch.nn.Linear`` refuses it.
    """
    return (
        not torch.compiler.is_compiling()
        and x.device.type == weight.device.type == "cpu"
        and x.shape[-1:] == weight.shape[1:]
        and {type(x), type(weight)} <= {Tensor, nn.Parameter}
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.float64, torch.bfloat16)
        and not torch.is_autocast_enabled("cpu")
        and _native.is_loaded()
    )


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype == torch.float32
        and x.numel() * weight.shape[0] >= _LARGE
        and bool(torch.backends.mkldnn.enabled)
        and _onednn_is_faster()
    )


@functools.cache
def _onednn_is_faster() -> bool:
    return bool(torch.ops.mblm.onednn_is_faster())


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x (M, K)`` and ``weight (N, K)`` to ``(M, N)``."""
    return F.linear(x, weight, bias)


def _backward(call: Call, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, _ = call.inputs
    of_x, of_weight, of_bias = call.needed
    product = torch.ops.mblm.linear
    return (
        product(grad, weight.T, None) if of_x else None,
        product(grad.T, x.T, None) if of_weight else None,
        grad.sum(0) if of_bias else None,
    )


register_operator(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    linear_reference,
    arguments="x: M K float, weight: N K x, bias: N x",
    backward=_backward,
)
