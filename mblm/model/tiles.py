"""Functions of many rows, computed a tile of rows at a time: memory follows the tile."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mblm.model.linear import Linear

# What a tile adds to a loss: the sum of its entries and how many of them are not zero.
SumAndCount = tuple[Tensor, Tensor]
# Tensors of which each holds a row for every row of the computation.
Rows = tuple[Tensor | None, ...]


# Leaves loops over tiles to Python under `torch.compile`, which would unroll them. As
# `torch.compiler.disable`, it imports the compiler, but no sooner than it is called.
not_compiled: Any = torch._disable_dynamo


class GradientSums:
    """Gradients of parameters, added up over tiles and over the tiles within them.

    Args:
        parameters: All that a computation uses and that gets a gradient, but its rows.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.is_adding = False
        self._sums: list[Tensor] = []
        self._used: list[bool] = []

    @contextlib.contextmanager
    def adding(self) -> Iterator[None]:
        """While the outermost sum over tiles is computed."""
        # Before the tiles' memory, not between; half precision would lose the small additions.
        self._sums = [_wide_zeros(p) for p in self.parameters]
        self._used = [False] * len(self._sums)
        self.is_adding = True
        try:
            yield
        finally:
            self.is_adding = False
            self._sums = []

    def add_gradients(
        self,
        out: Tensor | Sequence[Tensor],
        of_out: Tensor | Sequence[Tensor] | None = None,
        inputs: Sequence[Tensor] = (),
    ) -> tuple[Tensor | None, ...]:
        """Run a backward pass from ``out`` and add what reaches the parameters.

        A parameter's gradient is added as soon as it is known and let go: beside the sums there is
        one at a time.

        Args:
            out: What a tile gives, one tensor or several.
            of_out: The gradient of ``out``, of its shape. Default: 1, of a scalar.
            inputs: Leaves that are no parameters.

        Returns:
            The gradients of ``inputs``, None for one that ``out`` does not depend on.
        """
        hooks = [
            parameter.register_hook(functools.partial(self._take, index))
            for index, parameter in enumerate(self.parameters)
        ]
        try:
            leaves = [*self.parameters, *inputs]
            gradients = torch.autograd.grad(out, leaves, of_out, allow_unused=True)
        finally:
            for hook in hooks:
                hook.remove()
        return gradients[len(self.parameters) :]

    def _take(self, index: int, gradient: Tensor | None) -> Tensor | None:
        """Add a parameter's gradient and leave one without memory in its place."""
        if gradient is None:
            return None
        self._sums[index] += gradient
        self._used[index] = True
        return torch.zeros((), dtype=gradient.dtype, device=gradient.device).expand(gradient.shape)

    def linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """``layer(x)``; while sums are being added, the layer's gradients are not made first.

        This suits a layer whose weight is large beside ``x``. A layer of another type than
        `Linear`, or whose weights are computed from others, is called as it is.
        """
        out: Tensor
        weights = [w for w in (layer.weight, layer.bias) if w is not None and w.requires_grad]
        if (
            self.is_adding
            and torch.is_grad_enabled()
            and type(layer) is Linear
            and all(self._index(weight) is not None for weight in weights)
        ):
            out = _LinearIntoSums.apply(x, layer.weight, layer.bias, self)
        else:
            out = layer(x)
        return out

    def sum_for(self, parameter: Tensor | None) -> Tensor | None:
        """The sum that a parameter's gradient is added to, None where it gets none."""
        index = self._index(parameter)
        if index is None:
            return None
        self._used[index] = True
        return self._sums[index]

    def _index(self, parameter: Tensor | None) -> int | None:
        return next((n for n, known in enumerate(self.parameters) if known is parameter), None)

    def sums(self) -> list[Tensor | None]:
        """The sums, None for a parameter that none was added for."""
        return [s if used else None for s, used in zip(self._sums, self._used, strict=True)]


