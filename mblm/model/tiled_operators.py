"""Passes in tiles as operators: one node each to `torch.compile`, their loops run in Python.

An operator is given the model as a number, since it takes tensors and numbers only, and the
parameters as tensors, so that their gradients have a place in the graph.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from mblm.model.gradients import gradients_are_watched, once_differentiable
from mblm.model.tiled_pass import TiledPass, parameters_below_global
from mblm.model.tiles import SumAndCount, gradients_of_map, map_over_tiles
from mblm.ops._library import LIBRARY, TRANSFORMED, as_outside
from mblm.utils.transforms import is_transformed, not_compiled

if TYPE_CHECKING:
    from mblm.model.hierarchy import Hierarchy

_MODELS: "WeakValueDictionary[int, Hierarchy]" = WeakValueDictionary()
_numbers = itertools.count()


def number_of(model: "Hierarchy") -> int:
    """A new number, under which operators find the model as long as it lives."""
    number = next(_numbers)
    _MODELS[number] = model
    return number


def suit(model: "Hierarchy") -> bool:
    """Whether a pass in tiles is compiled, by operators; hooks on gradients see none of theirs."""
    return torch.compiler.is_compiling() and not gradients_are_watched(model)


def loss_in_tiles(
    model: "Hierarchy",
    tile: int,
    ignored_id: int,
    attended: Tensor,
    ids: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
) -> SumAndCount:
    """`TiledPass.loss` below the most global stage.

    Compiled, a parameter that the loss does not depend on has a gradient of zeros.
    """
    if not suit(model):
        return TiledPass(model, tile, ignored_id).loss(attended, ids, targets, mask, weights)
    parameters = _trained(parameters_below_global(model))
    gradients = torch.is_grad_enabled() and (attended.requires_grad or bool(parameters))
    out = torch.ops.mblm.loss_in_tiles(
        attended,
        ids,
        targets,
        mask,
        weights,
        parameters if gradients else [],
        model.number,
        tile,
        ignored_id,
        gradients,
        _autocast_dtype(attended.device.type),
    )
    return out[0], out[1]


def global_tokens(model: "Hierarchy", ids: Tensor, tile: int) -> Tensor:
    """Token embeddings of the most global of several stages, ids ``(B, S * R_1)``."""
    out: Tensor = torch.ops.mblm.global_tokens(
        ids, _embedding(model), model.number, tile, _autocast_dtype(ids.device.type)
    )
    return out


def _embedding(model: "Hierarchy") -> list[nn.Parameter]:
    return _trained(list(model.token_embs_rev[-1].parameters()))


def _trained(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of the autocast there is, which does not reach into a compiled graph."""
    if not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


@contextlib.contextmanager
def _as_outside(device_type: str, autocast: torch.dtype | None, gradients: bool) -> Iterator[None]:
    """Record gradients, if asked to, under the autocast given, within an operator."""
    with as_outside(), torch.set_grad_enabled(gradients), _autocast(device_type, autocast)():
        yield


def _autocast(
    device_type: str, dtype: torch.dtype | None
) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    if dtype is None:
        return contextlib.nullcontext
    return functools.partial(torch.autocast, device_type, dtype)


def _check_weights(own: Sequence[Tensor], given: Sequence[Tensor]) -> None:
    """The loops run the model as it is: with its own parameters."""
    if any(a.data_ptr() != b.data_ptr() for a, b in zip(own, given, strict=True)):
        raise RuntimeError(
            "a model compiled in tiles was called with weights that are not its own; call it "
            "without a tile, or not compiled"
        )


def _loss(
    attended: Tensor,
    ids: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    parameters: list[Tensor],
    number: int,
    tile: int,
    ignored_id: int,
    gradients: bool,
    autocast: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Sum and count, and the sum's gradients of ``attended`` and the parameters."""
    model = _MODELS[number]
    own = _trained(parameters_below_global(model)) if parameters else []
    _check_weights(own, parameters)
    with _as_outside(attended.device.type, autocast, gradients):
        leaf = attended.detach().requires_grad_(gradients)
        tiles = TiledPass(model, tile, ignored_id)
        total, count = tiles.loss(leaf, ids, targets, mask, weights)
        found: Sequence[Tensor | None] = [None] * (1 + len(own))
        if total.requires_grad:
            found = torch.autograd.grad(total, [leaf, *own], allow_unused=True)
    like = [attended if gradients else attended.new_empty(0), *parameters]
    of_attended, *of_parameters = (
        tensor.new_zeros(tensor.shape) if gradient is None else gradient.contiguous()
        for gradient, tensor in zip(found, like, strict=True)
    )
    return total.detach(), count, of_attended, of_parameters


def _loss_fake(
    attended: Tensor,
    ids: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    parameters: list[Tensor],
    number: int,
    tile: int,
    ignored_id: int,
    gradients: bool,
    autocast: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    total = attended.new_empty((), dtype=torch.promote_types(attended.dtype, torch.float32))
    of_attended = attended.new_empty(attended.shape if gradients else (0,))
    of_parameters = [parameter.new_empty(parameter.shape) for parameter in parameters]
    return total, ids.new_empty((), dtype=torch.long), of_attended, of_parameters


def _loss_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, count, of_attended, of_parameters = output
    ctx.mark_non_differentiable(count, of_attended, *of_parameters)
    ctx.save_for_backward(of_attended, *of_parameters)


@once_differentiable
def _loss_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    of_attended, *of_parameters = (t * grad.to(t.dtype) for t in ctx.saved_tensors)
    return of_attended, None, None, None, None, of_parameters, *[None] * 5


def _tokens(
    ids: Tensor, parameters: list[Tensor], number: int, tile: int, autocast: torch.dtype | None
) -> Tensor:
    """Of the dtype of the embedding's table, under autocast too."""
    model = _MODELS[number]
    _check_weights(_embedding(model), parameters)
    function, size, rows, _ = model.global_embedding(ids, tile)
    with _as_outside(ids.device.type, autocast, gradients=False):
        embedded = map_over_tiles(function, size, rows)
    dtype = model.parts_of_patches(0)[0].weight.dtype
    return embedded.to(dtype).reshape(len(ids), -1, embedded.shape[-1])


def _tokens_fake(
    ids: Tensor, parameters: list[Tensor], number: int, tile: int, autocast: torch.dtype | None
) -> Tensor:
    model = _MODELS[number]
    dtype = model.parts_of_patches(0)[0].weight.dtype
    positions = ids.shape[1] // model.patch_sizes[0]
    return ids.new_empty(ids.shape[0], positions, model.hidden_dims[0], dtype=dtype)


def _tokens_gradients(
    grad: Tensor,
    ids: Tensor,
    parameters: list[Tensor],
    number: int,
    tile: int,
    autocast: torch.dtype | None,
) -> list[Tensor]:
    model = _MODELS[number]
    _check_weights(_embedding(model), parameters)
    function, size, rows, sums = model.global_embedding(ids, tile)
    with _as_outside(ids.device.type, None, gradients=False):
        given = _autocast(ids.device.type, autocast)
        found = gradients_of_map(function, size, rows, sums, grad.flatten(0, 1), given)
    return [
        torch.zeros_like(parameter) if gradient is None else gradient
        for gradient, parameter in zip(found, parameters, strict=True)
    ]


def _tokens_gradients_fake(
    grad: Tensor, ids: Tensor, parameters: list[Tensor], *_: Any
) -> list[Tensor]:
    return [parameter.new_empty(parameter.shape) for parameter in parameters]


def _tokens_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, parameters, *ctx.numbers = inputs
    ctx.save_for_backward(ids, *parameters)


@once_differentiable
def _tokens_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    ids, *parameters = ctx.saved_tensors
    gradients = torch.ops.mblm.global_tokens_backward(grad, ids, parameters, *ctx.numbers)
    return None, gradients, None, None, None


def _register(schema: str, run: Any, fake: Any, backward: Any = None, context: Any = None) -> None:
    name = schema.split("(", 1)[0]

    def kernel(*arguments: Any) -> Any:
        if is_transformed():
            raise NotImplementedError(
                f"mblm::{name} has no derivatives but a gradient; set tile to None"
            )
        return not_compiled(run)(*arguments)

    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CompositeExplicitAutograd", TRANSFORMED):
        LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"mblm::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            f"mblm::{name}", backward, setup_context=context, lib=LIBRARY
        )


_register(
    "loss_in_tiles(Tensor attended, Tensor ids, Tensor targets, Tensor? mask, Tensor? weights, "
    "Tensor[] parameters, int model, int tile, int ignored_id, bool gradients, "
    "ScalarType? autocast) -> (Tensor total, Tensor count, Tensor grad_attended, "
    "Tensor[] grad_parameters)",
    _loss,
    _loss_fake,
    _loss_backward,
    _loss_context,
)
_register(
    "global_tokens(Tensor ids, Tensor[] parameters, int model, int tile, ScalarType? autocast) "
    "-> Tensor",
    _tokens,
    _tokens_fake,
    _tokens_backward,
    _tokens_context,
)
_register(
    "global_tokens_backward(Tensor grad, Tensor ids, Tensor[] parameters, int model, int tile, "
    "ScalarType? autocast) -> Tensor[]",
    _tokens_gradients,
    _tokens_gradients_fake,
)
