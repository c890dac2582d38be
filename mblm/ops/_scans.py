"""What the operators of the two Mamba scans share: checks, shapes of gradients, what is saved.

Both take ``(x, step sizes, A, B, C, D, initial_state or None, chunk_size)`` and return y, the final
state and the states before the chunks, from which the backward pass recomputes the others.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


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


def backward_fake(
    grad_y: Tensor, grad_final_state: Tensor, *inputs: Tensor | int
) -> tuple[Tensor, ...]:
    """Gradients have the shapes of the six inputs and of the state."""
    *tensors, _chunk_states, _chunk_size = inputs
    shaped: Any = (*tensors, grad_final_state)
    return tuple(tensor.new_empty(tensor.shape) for tensor in shaped)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save the inputs and the states before the chunks."""
    *tensors, initial_state, ctx.chunk_size = inputs
    _, final_state, chunk_states = output
    ctx.save_for_backward(*tensors, chunk_states)
    ctx.state_shape = final_state.shape
    ctx.has_initial_state = initial_state is not None
    ctx.mark_non_differentiable(chunk_states)
    ctx.set_materialize_grads(False)


def gradient(operator: str) -> Callable[..., tuple[Tensor | None, ...]]:
    """The gradient of a scan, by the operator ``<operator>_backward``."""

    def backward(
        ctx: Any, grad_y: Tensor | None, grad_final_state: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, steps, rates, *others = ctx.saved_tensors
        if grad_y is None:
            grad_y = torch.zeros_like(x)
        if grad_final_state is None:
            grad_final_state = rates.new_zeros(ctx.state_shape)
        *grads, grad_initial_state = getattr(torch.ops.mblm, f"{operator}_backward")(
            grad_y, grad_final_state, x, steps, rates, *others, ctx.chunk_size
        )
        return *grads, grad_initial_state if ctx.has_initial_state else None, None

    return backward
