"""Tell people something on standard error."""

import os
import sys


def say(message: str) -> None:
    """Print a line on standard error. One that is closed, is full or has no reader ends nothing."""
    if getattr(sys.stderr, "closed", sys.stderr is None):  # for None, `print` takes standard output
        return
    try:
        print(message, file=sys.stderr, flush=True)
    except OSError:  # Python would fail with it again when it exits, with another status
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
