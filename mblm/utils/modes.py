"""Tensors that outlive the mode they are made in."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def lasting_tensors() -> Iterator[None]:
    """What is made within is of use in training, though the caller be in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def is_lasting(tensor: torch.Tensor) -> bool:
    """Whether no transform (`torch.func`) and no tracing that ends will take it along."""
    return type(tensor) is torch.Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(
        tensor
    )


def own_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of what has no gradient, to write to, keep, and use in a loss, in whatever mode."""
    with torch.inference_mode(False):
        return tensor.clone()
