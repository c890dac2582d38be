"""Ctrl-C in a program that has nothing to save: it ends at once, without a word."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

EXIT_STATUS = 130  # what a shell reports of a program that SIGINT ended


@contextmanager
def ends_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process while the block runs.

    A ``KeyboardInterrupt`` would be told by whatever it comes through: in the middle of an import,
    C++ code ends the process with a message of its own.
    """
    before = signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def raises() -> Iterator[None]:
    """Let Ctrl-C raise ``KeyboardInterrupt`` while the block runs, for what must be tidied up."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(number: int, frame: FrameType | None) -> None:
    with suppress(Exception):  # such as a write that was interrupted
        sys.stdout.flush()
    os._exit(EXIT_STATUS)
