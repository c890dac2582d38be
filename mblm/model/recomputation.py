"""How the most global stage keeps its activations: computed again, or in the host's memory.

On a CPU, what is kept of a piece, its input above all, goes to tensors that are there before the
first piece is computed, and no graph is kept: small blocks between the large ones that a piece
takes and frees keep malloc from using these again for the next piece, and memory grows with every
one.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from mblm.model.gradients import (
    GradientSums,
    gradients_are_watched,
    once_differentiable,
    with_weights_of_now,
)
from mblm.model.plain import is_bare
from mblm.utils.modes import autocast_of
from mblm.utils.transforms import is_traced

# What a state that is kept between segments may consist of.
_OF_STATE = (Tensor, int, float, str, type(None))


def run_recomputed(model: Any, x: Tensor, *inputs: Tensor | None, segment: int) -> Tensor:
    """Run a stage model on ``(B, S, D)``, to be computed again piece by piece in the backward pass.

    A Transformer goes layer by layer, of which the inputs are kept; another stage with a state
    (``forward_with_state``) in segments of positions, of which the inputs and the states are kept;
    any other as a whole.
    """
    if getattr(model, "takes_recompute_layers", False):
        out: Tensor = model(x, *inputs, recompute_layers=True)
        return out
    # A hook is to see the call of the whole; FSDP's are not needed, see below.
    in_segments = is_bare(model) or getattr(model, "_is_fsdp_managed_module", False)
    if inputs or not in_segments or not hasattr(model, "forward_with_state"):
        whole: Tensor = checkpoint(
            with_weights_of_now(model, model), x, *inputs, use_reentrant=False
        )
        return whole
    if getattr(model, "is_recurrent", False) and _suits(model, x):
        sums = GradientSums(model.parameters())
        run = with_weights_of_now(model, model.forward_with_state)
        return run_in_segments(run, sums, x, segment)
    _gather_for_segments(model)
    outputs, state = [], None
    run = with_weights_of_now(model, model.forward_with_state)
    for part in x.split(segment, dim=1):
        # What is offloaded comes back contiguous, and must be computed with as it was.
        part = part.contiguous()
        out, state = checkpoint(run, part, state, use_reentrant=False)
        outputs.append(out)
    return torch.cat(outputs, dim=1)


def run_layers_recomputed(
    model: nn.Module, layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor
) -> Tensor:
    """A model's layers one after the other on ``(B, S, D)``, of which the inputs are kept."""
    layers, last = [with_weights_of_now(model, layer) for layer in layers], len(layers) - 1
    if not (layers and _suits(model, x)):
        for layer in layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x

    def run(index: int, first: Tensor, later: Tensor | None) -> tuple[Tensor, Tensor | None]:
        y = layers[index](first if later is None else later)
        return (y, None) if index == last else (y.new_empty(len(y), 0, y.shape[2]), y)

    takes = [slice(None), *[slice(0)] * last]  # the first takes all, and the last gives all
    sums = GradientSums(model.parameters())
    out: Tensor = _InPieces.apply(run, takes, takes[::-1], True, sums, x, *sums.parameters)
    return out


def _suits(model: nn.Module, x: Tensor) -> bool:
    """Whether pieces keep no graph: where malloc gives the memory, and nothing is traced.

    Nor does a stage whose gradients are watched, since here they are not made by its own graph.
    """
    return x.device.type == "cpu" and not is_traced() and not gradients_are_watched(model)


def _gather_for_segments(model: nn.Module) -> None:
    """Where FSDP shards the stage, have it gather the weights for this method as for a call."""
    if getattr(model, "_is_fsdp_managed_module", False):
        from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

        if isinstance(model, FSDPModule) and "forward_with_state" not in vars(model):
            register_fsdp_forward_method(model, "forward_with_state")


def run_in_segments(
    run: Callable[..., Any], sums: GradientSums, x: Tensor, segment: int, *, is_random: bool = True
) -> Tensor:
    """The outputs of ``run(part, state)``, of which the parts and the states between are kept.

    Args:
        run: Maps a part ``(B, s, ..)`` and the state before it, None at first, to ``(B, s, ..)``
            and the state after it, a nest of tensors that do not grow, numbers and None.
        sums: Knows the parameters that ``run`` computes with.
        x: ``(B, S, ..)``.
        segment: Positions that are computed at once, at least 1.
        is_random: Whether ``run`` may draw random numbers.
    """
    spans = [slice(start, start + segment) for start in range(0, x.shape[1], segment)]
    out: Tensor = _InPieces.apply(
        lambda _, *given: run(*given), spans, spans, is_random, sums, x, *sums.parameters
    )
    return out


