"""The short depthwise causal convolution of the Mamba blocks, continuing from a window."""

import torch
from torch import Tensor


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor, window: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Convolve every channel over the positions up to and including its own.

    A few shifted products in plain PyTorch: with so few taps they outrun a general convolution
    in both directions, and they need no transposition.

    Args:
        x: (B, L, D).
        weight: (D, 1, K), as ``torch.nn.Conv1d`` with ``groups=D`` keeps it.
        bias: (D,).
        window: (B, K - 1, D), the inputs before x; zeros if None.

    Returns:
        (B, L, D) of x's dtype, and the next window (B, K - 1, D).

    Raises:
        ValueError: ``window`` does not fit.
    """
    rows, length, channels = x.shape
    taps = weight.shape[-1]
    if window is None:
        window = x.new_zeros(rows, taps - 1, channels)
    elif window.shape != (rows, taps - 1, channels):
        raise ValueError(
            f"window must have shape {(rows, taps - 1, channels)}, got {tuple(window.shape)}"
        )
    padded = torch.cat([window.to(x.dtype), x], dim=1)  # (B, K - 1 + L, D)
    kernel = weight.squeeze(1).to(x.dtype)  # (D, K)
    y = bias.to(x.dtype).expand_as(x)
    for tap in range(taps):
        y = torch.addcmul(y, padded[:, tap : tap + length], kernel[:, tap])
    return y, padded[:, length:].clone()
