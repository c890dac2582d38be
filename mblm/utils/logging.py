"""Loggers that write to a file or to stderr in one format."""

import logging
import sys
from contextlib import suppress
from pathlib import Path


class _LogFile(logging.FileHandler):
    """Says nothing where it cannot be written, as on a full disk: what is saved next tells that."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):
            super().close()


def create_logger(
    name: str,
    *,
    log_dir: str | Path | None = None,
    noop: bool = False,
    alone: bool = False,
) -> logging.Logger:
    """Return the logger `name` with a handler that writes to one destination.

    Called again for the same name and destination, it replaces its earlier handler, so that
    every line is written once. The logger passes all levels unless its level was set before, and
    does not propagate to the root logger.

    Args:
        name: The logger's name.
        log_dir: Write to the file ``<name>.log`` in this folder, which is created if missing.
            By default the logger writes to stderr.
        noop: Write nowhere, whatever `log_dir` is.
        alone: Replace the handlers of other destinations, too, such as those of a run before.
    """
    handler: logging.Handler
    if noop:
        destination, handler = "nowhere", logging.NullHandler()
    elif log_dir:
        path = Path(log_dir, f"{name}.log").absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        # Names of files need not be text.
        handler = _LogFile(path, encoding="utf-8", errors="backslashreplace")
        destination = str(path)
    else:
        destination, handler = "stderr", logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s - %(name)s - %(levelname)s - %(message)s"))

    logger = logging.getLogger(name)
    handler_name = f"{name} to {destination}"
    for earlier in [h for h in logger.handlers if alone or h.name == handler_name]:
        logger.removeHandler(earlier)
        earlier.close()
    handler.name = handler_name
    logger.addHandler(handler)
    logger.propagate = False
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.DEBUG)
    return logger


def shutdown_log_handlers() -> None:
    """Flush and close all handlers of all loggers, as at the end of a program."""
    logging.shutdown()
