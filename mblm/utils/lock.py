"""Keep other processes from a folder while one works in it."""

from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]


def hold(path: Path, refusal: str) -> BinaryIO:
    """Open a file that no other process gets from here while it is open.

    Args:
        path: The file, which is made if it is not there.
        refusal: What to say if another process has it.

    Raises:
        ValueError: Another process has it.
    """
    file = path.open("ab")
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise ValueError(refusal) from None
    except OSError:
        pass  # a file system without locks
    return file
