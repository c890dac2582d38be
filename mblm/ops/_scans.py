"""What the operators of the two Mamba scans share: checks, shapes of gradients, what is saved.

Both take ``(x, step sizes, A, B, C, D, initial_state or None, chunk_size)`` and return y, the final
state and the states before the chunks, from which the backward pass recomputes the others.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mblm.ops._library import Call


def check_tensors(
    expected: Mapping[str, tuple[Tensor | None, tuple[int, ...], torch.dtype]],
) -> None:
    """Refuse a tensor, given by its name, that has not the shape and the dtype beside it."""
    for name, (tensor, shape, dtype) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")


def fake(
    x: Tensor,
    _steps: Tensor,
    rates: Tensor,
    weight_in: Tensor,
    _weight_out: Tensor,
    _direct: Tensor,
    _initial_state: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y like x, and states of as many entries as a position has, times N."""
    rows, length, *widths = x.shape
    state = (*widths, weight_in.shape[2])
    num_chunks = -(-length // chunk_size)  # without a sum that may not fit
    states = rates.new_empty(rows, num_chunks, *state)
    return x.new_empty(x.shape), rates.new_empty(rows, *state), states


def backward_fake(
    grad_y: Tensor, grad_final_state: Tensor, *inputs: Tensor | int
) -> tuple[Tensor, ...]:
    """Gradients have the shapes of the six inputs and of the state."""
    *tensors, _chunk_states, _chunk_size = inputs
    shaped: Any = (*tensors, grad_final_state)
    return tuple(tensor.new_empty(tensor.shape) for tensor in shaped)


def derivable(step: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, ...]]:
    """A scan that takes one step after the other, as PyTorch can differentiate it."""

    def scan(
        x: Tensor,
        steps: Tensor,
        rates: Tensor,
        weight_in: Tensor,
        weight_out: Tensor,
        direct: Tensor,
        initial_state: Tensor | None,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        shape = (x.shape[0], *x.shape[2:], weight_in.shape[2])
        state = rates.new_zeros(shape) if initial_state is None else initial_state.clone()
        outputs, states = [x[:, :0]], [rates.new_zeros(shape)[:, None][:, :0]]
        for position in range(x.shape[1]):
            if position % chunk_size == 0:
                states.append(state[:, None])
            at = (t[:, position] for t in (x, steps, weight_in, weight_out))
            inputs, size, to_state, from_state = at
            y, state = step(inputs, size, rates, to_state, from_state, direct, state)
            outputs.append(y[:, None])
        return torch.cat(outputs, 1), state, torch.cat(states, 1)

    return scan


def gradient(operator: str) -> Callable[..., tuple[Tensor | None, ...]]:
    """The gradient of a scan, by the operator ``<operator>_backward``."""

    def backward(
        call: Call, grad_y: Tensor | None, grad_final_state: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *tensors, _, chunk_size = call.inputs
        (chunk_states,) = call.intermediates
        if grad_y is None:
            grad_y = torch.zeros_like(tensors[0])
        if grad_final_state is None:
            shape = (chunk_states.shape[0], *chunk_states.shape[2:])
            grad_final_state = chunk_states.new_zeros(shape)
        grads: tuple[Tensor, ...] = getattr(torch.ops.mblm, f"{operator}_backward")(
            grad_y, grad_final_state, *tensors, chunk_states, chunk_size
        )
        return grads

    return backward
