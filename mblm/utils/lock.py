"""Keep others from a folder while one works in it: other processes and other threads of this."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

# A process's own locks never keep itself out, and are gone when it closes any handle of the file.
_held: dict[tuple[int, str], object] = {}


@contextmanager
def hold(path: Path, refusal: str) -> Iterator[None]:
    """Hold a file that nobody else gets from here while the block runs.

    Args:
        path: The file, which is made if it is not there.
        refusal: What to say if another has it.

    Raises:
        ValueError: Another has it.
    """
    file_here, ours = (os.getpid(), os.path.realpath(path)), object()
    try:
        if _held.setdefault(file_here, ours) is not ours:
            raise ValueError(refusal)
        with path.open("ab") as file:
            try:
                if fcntl is not None:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise ValueError(refusal) from None
            except OSError:
                pass  # a file system without locks
            yield
    finally:
        # Nothing is called, after which an interrupt could come.
        if file_here in _held and _held[file_here] is ours:
            del _held[file_here]
