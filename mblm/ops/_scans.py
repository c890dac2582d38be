"""What the operators of the two Mamba scans share: the walk over chunks of positions, and checks.

Both take ``(x, step sizes, A, B, C, D, initial_state or None, chunk_size)`` and return y, the final
state and the states before the chunks, from which the backward pass computes one chunk at a time
again. What a chunk computes is each operator's own, by ``chunk(x, step sizes, B, C, A, D, state)``,
which gives its y and the state after it, differentiable by PyTorch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mblm.ops._library import as_outside, register_operator
from mblm.utils.modes import without_autocast

Chunk = Callable[..., tuple[Tensor, Tensor]]


def register_scan(
    name: str, steps: str, x_shape: str, rates_shape: str, chunk: Chunk
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Register a scan and its gradient.

    Args:
        name: Its name.
        steps: What its step sizes are called.
        x_shape: The names of x's dimensions.
        rates_shape: Those of A's.
        chunk: See above.

    Returns:
        The scan, which checks its arguments and gives y and the final state.
    """
    tensors = f"Tensor x, Tensor {steps}, Tensor A, Tensor B, Tensor C, Tensor D"
    gradients = ", ".join(f"Tensor grad_{of}" for of in ("x", steps, *"ABCD", "initial_state"))
    register_operator(
        f"{name}({tensors}, Tensor? initial_state, int chunk_size) "
        "-> (Tensor y, Tensor final_state, Tensor chunk_states)",
        reference=reference(chunk),
        fake=_fake,
        derivable=reference(chunk),
        backward=f"{name}_backward",
        intermediates=1,
    )
    register_operator(
        f"{name}_backward(Tensor grad_y, Tensor grad_final_state, {tensors}, Tensor chunk_states, "
        f"int chunk_size) -> ({gradients})",
        reference=backward_reference(chunk),
        fake=_backward_fake,
    )

    def scan(*arguments: Any) -> tuple[Tensor, Tensor]:
        _check(steps, x_shape, rates_shape, *arguments)
        y, final_state, _ = getattr(torch.ops.mblm, name)(*arguments)
        return y, final_state

    return scan


def _check(
    steps: str,
    x_shape: str,
    rates_shape: str,
    x: Tensor,
    step_sizes: Tensor,
    rates: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    direct: Tensor,
    initial_state: Tensor | None,
    chunk_size: int,
) -> None:
    if x.ndim != len(x_shape.split(",")):
        raise ValueError(f"x must be ({x_shape}), got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if rates.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"A must be float32 or float64, got {rates.dtype}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    rows, length, *widths = x.shape
    width, in_rates = widths[0], rates_shape == "D, N"
    if in_rates and (rates.ndim != 2 or rates.shape[0] != width):
        raise ValueError(f"A must be ({width}, N) to go with x, got shape {tuple(rates.shape)}")
    if weight_in.ndim != 3:
        raise ValueError(f"B must be ({rows}, {length}, N), got shape {tuple(weight_in.shape)}")
    num_states = rates.shape[1] if in_rates else weight_in.shape[2]
    weights, dtype = (rows, length, num_states), rates.dtype
    expected = {
        steps: (step_sizes, (rows, length, width), dtype),
        "A": (rates, (width, num_states) if in_rates else (width,), dtype),
        "B": (weight_in, weights, x.dtype),
        "C": (weight_out, weights, x.dtype),
        "D": (direct, (width,), dtype),
        "initial_state": (initial_state, (rows, *widths, num_states), dtype),
    }
    for name, (tensor, shape, wanted) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != wanted:
            raise TypeError(f"{name} must be {wanted}, got {tensor.dtype}")


def _fake(
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


def _backward_fake(
    grad_y: Tensor, grad_final_state: Tensor, *inputs: Tensor | int
) -> tuple[Tensor, ...]:
    """Gradients have the shapes of the six inputs and of the state."""
    *tensors, _chunk_states, _chunk_size = inputs
    shaped: Any = (*tensors, grad_final_state)
    return tuple(tensor.new_empty(tensor.shape) for tensor in shaped)


def reference(chunk: Chunk) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """A scan as its chunks one after the other; PyTorch can differentiate it."""

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
        with without_autocast(x.device.type):
            for span in _spans(x, chunk_size):
                states.append(state[:, None])
                given = (tensor[:, span] for tensor in (x, steps, weight_in, weight_out))
                y, state = chunk(*given, rates, direct, state)
                outputs.append(y)
        return torch.cat(outputs, 1), state.contiguous(), torch.cat(states, 1)

    return scan


def backward_reference(chunk: Chunk) -> Callable[..., tuple[Tensor, ...]]:
    """The gradient of a scan: chunks backwards, each computed again from the state before it."""

    def backward(
        grad_y: Tensor,
        grad_final_state: Tensor,
        x: Tensor,
        steps: Tensor,
        rates: Tensor,
        weight_in: Tensor,
        weight_out: Tensor,
        direct: Tensor,
        chunk_states: Tensor,
        chunk_size: int,
    ) -> tuple[Tensor, ...]:
        by_position = (x, steps, weight_in, weight_out)
        grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in by_position]
        grad_rates, grad_direct = (
            torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (rates, direct)
        )
        carry = grad_final_state.clone(memory_format=torch.contiguous_format)
        spans = list(enumerate(_spans(x, chunk_size)))
        with as_outside(), without_autocast(x.device.type), torch.enable_grad():
            for index, span in reversed(spans):
                given = [tensor[:, span] for tensor in by_position]
                given += [rates, direct, chunk_states[:, index]]
                leaves = [tensor.detach().requires_grad_() for tensor in given]
                *of_positions, of_rates, of_direct, carry = torch.autograd.grad(
                    chunk(*leaves), leaves, (grad_y[:, span], carry)
                )
                for grad, part in zip(grads, of_positions, strict=True):
                    grad[:, span] = part
                grad_rates += of_rates
                grad_direct += of_direct
        grad_x, grad_steps, grad_in, grad_out = grads
        carry = carry.contiguous()
        return grad_x, grad_steps, grad_rates, grad_in, grad_out, grad_direct, carry

    return backward


def _spans(x: Tensor, chunk_size: int) -> list[slice]:
    return [slice(start, start + chunk_size) for start in range(0, x.shape[1], chunk_size)]
