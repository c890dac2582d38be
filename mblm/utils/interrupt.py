"""What signals do while a block runs, such as Ctrl-C in a program that has nothing to save."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from types import FrameType

EXIT_STATUS = 130  # what a shell reports of a program that SIGINT ended


def ends_at_once() -> AbstractContextManager[None]:
    """Let Ctrl-C end the process while the block runs.

    A ``KeyboardInterrupt`` would be told by whatever it comes through: in the middle of an import,
    C++ code ends the process with a message of its own.
    """
    return handled([signal.SIGINT], _end)


def raises() -> AbstractContextManager[None]:
    """Let Ctrl-C raise ``KeyboardInterrupt`` while the block runs, for what must be tidied up."""
    return handled([signal.SIGINT], signal.default_int_handler)


@contextmanager
def handled(
    signals: Iterable[signal.Signals],
    handler: Callable[[int, FrameType | None], object],
    *,
    even_ignored: Collection[signal.Signals] = (),
) -> Iterator[None]:
    """Let signals call a handler while the block runs, but for those that are ignored.

    They are where a shell's script starts something beside itself, and after ``nohup``. Threads
    other than the main one cannot take signals: there nothing changes.
    """
    before = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in signals:
                if number in even_ignored or signal.getsignal(number) is not signal.SIG_IGN:
                    before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)


def _end(number: int, frame: FrameType | None) -> None:
    with suppress(Exception):  # such as a write that was interrupted
        sys.stdout.flush()
    os._exit(EXIT_STATUS)
