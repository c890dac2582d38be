"""Gradients of parameters, added up over pieces of a computation."""

import contextlib
import functools
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from mblm.model.linear import apply
from mblm.model.plain import is_plain
from mblm.ops.linear import add_outer_products, linear


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass that raises where it is to be differentiated in turn.

    PyTorch's own lets the gradients pass for constants where those that it is given are.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "the backward pass of a model that is computed piece by piece is not "
                "differentiated in turn (create_graph=True): set tile to None and "
                "checkpoint_global to False"
            )
        return backward(ctx, *grads)

    return once


# Of several threads that compute with one model, PyTorch would lose a hook.
_REGISTERING = threading.Lock()


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
        self._backward_pass = -1

    @contextlib.contextmanager
    def adding(self) -> Iterator[None]:
        """While the outermost sum over tiles is computed."""
        # Before the tiles' memory, not between; half precision would lose the small additions.
        self._sums = [
            torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            for p in self.parameters
        ]
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
        outs = [out] if isinstance(out, Tensor) else out
        with _REGISTERING:
            for tensor in outs:
                tensor.register_hook(self._begin)
            hooks = [
                parameter.register_hook(functools.partial(self._take, index))
                for index, parameter in enumerate(self.parameters)
            ]
        try:
            leaves = [*self.parameters, *inputs]
            gradients = torch.autograd.grad(outs, leaves, of_out, allow_unused=True)
        finally:
            for hook in hooks:
                hook.remove()
        return gradients[len(self.parameters) :]

    def _begin(self, _: Tensor) -> None:
        """Remember which backward pass it is: the hooks are called by those of others, too."""
        self._backward_pass = torch._C._current_graph_task_id()

    def _take(self, index: int, gradient: Tensor | None) -> Tensor | None:
        """Add a parameter's gradient and leave one without memory in its place."""
        if gradient is None or torch._C._current_graph_task_id() != self._backward_pass:
            return None
        self._sums[index] += gradient
        self._used[index] = True
        return torch.zeros((), dtype=gradient.dtype, device=gradient.device).expand(gradient.shape)

    def in_types_of_parameters(self) -> list[Tensor | None]:
        """The sums, each of its parameter's type."""
        return [
            None if gradient is None else gradient.to(parameter.dtype)
            for gradient, parameter in zip(self.sums(), self.parameters, strict=True)
        ]

    def linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """``layer(x)``; while sums are being added, the layer's gradients are not made first.

        This suits a layer whose weight is large beside ``x``. One that is not plain is called as it
        is.
        """
        if not (self.is_adding and torch.is_grad_enabled() and is_plain(layer, nn.Linear)):
            return apply(layer, x)
        out: Tensor = _LinearIntoSums.apply(x, layer.weight, layer.bias, self)
        return out

    def sum_for(self, parameter: Tensor | None) -> Tensor | None:
        """The sum that a parameter's gradient is added to, None where it gets none."""
        for index, known in enumerate(self.parameters):
            if known is parameter:
                self._used[index] = True
                return self._sums[index]
        return None

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
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors  # (.., K); the weight is (N, K)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = linear(grad, ctx.weight.to(grad.dtype).T).to(x.dtype)
        x, grad = x.flatten(0, -2), grad.flatten(0, -2)
        if (of_weight := ctx.sums.sum_for(ctx.weight)) is not None:
            add_outer_products(of_weight, grad.to(of_weight.dtype), x.to(of_weight.dtype))
        if (of_bias := ctx.sums.sum_for(ctx.bias)) is not None:
            of_bias += grad.sum(0, dtype=of_bias.dtype)
        return of_x, None, None, None


def gradients_are_watched(model: nn.Module) -> bool:
    """Whether gradients may reach the parameters by an ordinary backward pass only.

    So with FSDP, which gathers a stage's weights for its passes; with replicas of DataParallel,
    whose weights are no parameters; and with hooks on gradients, to be called once.
    """
    return (
        _is_managed(model)
        or any(getattr(module, "_is_replica", False) for module in model.modules())
        or any(parameter._backward_hooks for parameter in model.parameters())
    )


def with_weights_of_now(model: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that computes with what are the model's parameters now, whenever it is called.

    What is computed again in a backward pass would otherwise find others there if
    ``torch.func.functional_call`` had put some in place for the forward pass alone.
    """
    if torch.compiler.is_compiling() or _is_managed(model):  # FSDP puts the weights in place
        return function
    weights: dict[str, Tensor] = dict(model.named_parameters())

    def call(*args: Any) -> Any:
        if all(map(operator.is_, model.parameters(), weights.values())):
            return function(*args)
        with _reparametrize_module(model, weights, tie_weights=True):
            return function(*args)

    return call


def _is_managed(model: nn.Module) -> bool:
    return any(getattr(m, "_is_fsdp_managed_module", False) for m in model.modules())
