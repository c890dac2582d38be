"""Runs tests with a library that takes the kernels of a GPU, emulated, for tensors on the CPU.

    python -m tests.packaging.emulated FOLDER [arguments of pytest]

Without arguments it runs `TESTS`, and looks closely: each operator is called twice, with the
threads of a block in rising and in falling order, as a result that differs lacks a barrier. The
order changes with every call of PyTorch's, so that decoding meets both. New memory holds NaNs, so
that nothing rests on what was not written.
"""

import ctypes
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mblm.ops import _native

CHOSEN = "native_equals or float64_on_the_cpu or KernelsOfAGpu or vanish or wherever_it_lies"
TESTS = ("tests/ops", "tests/inference/test_device_cache.py", "-k", f"{CHOSEN} or device_cache")


class InBothOrders(TorchDispatchMode):
    """Turns the order of threads with each call, and calls this package's operators in both."""

    def __init__(self, library: str) -> None:
        super().__init__()
        self.is_falling = ctypes.c_bool.in_dll(ctypes.CDLL(library), "mblm_falling_order")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        self.is_falling.value ^= True
        if func.namespace == "mblm" and isinstance(results, (Tensor, tuple)):
            again = func(*args, **(kwargs or {}))
            torch.testing.assert_close(again, results, rtol=0, atol=0, equal_nan=True)
        return results


def main(folder: str, *arguments: str) -> int:
    """The exit status of pytest."""
    _native._library = library = _native.load_library(Path(folder))
    if arguments:
        return pytest.main(["-q", *arguments])
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills new memory
    assert library.__file__
    with InBothOrders(library.__file__):
        return pytest.main(["-q", *TESTS])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
