"""Where an operator's schema, reference, fake function and gradient are registered.

Every operator of the namespace ``mblm`` is defined once, in Python. The reference is its
CompositeExplicitAutograd kernel: it runs wherever no native kernel is loaded for the device.
"""

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("mblm", "DEF")


def register_operator(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Register one operator.

    Args:
        schema: The operator's schema, ``name(arguments) -> results``.
        reference: Readable PyTorch implementation, the specification of the native kernels.
        fake: Shapes and dtypes of the results, from shapes and dtypes of the arguments.
        backward: Gradient, ``backward(ctx, *grads) -> gradients of the arguments``. An operator
            without one is not differentiable.
        setup_context: ``setup_context(ctx, inputs, output)``, saves what ``backward`` needs.
    """
    name = schema.split("(", 1)[0].strip()
    qualified = f"mblm::{name}"
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, _said_on_cuda(name, reference), "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            qualified, backward, setup_context=setup_context, lib=LIBRARY
        )


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