class _LinearIntoSums(torch.autograd.Function):
    """A linear layer that adds the gradients of weight and bias to their sums."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sums: GradientSums
    ) -> Tensor:
        ctx.sums, ctx.weight, ctx.bias = sums, weight, bias
        ctx.save_for_backward(x)
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors  # (.., K); the weight is (N, K)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (grad @ ctx.weight.to(grad.dtype)).to(x.dtype)
        x, grad = x.flatten(0, -2), grad.flatten(0, -2)
        if (of_weight := ctx.sums.sum_for(ctx.weight)) is not None:
            of_weight.addmm_(grad.to(of_weight.dtype).T, x.to(of_weight.dtype))
        if (of_bias := ctx.sums.sum_for(ctx.bias)) is not None:
            of_bias += grad.sum(0, dtype=of_bias.dtype)
        return of_x, None, None, None


def sum_over_tiles(
    function: Callable[..., SumAndCount],
    size: int,
    rows: Tensor,
    others: Sequence[Tensor | None],
    sums: GradientSums,
    *,
    recompute: bool = False,
) -> SumAndCount:
    """Sum of ``function(rows, *others)`` over tiles of ``size`` rows.

    Where gradients are needed, a tile's are computed as soon as its sum is: they are known up to
    the factor by which the sum enters the loss, and the backward pass has only to multiply. Nothing
    is computed twice, and no activation outlives its tile.

    ``function`` may sum over smaller tiles in turn, with the same ``sums``, as long as what comes
    out enters its own sum as it is.

    Args:
        function: Gives the sum, differentiable, and the count of a tile.
        size: Rows of a tile, at least 1.
        rows: ``(S, ..)``, differentiable.
        others: ``(S, ..)`` each, or None; they get no gradient.
        sums: Knows the parameters that ``function`` computes with.
        recompute: Compute each tile again in the backward pass instead. This suits parameters that
            only an ordinary backward pass may touch, takes a third longer, and keeps the graphs of
            all tiles, though not their activations.

    Returns:
        The sum, float32 (or float64), and the count, both scalars.

    Raises:
        ValueError: ``function`` uses a tensor that needs a gradient and is no known parameter.
    """
    if not torch.is_grad_enabled() or not (rows.requires_grad or sums.parameters):
        tiles = _tiles(size, rows, *others)
        return _add_detached((function(*tile) for tile in tiles), -(-len(rows) // size))
    return _sum(function, size, rows, others, sums, recompute)


@not_compiled
def _sum(
    function: Callable[..., SumAndCount],
    size: int,
    rows: Tensor,
    others: Sequence[Tensor | None],
    sums: GradientSums,
    recompute: bool,
) -> SumAndCount:
    """`sum_over_tiles` where gradients are needed."""
    if recompute:
        return _add(
            checkpoint(function, *tile, use_reentrant=False) for tile in _tiles(size, rows, *others)
        )
    if sums.is_adding:  # the outermost sum passes the parameters' gradients on
        return _sum_with_gradients(function, size, others, sums, rows)
    with sums.adding():
        return _sum_with_gradients(function, size, others, sums, rows, *sums.parameters)


class _SumWithGradients(torch.autograd.Function):
    """The sum over tiles, and with it the gradients of rows and, if given, of parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[..., SumAndCount],
        size: int,
        others: Sequence[Tensor | None],
        sums: GradientSums,
        rows: Tensor,
        *parameters: Tensor,
    ) -> SumAndCount:
        of_rows = torch.zeros_like(rows) if rows.requires_grad else None

        def results() -> Iterator[SumAndCount]:
            for first in range(0, len(rows), size):
                tile = slice(first, first + size)
                with torch.enable_grad():
                    leaf = rows[tile].detach().requires_grad_(of_rows is not None)
                    total, count = function(leaf, *_cut(tile, others))
                yield total.detach(), count
                if not total.requires_grad:
                    continue
                inputs = [] if of_rows is None else [leaf]
                if first == 0:
                    _check_leaves(total, [*sums.parameters, *inputs])
                with _without_autocast(rows.device.type):
                    of_tile = sums.add_gradients(total, inputs=inputs)
                if of_rows is not None and of_tile[0] is not None:
                    of_rows[tile] = of_tile[0]

        total, count = _add_detached(results(), -(-len(rows) // size))
        ctx.gradients = [of_rows, *(sums.sums() if parameters else ())]
        ctx.dtypes = [tensor.dtype for tensor in (rows, *parameters)]
        ctx.mark_non_differentiable(count)
        return total, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "a loss computed in tiles has one backward pass: its gradients were handed over "
                "in the first; compute the loss again"
            )
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (
            None if gradient is None else gradient.mul_(grad).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return None, None, None, None, *scaled


_sum_with_gradients: Callable[..., SumAndCount] = _SumWithGradients.apply


def map_over_tiles(function: Callable[..., Tensor], size: int, *rows: Tensor | None) -> Tensor:
    """``function(*rows)`` by tiles of ``size`` rows, one after the other along the first dimension.

    Each tile is computed again in the backward pass, where there will be one. Without gradients
    nothing is made beyond the result and what a tile needs.
    """
    count = _length(rows)
    if count <= size:
        return function(*rows)
    if torch.is_grad_enabled():
        return _recomputed_map(function, size, rows)
    out = torch.empty(0)
    for number, tile in enumerate(_tiles(size, *rows)):
        result = function(*tile)
        if number == 0:
            per_row = len(result) // size
            out = result.new_empty(count * per_row, *result.shape[1:])
        first = number * size * per_row
        out[first : first + len(result)] = result
    return out


def map_with_sums(
    function: Callable[[Tensor], Tensor], size: int, rows: Tensor, sums: GradientSums
) -> Tensor:
    """`map_over_tiles` of rows that get no gradient, by a function without random numbers.

    The tiles' gradients are added up in one place, where `map_over_tiles` would hold three.
    """
    if len(rows) <= size or not torch.is_grad_enabled() or not sums.parameters:
        return map_over_tiles(function, size, rows)
    return _map_with_sums(function, size, sums, rows, *sums.parameters)


class _MapWithSums(torch.autograd.Function):
    """The map, computed again in the backward pass for the gradients of the parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[[Tensor], Tensor],
        size: int,
        sums: GradientSums,
        rows: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.computation = function, size, sums, autocast_of(rows.device.type)
        ctx.save_for_backward(rows)
        return map_over_tiles(function, size, rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        function, size, sums, autocast = ctx.computation
        gradients = gradients_of_map(function, size, rows, sums, grad, autocast)
        return None, None, None, None, *gradients


def gradients_of_map(
    function: Callable[[Tensor], Tensor],
    size: int,
    rows: Tensor,
    sums: GradientSums,
    grad: Tensor,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]],
) -> list[Tensor | None]:
    """The parameters' gradients of `map_with_sums`, given that of its result."""
    with sums.adding():
        for tile, of_tile in zip(rows.split(size), grad.split(size), strict=True):
            with torch.enable_grad(), autocast():
                out = function(tile)
            sums.add_gradients(out, of_tile)
        gradients = sums.sums()
    return [
        None if gradient is None else gradient.to(parameter.dtype)
        for gradient, parameter in zip(gradients, sums.parameters, strict=True)
    ]


@not_compiled
def _map_with_sums(*arguments: Any) -> Tensor:
    out: Tensor = _MapWithSums.apply(*arguments)
    return out


@not_compiled
def _recomputed_map(function: Callable[..., Tensor], size: int, rows: Rows) -> Tensor:
    parts = [checkpoint(function, *tile, use_reentrant=False) for tile in _tiles(size, *rows)]
    return torch.cat(parts)


def _tiles(size: int, *rows: Tensor | None) -> Iterator[Rows]:
    for first in range(0, _length(rows), size):
        yield _cut(slice(first, first + size), rows)


def _cut(tile: slice, rows: Sequence[Tensor | None]) -> Rows:
    return tuple(None if tensor is None else tensor[tile] for tensor in rows)


def _length(rows: Rows) -> int:
    return next(len(tensor) for tensor in rows if tensor is not None)


def _add(results: Any) -> SumAndCount:
    # All at once: one after the other would lose the digits that a long sum has no room for.
    totals, counts = zip(*results, strict=True)
    return torch.stack(totals).sum(), torch.stack(counts).sum()


def _add_detached(results: Iterable[SumAndCount], length: int) -> SumAndCount:
    """`_add` of so many results without gradients.

    Nothing small of a tile outlives it, or malloc puts that between the large blocks that are freed
    around it, and the next tile's do not fit there: memory would grow with every tile.
    """
    totals, counts = torch.empty(0), torch.empty(0)
    for index, (total, count) in enumerate(results):
        if index == 0:
            totals, counts = total.new_empty(length), count.new_empty(length)
        totals[index], counts[index] = total, count
    return totals.sum(), counts.sum()


def autocast_of(device_type: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """The autocast there is now, to be entered again."""
    if not torch.amp.is_autocast_available(device_type):
        return contextlib.nullcontext
    dtype = torch.get_autocast_dtype(device_type)
    enabled = torch.is_autocast_enabled(device_type)
    return functools.partial(torch.autocast, device_type, dtype, enabled)


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """What a backward pass runs in."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _wide_zeros(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))


def _check_leaves(total: Tensor, inputs: Sequence[Tensor]) -> None:
    """Refuse a graph that leads to tensors whose gradients would be lost."""
    known = {id(tensor) for tensor in inputs}
    nodes, seen = [total.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise ValueError(
                f"a stage uses a tensor {tuple(leaf.shape)} that needs a gradient and is none of "
                "the model's parameters, which a loss computed in tiles cannot give it; register "
                "it as a parameter, or set tile to None"
            )
        nodes.extend(parent for parent, _ in node.next_functions)
