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


def register_scan(name: str, steps: str, arguments: str, grads: str, chunk: Chunk) -> None:
    """Register a scan and its gradient.

    Args:
        name: Its name.
        steps: What its step sizes are called.
        arguments: What they are to be, the last of them the state; see `register_operator`.
        grads: What else the arguments of the gradient are to be.
        chunk: See above.
    """
    tensors = f"Tensor x, Tensor {steps}, Tensor A, Tensor B, Tensor C, Tensor D"
    gradients = ", ".join(f"Tensor grad_{of}" for of in ("x", steps, *"ABCD", "initial_state"))
    register_operator(
        f"{name}({tensors}, Tensor? initial_state, int chunk_size) "
        "-> (Tensor y, Tensor final_state, Tensor chunk_states)",
        reference(chunk),
        f"{name}_backward(Tensor grad_y, Tensor grad_final_state, {tensors}, Tensor chunk_states, "
        f"int chunk_size) -> ({gradients})",
        backward_reference(chunk),
        arguments=f"{arguments}, chunk_size: >= 1",
        gradient_arguments=f"{arguments.rpartition(',')[0]}, {grads}, chunk_size: >= 1",
        fakes=(_fake, _backward_fake),
        intermediates=1,
    )


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """y like x, and states of as many entries as a position has, times N."""
    x, _, rates, weight_in, _, _, _, chunk_size = arguments
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

    def scan(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, steps, rates, weight_in, weight_out, direct, initial_state, chunk_size = arguments
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

    def backward(grad_y: Tensor, grad_final_state: Tensor, *kept: Any) -> tuple[Tensor, ...]:
        x, steps, rates, weight_in, weight_out, direct, chunk_states, chunk_size = kept
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
