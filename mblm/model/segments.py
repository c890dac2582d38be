"""A stage with a state on segments of positions, computed again in the backward pass."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from mblm.model.tiles import GradientSums, autocast_of, not_compiled


@not_compiled
def run_in_segments(model: Any, x: Tensor, segment: int) -> Tensor:
    """``model(x)`` of ``(B, S, D)``, of which the inputs and the states between segments are kept.

    Args:
        model: Has ``forward_with_state``, with a state of pairs of tensors, one for each layer.
        x: ``(B, S, D)``.
        segment: Positions that are computed at once, at least 1.
    """
    sums = GradientSums(model.parameters())
    out: Tensor = _InSegments.apply(model, segment, sums, x, *sums.parameters)
    return out


class _InSegments(torch.autograd.Function):
    """What is kept of a segment goes to tensors that are there before the next one's memory.

    Were it made between the large blocks that a segment takes and frees, malloc could not use these
    again for the next segment: memory would grow with each of them.
    """

    @staticmethod
    def forward(
        ctx: Any, model: Any, segment: int, sums: GradientSums, x: Tensor, *parameters: Tensor
    ) -> Tensor:
        parts = x.split(segment, dim=1)
        random = _RandomStates(len(parts), x.device)
        out, states, state = x, [], None
        for index, part in enumerate(parts):
            random.keep(index)
            result, state = model.forward_with_state(part, state)
            if index == 0:
                out = result.new_empty(*x.shape[:2], *result.shape[2:])
                states = [s.new_empty(len(parts) - 1, *s.shape) for s in _flat(state)]
            out[:, index * segment : index * segment + part.shape[1]] = result
            if index + 1 < len(parts):
                for kept, tensor in zip(states, _flat(state), strict=True):
                    kept[index] = tensor
                state = _in_pairs([kept[index] for kept in states])
        ctx.computation = model, segment, sums, random, autocast_of(x.device.type)
        ctx.save_for_backward(x, *states)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *states = ctx.saved_tensors
        model, segment, sums, random, autocast = ctx.computation
        starts = range(0, x.shape[1], segment)
        of_x = torch.empty_like(x) if ctx.needs_input_grad[3] else None
        of_state = [kept.new_zeros(kept.shape[1:]) for kept in states]  # after the segment
        with sums.adding():
            for index in reversed(range(len(starts))):
                positions = slice(starts[index], starts[index] + segment)
                part = x[:, positions].detach().requires_grad_(of_x is not None)
                before = [kept[index - 1].detach().requires_grad_() for kept in states if index]
                with random.as_at(index), torch.enable_grad(), autocast():
                    out, after = model.forward_with_state(part, _in_pairs(before) or None)
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
            of_parameters = sums.sums()
        return (
            *(None, None, None, of_x),
            *(
                None if gradient is None else gradient.to(parameter.dtype)
                for gradient, parameter in zip(of_parameters, sums.parameters, strict=True)
            ),
        )


class _RandomStates:
    """The random generators' states before each of so many segments."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._device = device
        self._kept = [state.new_empty(count, *state.shape) for state in self._now()]

    def _now(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self._device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self._device))
        return states

    def keep(self, index: int) -> None:
        for kept, state in zip(self._kept, self._now(), strict=True):
            kept[index] = state

    @contextlib.contextmanager
    def as_at(self, index: int) -> Iterator[None]:
        """Draw what was drawn there; those outside go on as if nothing had been."""
        on_gpu = self._device.type == "cuda"
        with torch.random.fork_rng([self._device] if on_gpu else []):
            states = [kept[index].clone() for kept in self._kept]  # torch takes no views
            torch.set_rng_state(states[0])
            if on_gpu:
                torch.cuda.set_rng_state(states[1], self._device)
            yield


def _flat(state: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [tensor for pair in state for tensor in pair]


def _in_pairs(tensors: list[Tensor]) -> tuple[tuple[Tensor, Tensor], ...]:
    return tuple(zip(tensors[::2], tensors[1::2], strict=True))
