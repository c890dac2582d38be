"""Ctrl-C in a program that has nothing to save: it ends at once, without a word."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

EXIT_STATUS = 130  # what a shell reports of a program that SIGINT ended


@contextmanager
def ends_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process while the block runs.

    A ``KeyboardInterrupt`` would be told by whatever it comes through: in the middle of an import,
    C++ code ends the process with a message of its own.
    """
    with _handled_by(_end):
        yield


@contextmanager
def raises() -> Iterator[None]:
    """Let Ctrl-C raise ``KeyboardInterrupt`` while the block runs, for what must be tidied up."""
    with _handled_by(signal.default_int_handler):
        yield


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:  # as a shell's script has it for what it starts beside itself
        yield
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(number: int, frame: FrameType | None) -> None:
    with suppress(Exception):  # such as a write that was interrupted
        sys.stdout.flush()
    os._exit(EXIT_STATUS)
