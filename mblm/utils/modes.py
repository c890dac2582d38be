"""Modes of PyTorch: tensors that outlive the one they are made in, and autocast."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def lasting_tensors() -> Iterator[None]:
    """What is made within is of use in training, though the caller be in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def own_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of what has no gradient, to write to, keep, and use in a loss, in whatever mode."""
    with torch.inference_mode(False):
        return tensor.clone()


def autocast_of(device_type: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """The autocast there is now, to be entered again."""
    if not torch.amp.is_autocast_available(device_type):
        return contextlib.nullcontext
    dtype = torch.get_autocast_dtype(device_type)
    enabled = torch.is_autocast_enabled(device_type)
    return functools.partial(torch.autocast, device_type, dtype, enabled)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """No autocast, as in a backward pass, also where a device knows of none."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
