"""Functions of many rows, computed a tile of rows at a time: memory follows the tile."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# What a tile adds to a loss: the sum of its entries and how many of them are not zero.
SumAndCount = tuple[Tensor, Tensor]
# Tensors of which each holds a row for every row of the computation.
Rows = tuple[Tensor | None, ...]


@torch.compiler.disable
def sum_over_tiles(
    function: Callable[..., SumAndCount],
    size: int,
    rows: Tensor,
    others: Sequence[Tensor | None],
    parameters: Sequence[Tensor],
    *,
    recompute: bool = False,
) -> SumAndCount:
    """Sum of ``function(rows, *others)`` over tiles of ``size`` rows.

    Where gradients are needed, a tile's are computed as soon as its sum is: they are known up to
    the factor by which the sum enters the loss, and the backward pass has only to multiply. Nothing
    is computed twice, and no activation outlives its tile.

    Args:
        function: Gives the sum, differentiable, and the count of a tile.
        size: Rows of a tile, at least 1.
        rows: ``(S, ..)``, differentiable.
        others: ``(S, ..)`` each, or None; they get no gradient.
        parameters: All else that ``function`` computes with and that gets a gradient.
        recompute: Compute each tile again in the backward pass instead. This suits parameters that
            only an ordinary backward pass may touch, takes a third longer, and keeps the graphs of
            all tiles, though not their activations.

    Returns:
        The sum, float32 (or float64), and the count, both scalars.

    Raises:
        ValueError: ``function`` uses a tensor that needs a gradient and is not in ``parameters``.
    """
    inputs = (rows, *parameters)
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in inputs):
        return _add(function(*tile) for tile in _tiles(size, rows, *others))
    if recompute:
        return _add(
            checkpoint(function, *tile, use_reentrant=False) for tile in _tiles(size, rows, *others)
        )
    total, count = _SumWithGradients.apply(function, size, others, *inputs)
    return total, count


class _SumWithGradients(torch.autograd.Function):
    """The sum over tiles, and with it the gradients of rows and parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[..., SumAndCount],
        size: int,
        others: Sequence[Tensor | None],
        rows: Tensor,
        *parameters: Tensor,
    ) -> SumAndCount:
        needed = [tensor for tensor in parameters if tensor.requires_grad]
        # Half precision would lose the small additions.
        sums: list[Tensor | None] = [None] * len(needed)
        of_rows = torch.empty_like(rows) if rows.requires_grad else None
        results = []
        for first in range(0, len(rows), size):
            tile = slice(first, first + size)
            with torch.enable_grad():
                leaf = rows[tile].detach().requires_grad_(of_rows is not None)
                total, count = function(leaf, *_cut(tile, others))
            results.append((total.detach(), count))
            wanted = [leaf, *needed] if of_rows is not None else needed
            if not total.requires_grad:
                gradients: list[Tensor | None] = [None] * len(wanted)
            else:
                if first == 0:
                    _check_leaves(total, wanted)
                with torch.autocast(rows.device.type, enabled=False):
                    gradients = [*torch.autograd.grad(total, wanted, allow_unused=True)]
            if of_rows is not None:
                of_tile, *gradients = gradients
                of_rows[tile] = 0 if of_tile is None else of_tile
            for index, gradient in enumerate(gradients):
                if gradient is not None:
                    before = sums[index]
                    sums[index] = _wide(gradient) if before is None else before.add_(gradient)
        ctx.gradients = iter(sums if of_rows is None else [of_rows, *sums])
        ctx.inputs = [(tensor.requires_grad, tensor.dtype) for tensor in (rows, *parameters)]
        total, count = _add(results)
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
        scaled: list[Tensor | None] = []
        for is_needed, dtype in ctx.inputs:
            gradient = next(gradients) if is_needed else None
            scaled.append(None if gradient is None else gradient.mul_(grad).to(dtype))
        return None, None, None, *scaled


def map_over_tiles(function: Callable[..., Tensor], size: int, *rows: Tensor | None) -> Tensor:
    """``function(*rows)`` by tiles of ``size`` rows, one after the other along the first dimension.

    Each tile is computed again in the backward pass, where there will be one. Without gradients
    nothing is made beyond the result and what a tile needs.
    """
    count = _length(rows)
    if count <= size:
        return function(*rows)
    return _map(function, size, count, rows)


@torch.compiler.disable
def _map(function: Callable[..., Tensor], size: int, count: int, rows: Rows) -> Tensor:
    if torch.is_grad_enabled():
        return torch.cat(
            [checkpoint(function, *tile, use_reentrant=False) for tile in _tiles(size, *rows)]
        )
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


def _wide(tensor: Tensor) -> Tensor:
    """A copy of its own, in which many sums can be added up."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)


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
