"""Errors that call arguments and files what the caller calls them."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def naming(prefix: str = "", **names: str) -> Iterator[None]:
    """Have errors begin so, and call arguments what the caller calls them."""
    try:
        yield
    except (TypeError, ValueError) as error:
        told = str(error)
        if (match := re.match(r"(\w+)(?=[:\[])", told)) and match[0] in names:
            told = names[match[0]] + told[match.end() :]
            error.args = (told, *error.args[1:])  # the same error, from where it comes
        if not prefix:
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(prefix + told) from error


@contextmanager
def naming_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Have errors of the system that name no file, such as of a full disk, name this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise
