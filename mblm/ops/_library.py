"""Where an operator's schema, reference, fake function and gradient are registered.

Every operator of the namespace ``mblm`` is defined once, in Python. The reference is its
CompositeExplicitAutograd kernel: it runs wherever no native kernel is loaded for the device.

Kernels know nothing of derivatives but an operator's own gradient. All else that PyTorch derives,
it derives from plain PyTorch, the operator's ``derivable``: second derivatives, forward-mode AD
and every transform of ``torch.func``.
"""

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from mblm.ops._checks import check_shape
from mblm.utils.transforms import is_transformed

LIBRARY = torch.library.Library("mblm", "DEF")

# PyTorch dispatches here first within a transform of torch.func, and nowhere else.
TRANSFORMED = "FuncTorchDynamicLayerFrontMode"


class Like(NamedTuple):
    """What a gradient has to know of a tensor whose values it does not use."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Call(NamedTuple):
    """A call of an operator, as its gradient is told of it."""

    inputs: tuple[Any, ...]  # the arguments, a `Like` in place of those of no values
    results: tuple[Like, ...]
    intermediates: tuple[Tensor, ...]  # results kept for the gradient
    needed: tuple[bool, ...]  # which arguments need a gradient


def register_operator(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any] | None = None,
    derivable: Callable[..., Any] | None = None,
    backward: Callable[..., Sequence[Tensor | None]] | str | None = None,
    intermediates: int = 0,
    linear_in: Sequence[int] = (),
) -> None:
    """Register one operator.

    Args:
        schema: The operator's schema, ``name(arguments) -> results``.
        reference: Readable PyTorch implementation, the specification of the native kernels.
        fake: Shapes and dtypes of the results, from shapes and dtypes of the arguments. Default:
            the reference, which then looks at no values of tensors that have none.
        derivable: The reference, as PyTorch can differentiate it. An operator without one, such as
            a gradient, has no derivatives: asked for them, it raises.
        backward: Gradient, ``backward(call, *grads) -> gradients of the first arguments``; those
            that are not needed are ignored. ``grads`` are those of the results but the
            intermediates, None for one that is not used. Or the name of an operator, see
            `_by_operator`. Default: that of ``derivable``.
        intermediates: So many of the last results are for ``backward`` alone.
        linear_in: Indices of arguments, each of which is added or is a factor of one term, so that
            ``backward`` needs no values of theirs: they are not kept.
    """
    name = schema.split("(", 1)[0].strip()
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, _said_on_cuda(name, reference), "CompositeExplicitAutograd")
    torch.library.register_fake(f"mblm::{name}", fake or reference, lib=LIBRARY)
    if derivable is not None:
        LIBRARY.impl(name, derivable, TRANSFORMED)
    operator = getattr(torch.ops.mblm, name).default
    derive = derivable or functools.partial(_refuse, name)
    if isinstance(backward, str):
        backward = _by_operator(operator, backward)
    run = _function(operator, derive, backward, intermediates, linear_in)

    def differentiated(keyset: Any, *args: Any) -> Any:
        if is_transformed():
            return derive(*args)
        if torch.is_grad_enabled() and any(
            isinstance(arg, Tensor) and arg.requires_grad for arg in args
        ):
            return run(keyset, *args)
        return _below_autograd(operator, keyset, args)

    LIBRARY.impl(name, differentiated, "Autograd", with_keyset=True)


def _refuse(name: str, *_: Any) -> NoReturn:
    raise NotImplementedError(
        f"mblm::{name} has no derivatives; differentiate mblm::{name.removesuffix('_backward')}, "
        "as often as you like"
    )


def _by_operator(operator: Any, backward: str) -> Callable[..., Sequence[Tensor | None]]:
    """The gradient of an operator by another, told by the names of arguments and results.

    The other's first arguments, ``grad..``, are the gradients of the results, zeros for one that is
    not used unless it may be None; the rest are arguments and intermediates of the operator. Its
    results are ``grad_<argument>``.
    """

    def run(call: Call, *grads: Tensor | None) -> list[Tensor | None]:
        gradient = getattr(torch.ops.mblm, backward).default
        schema, own = operator._schema, gradient._schema
        values = _named(schema.arguments, call.inputs)
        values |= _named(schema.returns[len(call.results) :], call.intermediates)
        given = [
            torch.zeros(like.shape, dtype=like.dtype, device=like.device)
            if grad is None and argument.type.kind() != "OptionalType"
            else grad
            for grad, like, argument in zip(grads, call.results, own.arguments, strict=False)
        ]
        found = gradient(*given, *(values[other.name] for other in own.arguments[len(given) :]))
        of = _named(own.returns, found)
        return [of.get(f"grad_{argument.name}") for argument in schema.arguments]

    return run


def _named(places: Sequence[Any], values: Sequence[Any]) -> dict[str, Any]:
    return dict(zip((place.name for place in places), values, strict=True))


def _below_autograd(operator: Any, keyset: Any, args: Sequence[Any]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _function(
    operator: Any,
    derive: Callable[..., Any],
    backward: Callable[..., Sequence[Tensor | None]] | None,
    intermediates: int,
    linear_in: Sequence[int],
) -> Callable[..., Any]:
    """The operator as a node of autograd's graph, called with the dispatcher's keys first."""

    def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
        results = _below_autograd(operator, keyset, args)
        several = results if isinstance(results, tuple) else (results,)
        own, kept = several[: len(several) - intermediates], several[len(several) - intermediates :]
        ctx.results = tuple(Like(result.shape, result.dtype, result.device) for result in own)
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.others = [None if isinstance(arg, Tensor) else arg for arg in args]
        tensors = [arg if isinstance(arg, Tensor) else None for arg in args]
        for index in linear_in:
            if (tensor := tensors[index]) is not None:
                ctx.others[index] = Like(tensor.shape, tensor.dtype, tensor.device)
                tensors[index] = None
        ctx.save_for_backward(*tensors, *kept)
        return results

    def gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
        inputs = tuple(
            other if tensor is None else tensor
            for tensor, other in zip(saved, ctx.others, strict=False)
        )
        if all(grad is None for grad in grads):
            return (None,) * (1 + len(inputs))
        if backward is None or torch.is_grad_enabled() or is_transformed():
            return None, *derived_gradients(derive, inputs, needed, grads)
        call = Call(inputs, ctx.results, saved[len(inputs) :], needed)
        found = backward(call, *grads[: len(grads) - intermediates])
        pairs = zip_longest(found, needed)  # there are none of the last arguments
        return None, *(grad if of_it else None for grad, of_it in pairs)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    function: Any = type(operator.name().replace("::", "_"), (torch.autograd.Function,), methods)
    run: Callable[..., Any] = function.apply
    return run


def derived_gradients(
    derive: Callable[..., Any],
    inputs: Sequence[Any],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
    *,
    create_graph: bool = True,
) -> list[Tensor | None]:
    """The gradients of the inputs as PyTorch computes them from ``derive``, differentiable too."""
    with torch.enable_grad():
        # Views: a tensor that is given twice has two gradients.
        own = [
            _zeros(value) if isinstance(value, Like) else value.view_as(value) if of_it else value
            for value, of_it in zip(inputs, needed, strict=True)
        ]
        results = derive(*own)
        results = results if isinstance(results, tuple) else (results,)
        pairs = [
            (result, grad)
            for result, grad in zip(results, grads, strict=True)
            if grad is not None and result.requires_grad
        ]
        wanted = [value for value, of_it in zip(own, needed, strict=True) if of_it]
        found = iter(
            torch.autograd.grad(
                [result for result, _ in pairs],
                wanted,
                [grad for _, grad in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
        )
    return [next(found) if of_it else None for of_it in needed]


def gradients_of(
    count: int,
    reference: Callable[..., Any],
    inputs: Sequence[Any],
    grads: Mapping[str, Tensor | None],
    **kept: Tensor,
) -> tuple[Tensor, ...]:
    """New gradients of the tensors among the first ``count`` inputs, contiguous.

    For the references of operators that are gradients: these are called without a graph. By name,
    ``grads`` are those of the first results, and ``kept`` is what was kept of the last; each must
    be like its result.
    """

    def checked(*args: Any) -> Any:
        results = reference(*args)
        named = {**grads, **kept}.items()
        several = results if isinstance(results, tuple) else (results,)
        for (name, tensor), result in zip(named, several, strict=True):
            if tensor is not None:
                check_shape(name, tensor, tuple(result.shape))
                if tensor.dtype != result.dtype:
                    raise TypeError(f"{name} must be {result.dtype}, got {tensor.dtype}")
        return results

    needed = [index < count and isinstance(value, Tensor) for index, value in enumerate(inputs)]
    with as_outside(), torch.enable_grad():
        leaves = [
            value.detach().requires_grad_() if of_it else value
            for value, of_it in zip(inputs, needed, strict=True)
        ]
        of_results = [*grads.values(), *[None] * len(kept)]
        found = derived_gradients(checked, leaves, needed, of_results, create_graph=False)
    return tuple(
        torch.zeros_like(value, memory_format=torch.contiguous_format)
        if grad is None
        else grad.detach().clone(memory_format=torch.contiguous_format)
        for value, grad, of_it in zip(inputs, found, needed, strict=True)
        if of_it
    )


@contextlib.contextmanager
def as_outside() -> Iterator[None]:
    """Record gradients, if they are enabled, within an operator's kernel."""
    with contextlib.ExitStack() as stack:
        # PyTorch runs an operator's kernel with these left out.
        for name in ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView"):
            key = getattr(torch._C.DispatchKey, name)
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        yield


def _zeros(like: Like) -> Tensor:
    zero = torch.zeros((), dtype=like.dtype, device=like.device, requires_grad=True)
    return zero.expand(like.shape)


def _said_on_cuda(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """The reference, which says once that it runs on CUDA tensors for want of a CUDA kernel."""
    said = os.environ.get("MBLM_NATIVE") == "0"  # no kernels is what the user asked for

    @functools.wraps(reference)
    def run(*args: Any) -> Any:
        nonlocal said
        if not said and any(isinstance(arg, torch.Tensor) and arg.is_cuda for arg in args):
            said = True
            warnings.warn(
                f"mblm::{name} runs in plain PyTorch on the GPU: no CUDA kernel of it is compiled",
                RuntimeWarning,
                stacklevel=2,
            )
        return reference(*args)

    return run
