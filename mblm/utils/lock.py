"""Keep others from a folder while one works in it: other processes, and another part of this."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

# A process's own locks never keep itself out, and are gone when it closes any handle of the file.
_held: set[str] = set()


@contextmanager
def hold(path: Path, refusal: str) -> Iterator[None]:
    """Hold a file, which is made if missing, that nobody else gets from here while the block runs.

    Raises:
        ValueError: Another has it; the message is the refusal.
    """
    name = os.path.realpath(path)
    if name in _held:
        raise ValueError(refusal)
    with path.open("ab") as file:
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(refusal) from None
        except OSError:
            pass  # a file system without locks
        if not _is_there(path, file.fileno()):  # it was removed, and a third may hold a new one
            raise ValueError(refusal)
        try:
            _held.add(name)
            yield
        finally:
            _held.discard(name)


def _is_there(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
