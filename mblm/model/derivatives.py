"""Derivatives that a kernel of someone else's has not: those of the same function in PyTorch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mblm.ops._library import derived_gradients
from mblm.utils.transforms import is_transformed, saves_elsewhere


def with_derivatives(
    kernel: Callable[..., Any], derivable: Callable[..., Any], *inputs: Tensor
) -> Any:
    """``kernel(*inputs)``, whose second derivatives and transforms are those of ``derivable``.

    The kernel's own gradient is used as it is, and nothing more is kept for it than its inputs. So
    it is outside of `torch.compile`, and where tensors are saved for the backward pass as they are;
    else the kernel is left alone.

    Args:
        kernel: Gives a tensor or a tuple of tensors. It has a gradient, which cannot be
            differentiated.
        derivable: The same function, which PyTorch can differentiate as often as asked to.
        inputs: Tensors; whatever else the functions depend on, they know.
    """
    if is_transformed():
        return derivable(*inputs)
    if (
        not torch.is_grad_enabled()
        or not any(tensor.requires_grad for tensor in inputs)
        or torch.compiler.is_compiling()
        or saves_elsewhere()
    ):
        return kernel(*inputs)
    gate = _Gate(derivable)
    results = kernel(*_Entry.apply(gate, *inputs))
    if isinstance(results, tuple):
        return _Exit.apply(gate, *results)
    return _Exit.apply(gate, results)[0]


class _Gate:
    """What is around a kernel.

    Where a backward pass is to be differentiated, the gradients that come in at the exit go out at
    the entry as those of ``derivable``; what the kernel makes of them between is left alone.
    """

    def __init__(self, derivable: Callable[..., Any]) -> None:
        self.derivable = derivable
        self.grads: tuple[Tensor | None, ...] | None = None


class _Entry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: _Gate, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.gate = gate
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        gate: _Gate = ctx.gate
        given, gate.grads = gate.grads, None
        if given is None:
            return None, *grads
        needed = ctx.needs_input_grad[1:]
        return None, *derived_gradients(gate.derivable, ctx.saved_tensors, needed, given)


class _Exit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: _Gate, *results: Tensor) -> tuple[Tensor, ...]:
        ctx.gate = gate
        ctx.set_materialize_grads(False)
        own = tuple(result.view_as(result) for result in results)
        constant = [o for o, r in zip(own, results, strict=True) if not r.requires_grad]
        ctx.mark_non_differentiable(*constant)
        return own

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        differentiated = torch.is_grad_enabled() or is_transformed()
        ctx.gate.grads = grads if differentiated else None
        return None, *grads