class _InPieces(torch.autograd.Function):
    """``run(index, part, state)`` of each piece gives an output and the next piece's state.

    A piece takes these positions of x, and gives those of the output.
    """

    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[..., Any],
        takes: Sequence[slice],
        gives: Sequence[slice],
        is_random: bool,
        sums: GradientSums,
        x: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        count = len(takes)
        circumstances = _Circumstances(count if is_random else 0, x.device.type)
        out, states, state, nests = x, [], None, []
        for index in range(count):
            circumstances.keep(index)
            result, state = run(index, x.detach()[:, takes[index]], state)
            tensors, with_tensors = _split_state(state)
            if index == 0:
                out = result.new_empty(*x.shape[:2], *result.shape[2:])
                states = [t.new_empty(count - 1, *t.shape) for t in tensors]
            out[:, gives[index]] = result
            if index + 1 < count:
                for kept in states:
                    kept[index] = tensors.pop(0)  # let go before the next piece
                nests.append(with_tensors)
                state = with_tensors([kept[index] for kept in states])
        ctx.computation = run, takes, gives, sums, circumstances, nests
        ctx.save_for_backward(x, *states)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *states = ctx.saved_tensors
        run, takes, gives, sums, circumstances, nests = ctx.computation
        of_x = torch.empty_like(x) if ctx.needs_input_grad[5] else None
        of_state = [kept.new_zeros(kept.shape[1:]) for kept in states]  # after the piece
        own = {tensor.untyped_storage().data_ptr() for tensor in of_state}

        def differentiate(index: int) -> None:  # what it computes is let go before the next piece
            part = x[:, takes[index]].detach().requires_grad_(of_x is not None)
            before = [kept[index - 1].detach().requires_grad_() for kept in states if index]
            with circumstances.of(index):
                state = nests[index - 1]([t.view_as(t) for t in before]) if index else None
                out, after = run(index, part.view_as(part), state)
            results = [(out, grad[:, gives[index]])]
            if index + 1 < len(takes):
                results += zip(_split_state(after)[0], of_state, strict=True)
            results = [result for result in results if result[0].requires_grad]
            inputs, targets = before, of_state
            if of_x is not None:
                inputs, targets = [part, *before], [of_x[:, takes[index]], *of_state]
            found: Sequence[Tensor | None] = [None] * len(inputs)
            if results:  # not so where the first layer is frozen, or a piece lets no gradient pass
                found = sums.add_gradients(*zip(*results, strict=True), inputs)
            # A part of the state that is handed on as another one gets that one's gradient itself.
            found = [
                g.clone() if g is not None and g.untyped_storage().data_ptr() in own else g
                for g in found
            ]
            for target, gradient in zip(targets, found, strict=False):
                target.zero_() if gradient is None else target.copy_(gradient)

        with sums.adding():
            for index in reversed(range(len(takes))):
                differentiate(index)
            return None, None, None, None, None, of_x, *sums.in_types_of_parameters()


def _split_state(state: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """The tensors of a state that may have gradients, and the state as a function of such.

    An object of the stage's own may hold tensors whose gradients would be lost.
    """
    leaves, nest = tree_flatten(state)
    if other := {type(leaf).__name__ for leaf in leaves if not isinstance(leaf, _OF_STATE)}:
        raise TypeError(
            "checkpoint_global: the state of a stage that is_recurrent is to be a nest of "
            f"tensors, numbers and None, got {', '.join(sorted(other))}"
        )
    tensors: list[Tensor] = []
    places: list[int] = []
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            tensors.append(leaf)
            places.append(place)
            leaves[place] = None

    def with_tensors(tensors: Sequence[Tensor]) -> Any:
        own = dict(zip(places, tensors, strict=True))
        return tree_unflatten([own.get(place, leaf) for place, leaf in enumerate(leaves)], nest)

    return tensors, with_tensors


class _Circumstances:
    """What so many pieces are computed under: the CPU's random generator's states, autocast."""

    def __init__(self, count: int, device_type: str) -> None:
        state = torch.get_rng_state()
        self._states = state.new_empty(count, *state.shape)  # none, if nothing is drawn
        self._autocast = autocast_of(device_type)

    def keep(self, index: int) -> None:
        if len(self._states):
            self._states[index] = torch.get_rng_state()

    @contextlib.contextmanager
    def of(self, index: int) -> Iterator[None]:
        """Compute piece ``index`` again, with a graph; the generator goes on as if one had not.

        What goes in is a view of a leaf: PyTorch refuses the hooks of a FLOP counter on a leaf.
        """
        with torch.random.fork_rng([]), torch.enable_grad(), self._autocast():
            if len(self._states):  # torch reads a view from its base on
                torch.set_rng_state(self._states[index].clone())
            yield


def saved_on_host() -> contextlib.AbstractContextManager[Any]:
    """Keep what is saved for the backward pass in the host's memory; weights stay where they are.

    On a GPU, the copies are in pinned memory, and the host does not wait for them.
    """

    def pack(tensor: Tensor) -> Any:
        if isinstance(tensor, nn.Parameter) or tensor.is_meta:
            return tensor
        pinned = tensor.device.type == "cuda"
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
        host.copy_(tensor, non_blocking=pinned)
        return tensor.device, host

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, host = packed
        return host.to(device, non_blocking=host.is_pinned())

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
