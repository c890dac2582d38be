"""What PyTorch makes of functions: ``torch.func``, forward-mode AD, `torch.compile`."""

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

_F = TypeVar("_F", bound=Callable[..., Any])


def not_compiled(function: _F) -> _F:
    """Leave a function and all that it calls to Python under `torch.compile`: a graph break.

    Unlike `torch.compiler.disable`, it does not import the compiler.
    """
    left_to_python = torch._disable_dynamo(function)

    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        compiler_is_there = "torch._dynamo" in sys.modules
        return (left_to_python if compiler_is_there else function)(*arguments, **options)

    return cast(_F, run)


def decoding(function: _F) -> _F:
    """`not_compiled`, and refused within ``torch.func``, whose tensors compiled code cannot read.

    Raises:
        NotImplementedError: Called within a transform.
    """
    plain = not_compiled(function)

    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                f"{function.__qualname__}: no decoding within torch.func's transforms (vmap, grad, "
                "jvp); decode outside of them, or call the model, which has them"
            )
        return plain(*arguments, **options)

    return cast(_F, run)


def is_traced() -> bool:
    """Whether what runs is traced or tried without values, of which none can be asked."""
    # Proxies are of make_fx, by which torch.func.linearize traces.
    modes = torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE
    return torch.compiler.is_compiling() or any(
        torch._C._get_dispatch_mode(mode) is not None for mode in modes
    )


def is_transformed() -> bool:
    """Whether PyTorch derives another function from what runs, other than by a backward pass."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def values_of(tensor: Any) -> Tensor:
    """The tensor that ``torch.func`` wraps, with a dimension more for each ``vmap``."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    unwrapped: Tensor = tensor
    return unwrapped
