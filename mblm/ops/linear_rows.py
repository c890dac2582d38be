"""``linear_rows``: a linear map of a few rows; decoding is made of it and reads weights once."""

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mblm.ops._checks import check_floating, check_like, check_shape
from mblm.ops._library import register_operator

# Up to this many rows, reading the weights takes longer than multiplying them.
MAX_ROWS = 8


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x (M, K)`` and ``weight (N, K)`` to ``(M, N)``."""
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


register_operator(
    "linear_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    reference=linear_reference,
    derivable=linear_reference,
)
