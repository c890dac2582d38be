"""Mamba-1's selective scan, a linear recurrence over positions that takes and gives a state.

The reference works on tiles of rows and channels, which never interact, and on chunks of
positions: per chunk it forms all decays and inputs at once, then walks the positions in place.
The state before each chunk is kept, so that the backward pass recomputes one chunk at a time.
"""

# A, B, C and D are the paper's names.
# ruff: noqa: N803, N806

from collections.abc import Iterator

import torch
from torch import Tensor

from mblm.ops._library import register_operator
from mblm.ops._scans import backward_fake, check_tensors, derivable, fake, gradient

# Entries of a (chunk, rows, channels, N) buffer held at a time; one tile has up to three of them.
_TILE_ENTRIES = 2**21


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

    Raises:
        ValueError: A shape does not fit, or ``chunk_size`` is below 1.
        TypeError: A dtype does not fit.
    """
    _check(x, delta, A, B, C, D, initial_state, chunk_size)
    y, final_state, _ = torch.ops.mblm.selective_scan(
        x, delta, A, B, C, D, initial_state, chunk_size
    )
    return y, final_state


def selective_scan_step(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """One position of :func:`selective_scan`; differentiable by PyTorch.

    Args:
        x, delta: (B, D).
        A: (D, N).
        B, C: (B, N).
        D: (D,).
        state: (B, D, N), left as it is.

    Returns:
        y (B, D) of x's dtype and the next state (B, D, N).
    """
    dtype = A.dtype
    inputs = x.to(dtype)
    decayed = (delta.unsqueeze(-1) * A).exp() * state
    state = decayed.addcmul((delta * inputs).unsqueeze(-1), B.to(dtype).unsqueeze(1))
    y = (state * C.to(dtype).unsqueeze(1)).sum(-1).addcmul(inputs, D)
    return y.to(x.dtype), state


def _check(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor | None,
    chunk_size: int,
) -> None:
    if x.ndim != 3:
        raise ValueError(f"x must be (B, L, D), got shape {tuple(x.shape)}")
    if A.ndim != 2 or A.shape[0] != x.shape[2]:
        raise ValueError(f"A must be ({x.shape[2]}, N) to go with x, got shape {tuple(A.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if A.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"A must be float32 or float64, got {A.dtype}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    rows, length, channels = x.shape
    num_states = A.shape[1]
    check_tensors(
        {
            "delta": (delta, (rows, length, channels), A.dtype),
            "B": (B, (rows, length, num_states), x.dtype),
            "C": (C, (rows, length, num_states), x.dtype),
            "D": (D, (channels,), A.dtype),
            "initial_state": (initial_state, (rows, channels, num_states), A.dtype),
        }
    )


def _tiles(rows: int, channels: int, entries: int) -> Iterator[tuple[slice, slice]]:
    """Row and channel ranges such that ``entries`` per row and channel fit the tile bound."""
    entries = max(entries, 1)
    num_channels = max(1, min(channels, _TILE_ENTRIES // entries))
    num_rows = max(1, _TILE_ENTRIES // (num_channels * entries))
    for row in range(0, rows, num_rows):
        for channel in range(0, channels, num_channels):
            yield slice(row, row + num_rows), slice(channel, channel + num_channels)


def _time_first(tensor: Tensor, rows: slice, span: slice, dtype: torch.dtype) -> Tensor:
    """Rows and positions of a (B, L, K) tensor as (T, R, K)."""
    return tensor[rows, span].transpose(0, 1).to(dtype)


def _scan_chunk(
    step: Tensor, inputs: Tensor, weight_in: Tensor, rates: Tensor, state: Tensor, buffers: Tensor
) -> tuple[Tensor, Tensor]:
    """Decays and states after each position, both (T, R, C, N), in the two buffers.

    From delta and x (T, R, C), B (T, R, N), A (C, N) and the state before (R, C, N).
    """
    decay, states = buffers[:, : step.shape[0]]
    torch.mul(step.unsqueeze(-1), rates, out=decay).exp_()
    torch.mul((step * inputs).unsqueeze(-1), weight_in.unsqueeze(2), out=states)
    for position in range(states.shape[0]):
        state = states[position].addcmul_(decay[position], state)
    return decay, states


def _reference(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, length, channels = x.shape
    num_states = A.shape[1]
    dtype = A.dtype
    starts = range(0, length, chunk_size)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    chunk_states = A.new_empty(rows, len(starts), channels, num_states)
    final_state = A.new_zeros(rows, channels, num_states)
    if initial_state is not None:
        final_state.copy_(initial_state)
    with torch.autocast(x.device.type, enabled=False):
        for r, c in _tiles(rows, channels, min(length, chunk_size) * num_states):
            state = final_state[r, c].clone()
            buffers = A.new_empty(2, min(length, chunk_size), *state.shape)
            for chunk, start in enumerate(starts):
                span = slice(start, start + chunk_size)
                chunk_states[r, chunk, c] = state
                inputs = _time_first(x[..., c], r, span, dtype)
                step = _time_first(delta[..., c], r, span, dtype)
                weight_in = _time_first(B, r, span, dtype)
                _, states = _scan_chunk(step, inputs, weight_in, A[c], state, buffers)
                state = states[-1].clone()
                out = states.mul_(_time_first(C, r, span, dtype).unsqueeze(2)).sum(-1)
                y[r, span, c] = out.addcmul_(inputs, D[c]).transpose(0, 1).to(x.dtype)
            final_state[r, c] = state
    return y, final_state, chunk_states


def _backward_reference(
    grad_y: Tensor,
    grad_final_state: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    chunk_states: Tensor,
    chunk_size: int,
) -> tuple[Tensor, ...]:
    """The adjoint ``g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}``, walked backwards.

    With ``e_t = g_t exp(delta_t A) h_{t-1}``, the gradient of ``delta_t A``:
    dC_t = Σ_d dy_t h_t, dB_t = Σ_d g_t delta_t x_t, d(delta_t x_t) = Σ_n g_t B_t,
    dA = Σ_t e_t delta_t, ddelta_t = x_t d(delta_t x_t) + Σ_n e_t A.
    """
    rows, length, channels = x.shape
    num_states = A.shape[1]
    dtype = A.dtype
    starts = range(0, length, chunk_size)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_delta = torch.empty_like(delta, memory_format=torch.contiguous_format)
    grad_A = torch.zeros_like(A, memory_format=torch.contiguous_format)
    grad_B = A.new_zeros(rows, length, num_states)
    grad_C = A.new_zeros(rows, length, num_states)
    grad_D = torch.zeros_like(D, memory_format=torch.contiguous_format)
    grad_state = grad_final_state.clone(memory_format=torch.contiguous_format)
    with torch.autocast(x.device.type, enabled=False):
        for r, c in _tiles(rows, channels, min(length, chunk_size) * num_states):
            carry = grad_state[r, c].clone()  # gradient of the state after the chunk
            buffers = A.new_empty(3, min(length, chunk_size), *carry.shape)
            for chunk, start in reversed(list(enumerate(starts))):
                span = slice(start, start + chunk_size)
                before = chunk_states[r, chunk, c]
                inputs = _time_first(x[..., c], r, span, dtype)
                step = _time_first(delta[..., c], r, span, dtype)
                weight_in = _time_first(B, r, span, dtype)
                weight_out = _time_first(C, r, span, dtype)
                grad_out = _time_first(grad_y[..., c], r, span, dtype)
                decay, states = _scan_chunk(step, inputs, weight_in, A[c], before, buffers[:2])
                grad_C[r, span] += (grad_out.unsqueeze(2) @ states).squeeze(2).transpose(0, 1)

                adjoint = buffers[2, : step.shape[0]]  # (T, R, C, N)
                torch.mul(grad_out.unsqueeze(-1), weight_out.unsqueeze(2), out=adjoint)
                last = adjoint.shape[0] - 1
                adjoint[last] += carry
                for position in range(last - 1, -1, -1):
                    adjoint[position].addcmul_(decay[position + 1], adjoint[position + 1])
                carry = decay[0] * adjoint[0]

                # From here on decay holds e, and states is a buffer for products.
                decay[1:].mul_(states[:-1])
                decay[0].mul_(before)
                decay.mul_(adjoint)
                step_input = (step * inputs).unsqueeze(2)
                grad_B[r, span] += (step_input @ adjoint).squeeze(2).transpose(0, 1)
                product = torch.mul(adjoint, weight_in.unsqueeze(2), out=states)
                grad_step_input = product.sum(-1)  # (T, R, C)
                grad_step = torch.mul(decay, A[c], out=states).sum(-1)
                grad_A[c] += decay.mul_(step.unsqueeze(-1)).sum((0, 1))
                grad_delta[r, span, c] = grad_step.addcmul_(inputs, grad_step_input).transpose(0, 1)
                grad_D[c] += (grad_out * inputs).sum((0, 1))
                grad_inputs = (step * grad_step_input).addcmul_(grad_out, D[c])
                grad_x[r, span, c] = grad_inputs.transpose(0, 1).to(x.dtype)
            grad_state[r, c] = carry
    return grad_x, grad_delta, grad_A, grad_B.to(B.dtype), grad_C.to(C.dtype), grad_D, grad_state


register_operator(
    "selective_scan(Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, "
    "Tensor? initial_state, int chunk_size) "
    "-> (Tensor y, Tensor final_state, Tensor chunk_states)",
    reference=_reference,
    fake=fake,
    derivable=derivable(selective_scan_step),
    backward=gradient("selective_scan"),
    intermediates=1,
)
register_operator(
    "selective_scan_backward(Tensor grad_y, Tensor grad_final_state, Tensor x, Tensor delta, "
    "Tensor A, Tensor B, Tensor C, Tensor D, Tensor chunk_states, int chunk_size) "
    "-> (Tensor grad_x, Tensor grad_delta, Tensor grad_A, Tensor grad_B, Tensor grad_C, "
    "Tensor grad_D, Tensor grad_initial_state)",
    reference=_backward_reference,
    fake=backward_fake,
)
