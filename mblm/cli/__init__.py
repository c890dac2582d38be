"""The command line, `mblm …`: how it begins and ends; its commands are in `app`.

Nothing that takes time is imported here, so that Ctrl-C is answered quietly from the beginning.
"""

import os
import sys
from typing import NoReturn

from mblm.utils import interrupt


def main() -> NoReturn:
    """Run the command line and exit.

    Expected errors are told on standard error and end with 1, wrong usage with 2. Ctrl-C ends with
    130, a reader of standard output that leaves with 1, and neither is told.
    """
    # A file that has the number of a closed stream would get what libraries write there: here, and
    # in the processes that are started.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever called
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    with interrupt.ends_at_once():
        try:
            from mblm.cli.app import run

            status = run()
        except KeyboardInterrupt:
            status = interrupt.EXIT_STATUS
        except BrokenPipeError:
            status = 1
        try:
            sys.stdout.flush()
        except OSError:  # told already; Python would fail with it again when it exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)
