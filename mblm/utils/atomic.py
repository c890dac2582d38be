"""Replace a file as a whole or not at all."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mblm.utils.naming import naming_file


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a binary file whose contents become `path` when the block ends without an error.

    The bytes are written to a file beside `path`, synced to the disk and renamed over it, so that
    a reader, or a machine that lost power, sees the old file or the new one. On an error `path`
    is left as it was and the file beside it is removed. A symbolic link is followed, and the
    permissions of a file that is replaced are kept.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "No such folder", str(target.parent))
    if target.exists() and not target.is_file():
        raise ValueError(f"{path} is not a regular file and cannot be replaced")
    # Not tempfile: its files are private, and ours must get the permissions of any new file.
    temporary = target.with_name(f".{target.name}.{os.urandom(4).hex()}.tmp")
    try:
        with naming_file(path), temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(target.parent)


def remove_leftovers(path: Path) -> None:
    """Remove what `atomic_write` of a path had begun when its process was killed.

    The name may be a pattern; nobody else may write what it matches.
    """
    for file in path.parent.glob(f".{path.name}.{'[0-9a-f]' * 8}.tmp"):
        if file.is_file():
            file.unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    """Make the rename itself durable, where the system can open and sync a directory."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
