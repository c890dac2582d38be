"""Tell people something on standard error."""

import os
import sys


def say(message: str) -> None:
    """Print a line on standard error. One that is closed, is full or has no reader ends nothing."""
    if sys.stderr is None:  # closed by whoever called: `print` would take standard output instead
        return
    try:
        print(message, file=sys.stderr, flush=True)
    except OSError:  # Python would fail with it again when it exits, with another status
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
