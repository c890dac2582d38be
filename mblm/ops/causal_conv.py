"""``causal_conv``: the short depthwise causal convolution of the Mamba blocks, and its SiLU."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mblm.ops._library import compute_dtype, register_operator


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor, window: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Convolve every channel over the positions up to and including its own, then apply SiLU.

    With ``e = concat(window, x)`` along the positions, ``y_t = silu(bias + Σ_k weight_k e_{t+k})``
    (Gu and Dao 2023, https://arxiv.org/abs/2312.00752, sec. 3.4). Computed in float32 (float64 for
    float64) and rounded once. Differentiable in every argument.

    Args:
        x: (B, L, D), floating point, any strides.
        weight: (D, 1, K), as ``torch.nn.Conv1d`` with ``groups=D`` keeps it, floating point.
        bias: (D,), of weight's dtype.
        window: (B, K - 1, D) of x's dtype, the inputs before x; zeros if None.

    Returns:
        (B, L, D) of x's dtype, and the next window (B, K - 1, D), a copy.
    """
    y, next_window = torch.ops.mblm.causal_conv(x, weight, bias, window)
    return y, next_window


def causal_conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor, window: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The specification of the native kernel."""
    length, taps, compute = x.shape[1], weight.shape[2], compute_dtype(x.dtype)
    if window is None:
        window = x.new_zeros(x.shape[0], taps - 1, x.shape[2])
    extended = torch.cat([window, x], dim=1)  # (B, K - 1 + L, D)
    inputs, kernel = extended.to(compute), weight.squeeze(1).to(compute)
    y = bias.to(compute).expand(x.shape)
    for tap in range(taps):  # with so few, products outrun a general convolution
        y = torch.addcmul(y, inputs[:, tap : tap + length], kernel[:, tap])
    return F.silu(y).to(x.dtype).contiguous(), extended[:, length:].clone()


_ARGUMENTS = "x: B L D float, weight: D 1 K float, bias: D weight, window: B K-1 D x"
register_operator(
    "causal_conv(Tensor x, Tensor weight, Tensor bias, Tensor? window) "
    "-> (Tensor y, Tensor next_window)",
    causal_conv_reference,
    "causal_conv_backward(Tensor grad_y, Tensor? grad_next_window, Tensor x, Tensor weight, "
    "Tensor bias, Tensor? window) "
    "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_window)",
    arguments=_ARGUMENTS,
    gradient_arguments=f"{_ARGUMENTS}, grad_y: B L D x, grad_next_window: B K-1 D x",
)
