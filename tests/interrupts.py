"""Interrupts at every moment of a block, one after the other."""

import dis
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any


@contextmanager
def raised_at(number: int, module: ModuleType, *, after_calls: bool = False) -> Iterator[None]:
    """Raise KeyboardInterrupt before the number-th line of a module that the block goes through.

    Or after the number-th call that the module's code makes, where Python looks for interrupts.
    """
    counted, last = 0, ""

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal counted, last
        if frame.f_code.co_filename != module.__file__:
            return None
        frame.f_trace_opcodes = after_calls
        is_there = event == "line" and not after_calls
        if event == "opcode":
            before, last = last, dis.opname[frame.f_code.co_code[frame.f_lasti]]
            is_there = before.startswith("CALL")
        counted += is_there
        if is_there and counted == number:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    watching = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(watching)
