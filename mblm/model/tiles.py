"""Functions of many rows, computed a tile of rows at a time: memory follows the tile."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from mblm.model.gradients import GradientSums, once_differentiable
from mblm.utils.modes import without_autocast

# Positions of a tile where no gradient is needed and no tile is configured: enough for full speed.
INFERENCE_TILE = 8192

# What a tile adds to a loss: the sum of its entries and how many of them are not zero.
SumAndCount = tuple[Tensor, Tensor]
# Tensors of which each holds a row for every row of the computation.
Rows = tuple[Tensor | None, ...]


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
    """
    if not torch.is_grad_enabled() or not (rows.requires_grad or sums.parameters):
        tiles = _tiles(size, rows, *others)
        return _add_detached((function(*tile) for tile in tiles), -(-len(rows) // size))
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
                    # A view, since PyTorch refuses the hooks of a FLOP counter on a leaf.
                    total, count = function(leaf.view_as(leaf), *_cut(tile, others))
                yield total.detach(), count
                if not total.requires_grad:
                    continue
                inputs = [] if of_rows is None else [leaf]
                if first == 0:
                    _check_leaves(total, [*sums.parameters, *inputs])
                with without_autocast(rows.device.type):
                    of_tile = sums.add_gradients(total, inputs=inputs)
                if of_rows is not None and of_tile[0] is not None:
                    of_rows[tile] = of_tile[0]

        # The tiles' graphs end here: a caller's checkpointing or offloading is not for them.
        with saved_tensors_hooks(_same, _same):
            total, count = _add_detached(results(), -(-len(rows) // size))
        ctx.gradients = [of_rows, *(sums.sums() if parameters else ())]
        ctx.dtypes = [tensor.dtype for tensor in (rows, *parameters)]
        ctx.mark_non_differentiable(count)
        return total, count

    @staticmethod
    @once_differentiable
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
        tiles = _tiles(size, *rows)
        return torch.cat([checkpoint(function, *tile, use_reentrant=False) for tile in tiles])
    out = torch.empty(0)
    for number, tile in enumerate(_tiles(size, *rows)):
        result = function(*tile)
        if number == 0:
            per_row = len(result) // size
            out = result.new_empty(count * per_row, *result.shape[1:])
        first = number * size * per_row
        out[first : first + len(result)] = result
    return out


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


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _check_leaves(total: Tensor, inputs: Sequence[Tensor]) -> None:
    """Refuse a graph that leads to tensors whose gradients would be lost."""
    known = {id(tensor) for tensor in inputs}
    # With ``torch.func.functional_call``, parameters may be results of others.
    results = {(tensor.grad_fn, tensor.output_nr) for tensor in inputs if not tensor.is_leaf}
    edges, seen = [(total.grad_fn, 0)], set()
    while edges:
        node, number = edges.pop()
        if node is None or node in seen or (node, number) in results:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise ValueError(
                f"a stage uses a tensor {tuple(leaf.shape)} that needs a gradient and is none of "
                "the model's parameters, which a loss computed in tiles cannot give it; register "
                "it as a parameter, or set tile to None"
            )
        edges.extend(node.next_functions)
