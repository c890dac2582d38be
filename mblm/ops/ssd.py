"""Mamba-2's state-space product (SSD), in chunks of positions that carry a state.

Inside a chunk the recurrence is a masked matrix product over pairs of positions; between chunks
it is a state. Chunks are walked one after the other, so memory is bounded by one of them, and
the backward pass recomputes each from the state before it.
"""

# A, B, C and D are the paper's names.
# ruff: noqa: N803

import torch
from torch import Tensor

from mblm.ops._scans import register_scan


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor | None = None,
    *,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence of Mamba-2 (Dao and Gu 2024, https://arxiv.org/abs/2405.21060, sec. 6).

    For every head ``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_tᵀ`` and ``y_t = h_t C_t + D x_t``.
    Differentiable in every tensor argument.

    Args:
        x: (B, L, H, P) inputs of H heads, floating point.
        dt: (B, L, H) positive step sizes, of A's dtype.
        A: (H,) negative rates, float32 or float64: the dtype of the whole computation.
        B: (B, L, N) input weights, shared by the heads, of x's dtype.
        C: (B, L, N) output weights, shared by the heads, of x's dtype.
        D: (H,) weights of the direct path, of A's dtype.
        initial_state: (B, H, P, N) of A's dtype; zeros if None.
        chunk_size: Positions per chunk. It changes the cost, and the result by rounding alone.

    Returns:
        y (B, L, H, P) of x's dtype and the state after the last position, (B, H, P, N) of A's
        dtype.
    """
    y, final_state, _ = torch.ops.mblm.ssd(x, dt, A, B, C, D, initial_state, chunk_size)
    return y, final_state


def _chunk(
    x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Pairs of T positions as a matrix product, and what the state before gives and becomes.

    From x (R, T, H, P), dt (R, T, H), B and C (R, T, N), and the state before, (R, H, P, N).
    The sums of ``dt A`` are float64: a difference of two long sums must keep its digits.
    """
    inputs, weight_in, weight_out = (tensor.to(A.dtype) for tensor in (x, B, C))
    scaled = inputs * dt.unsqueeze(-1)
    sums = (dt * A).cumsum(1, dtype=torch.float64)  # (R, T, H)
    by_head = sums.mT
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
    between = (by_head.unsqueeze(-1) - by_head.unsqueeze(-2)).to(A.dtype)
    pairs = between.masked_fill(later, -torch.inf).exp()  # (R, H, T, T): from j to i >= j

    scores = weight_out @ weight_in.mT  # (R, T, T)
    inside = ((pairs * scores.unsqueeze(1)) @ scaled.transpose(1, 2)).transpose(1, 2)
    flat = state.flatten(1, 2)  # (R, H·P, N)
    before = (weight_out @ flat.mT).view_as(inputs)
    y = inside.addcmul(before, sums.exp().to(A.dtype).unsqueeze(-1))

    arriving = (scaled * (sums[:, -1:] - sums).exp().to(A.dtype).unsqueeze(-1)).flatten(2)
    kept = state * sums[:, -1].exp().to(A.dtype)[..., None, None]
    after = torch.baddbmm(kept.flatten(1, 2), arriving.mT, weight_in).view_as(state)
    return y.addcmul(inputs, D.unsqueeze(-1)).to(x.dtype), after


register_scan(
    "ssd",
    "dt",
    "x: B L H P float, A: H wide, dt: B L H A, B: B L N x, C: B L N x, D: H A, "
    "initial_state: B H P N A",
    "grad_y: B L H P x, grad_final_state: B H P N A, chunk_states: B c H P N A",
    _chunk,
)
