"""Mamba-2's state-space product (SSD), in chunks of positions that carry a state.

Inside a chunk the recurrence is a masked matrix product over pairs of positions; between chunks
it is a state. Chunks are walked one after the other, so memory is bounded by one of them, and
the backward pass recomputes each from the state before it.
"""

# A, B, C and D are the paper's names.
# ruff: noqa: N803, N806

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mblm.ops._library import register_operator
from mblm.ops._scans import backward_fake, check_tensors, derivable, fake, gradient

# Entries of the (rows, H, T, T) and (rows, H, P, N) buffers of one group of rows.
_GROUP_ENTRIES = 2**21


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

    Raises:
        ValueError: A shape does not fit, or ``chunk_size`` is below 1.
        TypeError: A dtype does not fit.
    """
    _check(x, dt, A, B, C, D, initial_state, chunk_size)
    y, final_state, _ = torch.ops.mblm.ssd(x, dt, A, B, C, D, initial_state, chunk_size)
    return y, final_state


def ssd_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One position of :func:`ssd`; differentiable by PyTorch.

    Args:
        x: (B, H, P).
        dt: (B, H).
        A, D: (H,).
        B, C: (B, N).
        state: (B, H, P, N), left as it is.

    Returns:
        y (B, H, P) of x's dtype and the next state (B, H, P, N).
    """
    dtype = A.dtype
    inputs = x.to(dtype)
    decayed = (dt * A).exp()[..., None, None] * state
    state = decayed.addcmul((dt.unsqueeze(-1) * inputs).unsqueeze(-1), B.to(dtype)[:, None, None])
    y = (state * C.to(dtype)[:, None, None]).sum(-1).addcmul(inputs, D.unsqueeze(-1))
    return y.to(x.dtype), state


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor | None,
    chunk_size: int,
) -> None:
    if x.ndim != 4:
        raise ValueError(f"x must be (B, L, H, P), got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if A.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"A must be float32 or float64, got {A.dtype}")
    rows, length, heads, head_dim = x.shape
    if B.ndim != 3:
        raise ValueError(f"B must be ({rows}, {length}, N), got shape {tuple(B.shape)}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    num_states = B.shape[2]
    check_tensors(
        {
            "dt": (dt, (rows, length, heads), A.dtype),
            "A": (A, (heads,), A.dtype),
            "B": (B, (rows, length, num_states), x.dtype),
            "C": (C, (rows, length, num_states), x.dtype),
            "D": (D, (heads,), A.dtype),
            "initial_state": (initial_state, (rows, heads, head_dim, num_states), A.dtype),
        }
    )


class _Decays(NamedTuple):
    """The decays inside one chunk of T positions."""

    pairs: Tensor  # (R, H, T, T): from position j to i >= j, 0 above the diagonal
    since_start: Tensor  # (R, T, H): from the state before the chunk to each position
    until_end: Tensor  # (R, T, H): from each position to the state after the chunk
    total: Tensor  # (R, H): over the whole chunk


def _decays(dt: Tensor, A: Tensor) -> _Decays:
    """All decays of a chunk from dt (R, T, H) and A (H,).

    The sums of ``dt A`` are float64: a difference of two long sums must keep its digits.
    """
    sums = torch.cumsum(dt * A, dim=1, dtype=torch.float64)
    by_head = sums.transpose(1, 2)
    pairs = (by_head.unsqueeze(-1) - by_head.unsqueeze(-2)).to(A.dtype)
    length = dt.shape[1]
    later = torch.ones(length, length, dtype=torch.bool, device=dt.device).triu_(1)
    return _Decays(
        pairs=pairs.masked_fill_(later, -torch.inf).exp_(),
        since_start=sums.exp().to(A.dtype),
        until_end=(sums[:, -1:] - sums).exp().to(A.dtype),
        total=sums[:, -1].exp().to(A.dtype),
    )


def _row_groups(x: Tensor, num_states: int, chunk_size: int) -> Iterator[slice]:
    rows, length, heads, head_dim = x.shape
    span = min(length, chunk_size)
    per_row = heads * (span * span + head_dim * num_states)
    step = max(1, _GROUP_ENTRIES // max(per_row, 1))
    for row in range(0, rows, step):
        yield slice(row, row + step)


def _reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, length, heads, head_dim = x.shape
    num_states = B.shape[2]
    dtype = A.dtype
    starts = range(0, length, chunk_size)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    shape = (rows, heads, head_dim, num_states)
    chunk_states = A.new_empty(rows, len(starts), *shape[1:])
    final_state = A.new_zeros(shape)
    if initial_state is not None:
        final_state.copy_(initial_state)
    with torch.autocast(x.device.type, enabled=False):
        for r in _row_groups(x, num_states, chunk_size):
            state = final_state[r].flatten(1, 2)  # (R, H·P, N)
            for chunk, start in enumerate(starts):
                span = slice(start, start + chunk_size)
                chunk_states[r, chunk] = state.unflatten(1, (heads, head_dim))
                inputs, weight_in, weight_out = (t[r, span].to(dtype) for t in (x, B, C))
                step = dt[r, span]
                decays = _decays(step, A)
                scaled = inputs * step.unsqueeze(-1)  # (R, T, H, P)

                scores = weight_out @ weight_in.mT  # (R, T, T)
                mixing = decays.pairs.mul_(scores.unsqueeze(1))
                inside = (mixing @ scaled.transpose(1, 2)).transpose(1, 2)  # (R, T, H, P)
                before = (weight_out @ state.mT).view_as(inputs)
                out = inside.addcmul(before, decays.since_start.unsqueeze(-1))
                y[r, span] = out.addcmul_(inputs, D.unsqueeze(-1)).to(x.dtype)

                kept = state * decays.total.repeat_interleave(head_dim, dim=1).unsqueeze(-1)
                arriving = (scaled * decays.until_end.unsqueeze(-1)).flatten(2)  # (R, T, H·P)
                state = torch.baddbmm(kept, arriving.mT, weight_in)
            final_state[r] = state.unflatten(1, (heads, head_dim))
    return y, final_state, chunk_states


def _backward_reference(
    grad_y: Tensor,
    grad_final_state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    chunk_states: Tensor,
    chunk_size: int,
) -> tuple[Tensor, ...]:
    """The product rule on the chunked form, chunks walked backwards.

    With s_i the sum of ``dt A`` up to position i of the chunk, each decay is an exponential of
    s_i, s_j or the last s; their gradients are collected in ``grad_sums`` and summed from the
    end to give the gradient of each ``dt_t A``.
    """
    _, length, heads, head_dim = x.shape
    num_states = B.shape[2]
    dtype = A.dtype
    starts = range(0, length, chunk_size)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_dt = torch.empty_like(dt, memory_format=torch.contiguous_format)
    grad_A, grad_D = torch.zeros_like(A), torch.zeros_like(D)
    grad_B = torch.empty_like(B, memory_format=torch.contiguous_format)
    grad_C = torch.empty_like(C, memory_format=torch.contiguous_format)
    grad_state = grad_final_state.clone(memory_format=torch.contiguous_format)
    with torch.autocast(x.device.type, enabled=False):
        for r in _row_groups(x, num_states, chunk_size):
            carry = grad_state[r].flatten(1, 2)  # (R, H·P, N), gradient of the state after
            for chunk, start in reversed(list(enumerate(starts))):
                span = slice(start, start + chunk_size)
                before = chunk_states[r, chunk].flatten(1, 2)  # (R, H·P, N)
                inputs, weight_in, weight_out, grad_out = (
                    t[r, span].to(dtype) for t in (x, B, C, grad_y)
                )
                step = dt[r, span]
                decays = _decays(step, A)
                scaled = inputs * step.unsqueeze(-1)  # (R, T, H, P)
                arriving = scaled * decays.until_end.unsqueeze(-1)
                leaving = grad_out * decays.since_start.unsqueeze(-1)  # gradient of h C

                # Pairs of positions: y_i += pairs_ij (C_i · B_j) scaled_j.
                scores = weight_out @ weight_in.mT  # (R, T, T)
                grad_out_by_head = grad_out.transpose(1, 2)
                grad_mixing = grad_out_by_head @ scaled.transpose(1, 2).mT  # (R, H, T, T)
                grad_mixing.mul_(decays.pairs)
                grad_scores = grad_mixing.sum(1)
                mixing = decays.pairs.mul_(scores.unsqueeze(1))
                grad_scaled = (mixing.mT @ grad_out_by_head).transpose(1, 2)
                through = grad_mixing.mul_(scores.unsqueeze(1))
                grad_sums = (through.sum(-1) - through.sum(-2)).transpose(1, 2)  # (R, T, H)

                # Out of the state before, y_i += since_start_i (h C_i), and into the one after.
                carried = (weight_in @ carry.mT).view_as(inputs)
                grad_scaled = grad_scaled.addcmul(carried, decays.until_end.unsqueeze(-1))
                into = (arriving * carried).sum(-1)  # (R, T, H)
                out_of = (leaving * (weight_out @ before.mT).view_as(inputs)).sum(-1)
                kept = carry * decays.total.repeat_interleave(head_dim, dim=1).unsqueeze(-1)
                grad_total = (kept * before).sum(-1).unflatten(1, (heads, head_dim)).sum(-1)
                grad_sums = grad_sums + out_of - into
                grad_sums[:, -1] += into.sum(1) + grad_total
                grad_rates = grad_sums.flip(1).cumsum(1).flip(1)  # of dt A

                grad_C[r, span] = (
                    torch.baddbmm(grad_scores @ weight_in, leaving.flatten(2), before)
                ).to(C.dtype)
                grad_B[r, span] = (
                    torch.baddbmm(grad_scores.mT @ weight_out, arriving.flatten(2), carry)
                ).to(B.dtype)
                grad_dt[r, span] = grad_rates * A + (grad_scaled * inputs).sum(-1)
                grad_A += (grad_rates * step).sum((0, 1))
                grad_D += (grad_out * inputs).sum((0, 1, 3))
                grad_inputs = grad_scaled * step.unsqueeze(-1)
                grad_x[r, span] = grad_inputs.addcmul_(grad_out, D.unsqueeze(-1)).to(x.dtype)
                carry = torch.baddbmm(kept, leaving.flatten(2).mT, weight_out)
            grad_state[r] = carry.unflatten(1, (heads, head_dim))
    return grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_state


register_operator(
    "ssd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, Tensor? initial_state, "
    "int chunk_size) -> (Tensor y, Tensor final_state, Tensor chunk_states)",
    reference=_reference,
    fake=fake,
    derivable=derivable(ssd_step),
    backward=gradient("ssd"),
    intermediates=1,
)
register_operator(
    "ssd_backward(Tensor grad_y, Tensor grad_final_state, Tensor x, Tensor dt, Tensor A, "
    "Tensor B, Tensor C, Tensor D, Tensor chunk_states, int chunk_size) "
    "-> (Tensor grad_x, Tensor grad_dt, Tensor grad_A, Tensor grad_B, Tensor grad_C, "
    "Tensor grad_D, Tensor grad_initial_state)",
    reference=_backward_reference,
    fake=backward_fake,
)
