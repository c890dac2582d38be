"""Where an operator's schema, reference, fake function and gradient are registered.

Every operator of the namespace ``mblm`` is defined once, in Python. The reference is its
CompositeExplicitAutograd kernel: it runs wherever no native kernel is loaded for the device.

Kernels know nothing of derivatives but an operator's own gradient. All else that PyTorch derives,
it derives from the reference: second derivatives, forward-mode AD and every transform of
``torch.func``.
"""

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from mblm.ops._arguments import check_arguments
from mblm.utils.modes import without_autocast
from mblm.utils.transforms import is_transformed

LIBRARY = torch.library.Library("mblm", "DEF")

# PyTorch dispatches here first within a transform of torch.func, and nowhere else.
TRANSFORMED = "FuncTorchDynamicLayerFrontMode"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What results of ``dtype`` are computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    reference: Callable[..., Any],
    gradient_schema: str | None = None,
    gradient: Callable[..., Any] | None = None,
    *,
    arguments: str,
    gradient_arguments: str | None = None,
    fakes: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
    backward: Callable[..., Sequence[Tensor | None]] | None = None,
    intermediates: int = 0,
    linear_in: Sequence[int] = (),
) -> None:
    """Register one operator, and the operator that is its gradient.

    Args:
        schema: The operator's schema, ``name(arguments) -> results``.
        reference: Readable PyTorch implementation, the specification of the native kernels, which
            PyTorch can differentiate.
        gradient_schema: That of the gradient, ``name_backward(..) -> ..``; see `_by_operator`.
        gradient: Its reference. Default: what PyTorch derives from ``reference``, see
            `_by_reference`. Asked for derivatives of its own, it raises.
        arguments, gradient_arguments: What the references refuse arguments by that do not fit; see
            `check_arguments`.
        fakes: Shapes and dtypes of the results of both, from those of the arguments. Default: the
            references, which then look at no values of tensors that have none.
        backward: Calls the gradient, ``backward(call, *grads) -> gradients of the first
            arguments``, of which those that are not needed are ignored. ``grads`` are those of the
            results but the intermediates, None for one that is not used. Default: `_by_operator`,
            or the reference's gradient where there is no other.
        intermediates: So many of the last results are for the gradient alone.
        linear_in: Indices of arguments, each of which is added or is a factor of one term, so that
            the gradient needs no values of theirs: they are not kept.
    """
    name = schema.split("(", 1)[0]
    operator = _define(name, schema, reference, fakes and fakes[0], arguments)
    LIBRARY.impl(name, reference, TRANSFORMED)
    if gradient_schema:
        gradient = gradient or _by_reference(operator, gradient_schema, reference)
        fake = fakes and fakes[1]
        of_gradient = _define(
            f"{name}_backward", gradient_schema, gradient, fake, gradient_arguments
        )
        _register_autograd(of_gradient, functools.partial(_refuse, name))
        backward = backward or _by_operator(operator, of_gradient)
    _register_autograd(operator, reference, backward, intermediates, linear_in)


def _define(
    name: str,
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any] | None,
    arguments: str | None,
) -> Any:
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    operator = getattr(torch.ops.mblm, name).default
    names = tuple(argument.name for argument in operator._schema.arguments)

    def checked(*args: Any) -> Any:
        if arguments is not None:
            check_arguments(arguments, names, args)
        return reference(*args)

    LIBRARY.impl(name, _said_on_cuda(name, checked), "CompositeExplicitAutograd")
    torch.library.register_fake(f"mblm::{name}", fake or reference, lib=LIBRARY)
    return operator


