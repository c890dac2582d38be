"""Errors that call arguments and files what the caller calls them."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

# What an error begins with: an argument, maybe of an item of another one: "prompts[3]: seeds".
_ARGUMENT = re.compile(r"(?:[\w-]+\[\d+\]: )*[\w-]+(?=[:\[])")


@contextmanager
def naming(within: str = "", **names: str) -> Iterator[None]:
    """Have errors call arguments what the caller calls them; "" is ``within``, of which all are."""
    try:
        yield
    except (TypeError, ValueError) as error:
        told = str(error)
        if match := _ARGUMENT.match(told):
            called = re.sub(
                r"(?<![\w-])[a-z_]+(?=\W|$)", lambda word: names.get(word[0], word[0]), match[0]
            )
            if called != match[0]:
                told = called + told[match.end() :]
                error.args = (told, *error.args[1:])  # the same error, from where it comes
        if not within:
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(within + ("" if told[:1] in (":", "[") else ": ") + told) from error


@contextmanager
def naming_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Have errors of the system that name no file, such as of a full disk, name this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise
