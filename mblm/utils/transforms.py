"""What transforms of ``torch.func`` and forward-mode AD do to tensors and to calls."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether PyTorch derives another function from what runs, other than by a backward pass."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def values_of(tensor: Any) -> Tensor:
    """The tensor that ``torch.func`` wraps, with a dimension more for each ``vmap``."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    unwrapped: Tensor = tensor
    return unwrapped
