"""Interrupts at every moment of a block, one after the other."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any


@contextmanager
def raised_at(number: int, module: ModuleType) -> Iterator[None]:
    """Raise KeyboardInterrupt before the number-th line of a module that the block goes through."""
    counted = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal counted
        if frame.f_code.co_filename != module.__file__:
            return None
        counted += event == "line"
        if event == "line" and counted == number:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    watching = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(watching)
