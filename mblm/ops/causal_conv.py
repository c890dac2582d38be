"""``causal_conv``: the short depthwise causal convolution of the Mamba blocks, and its SiLU."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mblm.ops._checks import (
    check_device,
    check_floating,
    check_like,
    check_shape,
    compute_dtype,
)
from mblm.ops._library import Call, register_operator


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

    Raises:
        TypeError: A dtype does not fit.
        ValueError: A shape or a device does not fit.
    """
    y, next_window = torch.ops.mblm.causal_conv(x, weight, bias, window)
    return y, next_window


def _check(x: Tensor, weight: Tensor, bias: Tensor, window: Tensor | None) -> None:
    check_floating("x", x)
    check_floating("weight", weight)
    if x.dim() != 3:
        raise ValueError(f"x must have shape [B, L, D], got {list(x.shape)}")
    rows, _, channels = x.shape
    if weight.dim() != 3 or weight.shape[:2] != (channels, 1) or weight.shape[2] < 1:
        raise ValueError(
            f"weight must have shape [{channels}, 1, K] with K >= 1, got {list(weight.shape)}"
        )
    check_shape("bias", bias, (channels,))
    check_like("bias", bias, "weight", weight)
    check_device("weight", weight, "x", x)
    if window is not None:
        check_shape("window", window, (rows, weight.shape[2] - 1, channels))
        check_like("window", window, "x", x)


def _extended(x: Tensor, weight: Tensor, window: Tensor | None) -> Tensor:
    """The window, or zeros, and x after it: (B, K - 1 + L, D)."""
    if window is None:
        window = x.new_zeros(x.shape[0], weight.shape[-1] - 1, x.shape[2])
    return torch.cat([window, x], dim=1)


def _convolve(extended: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, K - 1 + L, D), (D, K), (D,) to (B, L, D).

    A few shifted products: with so few taps they outrun a general convolution.
    """
    taps = weight.shape[1]
    length = extended.shape[1] - (taps - 1)
    y = bias.expand(extended.shape[0], length, -1)
    for tap in range(taps):
        y = torch.addcmul(y, extended[:, tap : tap + length], weight[:, tap])
    return y


def causal_conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor, window: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The specification of the native kernel."""
    _check(x, weight, bias, window)
    compute = compute_dtype(x.dtype)
    extended = _extended(x, weight, window)
    y = _convolve(extended.to(compute), weight.squeeze(1).to(compute), bias.to(compute))
    return F.silu(y).to(x.dtype), extended[:, x.shape[1] :].clone()


def causal_conv_backward_reference(
    grad_y: Tensor,
    grad_next_window: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    window: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and the window, which is computed again up to the SiLU."""
    _check_backward(grad_y, grad_next_window, x, weight, bias, window)
    compute = compute_dtype(x.dtype)
    length, taps = x.shape[1], weight.shape[-1]
    extended = _extended(x, weight, window).to(compute)
    kernel = weight.squeeze(1).to(compute)
    before = _convolve(extended, kernel, bias.to(compute))
    gate = before.sigmoid()
    grad = grad_y.to(compute) * gate * (1 + before * (1 - gate))  # (B, L, D)
    grad_extended = torch.zeros_like(extended)
    grad_kernel = torch.zeros_like(kernel)
    for tap in range(taps):
        span = slice(tap, tap + length)
        grad_extended[:, span].addcmul_(grad, kernel[:, tap])
        grad_kernel[:, tap] = (grad * extended[:, span]).sum((0, 1))
    if grad_next_window is not None:
        grad_extended[:, length:] += grad_next_window
    grad_window, grad_x = grad_extended.split([taps - 1, length], dim=1)
    return (
        _own(grad_x, x.dtype),
        grad_kernel.unsqueeze(1).to(weight.dtype),
        grad.sum((0, 1)).to(bias.dtype),
        _own(grad_window, x.dtype),
    )


def _own(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy."""
    return torch.empty(tensor.shape, dtype=dtype, device=tensor.device).copy_(tensor)


def _check_backward(
    grad_y: Tensor,
    grad_next_window: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    window: Tensor | None,
) -> None:
    _check(x, weight, bias, window)
    check_shape("grad_y", grad_y, tuple(x.shape))
    check_like("grad_y", grad_y, "x", x)
    if grad_next_window is not None:
        shape = (x.shape[0], weight.shape[-1] - 1, x.shape[2])
        check_shape("grad_next_window", grad_next_window, shape)
        check_like("grad_next_window", grad_next_window, "x", x)


def _fake(x: Tensor, weight: Tensor, bias: Tensor, window: Tensor | None) -> tuple[Tensor, Tensor]:
    _check(x, weight, bias, window)
    return x.new_empty(x.shape), x.new_empty(x.shape[0], weight.shape[-1] - 1, x.shape[2])


def _backward_fake(
    grad_y: Tensor,
    grad_next_window: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    window: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_backward(grad_y, grad_next_window, x, weight, bias, window)
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        bias.new_empty(bias.shape),
        x.new_empty(x.shape[0], weight.shape[-1] - 1, x.shape[2]),
    )


def _backward(
    call: Call, grad_y: Tensor | None, grad_next_window: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, *_, window = call.inputs
    if grad_y is None:
        grad_y = torch.zeros_like(x)
    *grads, grad_window = torch.ops.mblm.causal_conv_backward(
        grad_y, grad_next_window, *call.inputs
    )
    return *grads, grad_window if window is not None else None


register_operator(
    "causal_conv(Tensor x, Tensor weight, Tensor bias, Tensor? window) "
    "-> (Tensor y, Tensor next_window)",
    reference=causal_conv_reference,
    fake=_fake,
    derivable=causal_conv_reference,
    backward=_backward,
)
register_operator(
    "causal_conv_backward(Tensor grad_y, Tensor? grad_next_window, Tensor x, Tensor weight, "
    "Tensor bias, Tensor? window) "
    "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_window)",
    reference=causal_conv_backward_reference,
    fake=_backward_fake,
)