def _register_autograd(
    operator: Any,
    derive: Callable[..., Any],
    backward: Callable[..., Sequence[Tensor | None]] | None = None,
    intermediates: int = 0,
    linear_in: Sequence[int] = (),
) -> None:
    run = _function(operator, derive, backward, intermediates, linear_in)

    def differentiated(keyset: Any, *args: Any) -> Any:
        if is_transformed():
            return derive(*args)
        if torch.is_grad_enabled() and any(
            isinstance(arg, Tensor) and arg.requires_grad for arg in args
        ):
            return run(keyset, *args)
        return _below_autograd(operator, keyset, args)

    name = operator.name().removeprefix("mblm::")
    LIBRARY.impl(name, differentiated, "Autograd", with_keyset=True)


def _refuse(name: str, *_: Any) -> NoReturn:
    raise NotImplementedError(
        f"mblm::{name}_backward has no derivatives; differentiate mblm::{name}, as often as you "
        "like"
    )


def _by_operator(operator: Any, gradient: Any) -> Callable[..., Sequence[Tensor | None]]:
    """The gradient of an operator by another, told by the names of arguments and results.

    The other's first arguments, ``grad..``, are the gradients of the results, zeros for one that is
    not used unless it may be None; the rest are arguments and intermediates of the operator. Its
    results are ``grad_<argument>``.
    """

    def run(call: Call, *grads: Tensor | None) -> list[Tensor | None]:
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
    device_type = next(grad for grad in grads if grad is not None).device.type
    with torch.enable_grad(), without_autocast(device_type):
        # Views: a tensor that is given twice has two gradients.
        own = [
            _zeros(value) if isinstance(value, Like) else value.view_as(value) if of_it else value
            for value, of_it in zip(inputs, needed, strict=True)
        ]
        results = derive(*own)
        results = results if isinstance(results, tuple) else (results,)
        pairs = [
            (result, grad)
            for result, grad in zip(results, grads, strict=False)  # none of intermediates
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


def _by_reference(
    operator: Any, gradient_schema: str, reference: Callable[..., Any]
) -> Callable[..., tuple[Tensor, ...]]:
    """The gradient of the first arguments, told by the names in the schemas as `_by_operator`."""
    own = torch._C.parse_schema(gradient_schema)

    def run(*args: Any) -> tuple[Tensor, ...]:
        values = _named(own.arguments, args)
        grads = [value for name, value in values.items() if name.startswith("grad")]
        inputs = [values[argument.name] for argument in operator._schema.arguments]
        return gradients_of(len(own.returns), reference, inputs, *grads)

    return run


def gradients_of(
    count: int, reference: Callable[..., Any], inputs: Sequence[Any], *grads: Tensor | None
) -> tuple[Tensor, ...]:
    """New gradients of the first ``count`` inputs, contiguous; empty of one that is None.

    For the references of operators that are gradients: these are called without a graph. ``grads``
    are those of the first results.
    """
    needed = [index < count and isinstance(value, Tensor) for index, value in enumerate(inputs)]
    with as_outside(), torch.enable_grad():
        leaves = [
            value.detach().requires_grad_() if of_it else value
            for value, of_it in zip(inputs, needed, strict=True)
        ]
        found = derived_gradients(reference, leaves, needed, grads, create_graph=False)

    def new(value: Tensor | None, grad: Tensor | None) -> Tensor:
        if value is None:
            return inputs[0].new_empty(0)
        if grad is None:
            return torch.zeros_like(value, memory_format=torch.contiguous_format)
        return grad.detach().clone(memory_format=torch.contiguous_format)

    return tuple(new(inputs[index], found[index]) for index in range(count))


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
    if os.environ.get("MBLM_NATIVE") == "0":  # no kernels is what the user asked for
        return reference

    @functools.cache
    def say() -> None:
        message = f"mblm::{name} runs in plain PyTorch on the GPU: no CUDA kernel of it is compiled"
        warnings.warn(message, RuntimeWarning, stacklevel=3)

    @functools.wraps(reference)
    def run(*args: Any) -> Any:
        if any(isinstance(arg, Tensor) and arg.is_cuda for arg in args):
            say()
        return reference(*args)

    return run
