"""``linear_rows``: a linear map of a few rows; decoding is made of it and reads weights once."""

from typing import Any, NoReturn

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mblm.ops import _native
from mblm.ops._checks import check_floating, check_like, check_shape
from mblm.ops._library import register_operator

# Up to this many rows, reading the weights takes longer than multiplying them.
MAX_ROWS = 8


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, by the native kernel for few rows where no gradient is recorded.

    Args:
        x: ``(..., K)``.
        weight: ``(N, K)``.
        bias: ``(N,)`` or None.

    Returns:
        ``(..., N)``. A row's result does not depend on how many rows there are, up to `MAX_ROWS`.
    """
    few = 0 < x.numel() <= MAX_ROWS * x.shape[-1]
    if (
        few
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.float64, torch.bfloat16)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and _native.is_loaded()
    ):
        rows: Tensor = torch.ops.mblm.linear_rows(x.reshape(-1, x.shape[-1]), weight, bias)
        return rows.view(*x.shape[:-1], weight.shape[0])
    return F.linear(x, weight, bias)


def linear_rows_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x (B, K)`` and ``weight (N, K)`` to ``(B, N)``."""
    _check(x, weight, bias)
    return F.linear(x, weight, bias)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_floating("x", x)
    if x.dim() != 2:
        raise ValueError(f"x must have two dimensions, got {list(x.shape)}")
    if weight.dim() != 2:
        raise ValueError(f"weight must have two dimensions, got {list(weight.shape)}")
    check_shape("weight", weight, (weight.shape[0], x.shape[1]))
    check_like("weight", weight, "x", x)
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],))
        check_like("bias", bias, "x", x)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, weight, bias)
    return x.new_empty(x.shape[0], weight.shape[0])


def _backward(ctx: Any, grad: Tensor) -> NoReturn:
    raise NotImplementedError("linear_rows has no gradient; `linear` takes another way with one")


register_operator(
    "linear_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    reference=linear_rows_reference,
    fake=_fake,
    backward=_backward,
)
