"""A stage on a CPU that is computed again in the backward pass, piece by piece.

What is kept of a piece, its input above all, goes to tensors that are there before the first piece
is computed, and no graph is kept: small blocks between the large ones that a piece takes and frees
keep malloc from using these again for the next piece, and memory grows with every one.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mblm.model.gradients import (
    GradientSums,
    gradients_are_watched,
    once_differentiable,
    with_weights_of_now,
)
from mblm.utils.modes import autocast_of
from mblm.utils.transforms import is_traced, not_compiled


def suits(model: nn.Module, x: Tensor) -> bool:
    """Whether a stage goes this way: where malloc gives the memory, and nothing is traced.

    Nor does a stage whose gradients are watched, since here they are not made by its own graph.
    """
    return x.device.type == "cpu" and not is_traced() and not gradients_are_watched(model)


@not_compiled
def run_in_segments(model: Any, x: Tensor, segment: int) -> Tensor:
    """``model(x)``, of which the inputs and the states between segments of positions are kept.

    Args:
        model: Has ``forward_with_state``, with a state of pairs of tensors, one for each layer.
        x: ``(B, S, D)``.
        segment: Positions that are computed at once, at least 1.
    """
    sums = GradientSums(model.parameters())
    run = with_weights_of_now(model, model.forward_with_state)
    out: Tensor = _InSegments.apply(run, segment, sums, x, *sums.parameters)
    return out


@not_compiled
def run_in_layers(
    layers: Sequence[Callable[[Tensor], Tensor]], parameters: Iterable[nn.Parameter], x: Tensor
) -> Tensor:
    """The layers one after the other, of which the inputs are kept.

    Args:
        layers: Each maps ``(B, S, D)`` to the same shape and type.
        parameters: All that the layers compute with.
        x: ``(B, S, D)``.
    """
    sums = GradientSums(parameters)
    out: Tensor = _InLayers.apply(layers, sums, x, *sums.parameters)
    return out


class _InSegments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[..., Any],
        segment: int,
        sums: GradientSums,
        x: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        starts = range(0, x.shape[1], segment)
        ctx.circumstances = _Circumstances(len(starts))
        ctx.computation = run, segment, sums
        out, states, state = x, [], None
        for index, start in enumerate(starts):
            ctx.circumstances.keep(index)
            positions = slice(start, start + segment)
            result, state = run(x[:, positions], state)
            if index == 0:
                out = result.new_empty(*x.shape[:2], *result.shape[2:])
                states = [s.new_empty(len(starts) - 1, *s.shape) for s in _flat(state)]
            out[:, positions] = result
            if index + 1 < len(starts):
                for kept, tensor in zip(states, _flat(state), strict=True):
                    kept[index] = tensor
                state = _in_pairs([kept[index] for kept in states])
        ctx.save_for_backward(x, *states)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *states = ctx.saved_tensors
        run, segment, sums = ctx.computation
        starts = range(0, x.shape[1], segment)
        of_x = torch.empty_like(x) if ctx.needs_input_grad[3] else None
        of_state = [kept.new_zeros(kept.shape[1:]) for kept in states]  # after the segment
        with sums.adding():
            for index in reversed(range(len(starts))):
                positions = slice(starts[index], starts[index] + segment)
                part = x[:, positions].detach().requires_grad_(of_x is not None)
                before = [kept[index - 1].detach().requires_grad_() for kept in states if index]
                with ctx.circumstances.of(index):
                    out, after = run(part.view_as(part), _in_pairs(before) or None)
                results = [(out, grad[:, positions])]
                if index + 1 < len(starts):
                    results += zip(_flat(after), of_state, strict=True)
                outs, gradients = zip(*(r for r in results if r[0].requires_grad), strict=True)
                inputs = [part, *before] if part.requires_grad else before
                found = list(sums.add_gradients(outs, gradients, inputs))
                if of_x is not None:
                    of_x[:, positions] = found.pop(0)
                for kept, gradient in zip(of_state, found, strict=False):
                    kept.zero_() if gradient is None else kept.copy_(gradient)
            of_parameters = sums.in_types_of_parameters()
        return None, None, None, of_x, *of_parameters


class _InLayers(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layers: Sequence[Callable[[Tensor], Tensor]],
        sums: GradientSums,
        x: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.circumstances = _Circumstances(len(layers))
        ctx.computation = layers, sums
        kept = [x, *(torch.empty_like(x) for _ in layers)]
        for index, layer in enumerate(layers):
            ctx.circumstances.keep(index)
            kept[index + 1].copy_(layer(kept[index]))
        ctx.save_for_backward(*kept[:-1])
        return kept[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layers, sums = ctx.computation
        inputs = ctx.saved_tensors  # at once: activation checkpointing gives them one time only
        grad = grad.clone()
        with sums.adding():
            for index in reversed(range(len(layers))):
                is_needed = index > 0 or ctx.needs_input_grad[2]
                x = inputs[index].detach().requires_grad_(is_needed)
                with ctx.circumstances.of(index):
                    out = layers[index](x.view_as(x))
                found = sums.add_gradients(out, grad, [x] if is_needed else [])
                for gradient in found:
                    grad.copy_(gradient)
            of_parameters = sums.in_types_of_parameters()
        return None, None, grad if ctx.needs_input_grad[2] else None, *of_parameters


class _Circumstances:
    """What so many pieces are computed under: the random generator's states, autocast."""

    def __init__(self, count: int) -> None:
        state = torch.get_rng_state()
        self._states = state.new_empty(count, *state.shape)
        self._autocast = autocast_of("cpu")

    def keep(self, index: int) -> None:
        self._states[index] = torch.get_rng_state()

    @contextlib.contextmanager
    def of(self, index: int) -> Iterator[None]:
        """Compute piece ``index`` again, with a graph; the generator goes on as if one had not.

        What goes in is a view of a leaf: PyTorch refuses the hooks of a FLOP counter on a leaf.
        """
        with torch.random.fork_rng([]), torch.enable_grad(), self._autocast():
            torch.set_rng_state(self._states[index].clone())  # torch reads a view from its base on
            yield


def _flat(state: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [tensor for pair in state for tensor in pair]


def _in_pairs(tensors: list[Tensor]) -> tuple[tuple[Tensor, Tensor], ...]:
    return tuple(zip(tensors[::2], tensors[1::2], strict=True))
