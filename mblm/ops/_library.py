"""Where an operator's schema, reference, fake function and gradient are registered.

Every operator of the namespace ``mblm`` is defined once, in Python. The reference is its
CompositeExplicitAutograd kernel: it runs wherever no native kernel is loaded for the device.
"""

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
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            qualified, backward, setup_context=setup_context, lib=LIBRARY
        )
