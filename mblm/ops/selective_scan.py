"""Mamba-1's selective scan, a linear recurrence over positions that takes and gives a state.

The state before each chunk of positions is kept, so that the backward pass recomputes one chunk at
a time; see `mblm.ops._scans`.
"""

# A, B, C and D are the paper's names.
# ruff: noqa: N803

import torch
from torch import Tensor

from mblm.ops._scans import register_scan


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor | None = None,
    *,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence of Mamba (Gu and Dao 2023, https://arxiv.org/abs/2312.00752, eq. 2).

    ``h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t`` and ``y_t = C_t · h_t + D x_t``, for every
    channel on its own. Differentiable in every tensor argument.

    Args:
        x: (B, L, D) inputs, floating point.
        delta: (B, L, D) positive step sizes, of A's dtype.
        A: (D, N) negative rates, float32 or float64: the dtype of the whole computation.
        B: (B, L, N) input weights, of x's dtype.
        C: (B, L, N) output weights, of x's dtype.
        D: (D,) weights of the direct path, of A's dtype.
        initial_state: (B, D, N) of A's dtype; zeros if None.
        chunk_size: Positions between two states that are kept for the backward pass.

    Returns:
        y (B, L, D) of x's dtype and the state after the last position, (B, D, N) of A's dtype.
    """
    inputs = (x, delta, A, B, C, D, initial_state, chunk_size)
    y, final_state, _ = torch.ops.mblm.selective_scan(*inputs)
    return y, final_state


def _chunk(
    x: Tensor, delta: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """All decays and inputs of T positions at once, then one position after the other.

    From x and delta (R, T, D), B and C (R, T, N), and the state before, (R, D, N).
    """
    inputs, weight_in, weight_out = (tensor.to(A.dtype) for tensor in (x, B, C))
    decays = (delta.unsqueeze(-1) * A).exp()  # (R, T, D, N)
    arriving = (delta * inputs).unsqueeze(-1) * weight_in.unsqueeze(2)
    states = []
    for decay, new in zip(decays.unbind(1), arriving.unbind(1), strict=True):
        state = new.addcmul(decay, state)
        states.append(state)
    y = (torch.stack(states, 1) @ weight_out.unsqueeze(-1)).squeeze(-1).addcmul(inputs, D)
    return y.to(x.dtype), state


register_scan(
    "selective_scan",
    "delta",
    "x: B L D float, A: D N wide, delta: B L D A, B: B L N x, C: B L N x, D: D A, "
    "initial_state: B D N A",
    "grad_y: B L D x, grad_final_state: B D N A, chunk_states: B c D N A",
    _chunk,
)
