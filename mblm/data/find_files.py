"""From files, folders and globs to the files they mean."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path


def find_files(folder: Path, entries: Sequence[str]) -> dict[str, Path]:
    """The files that entries mean, by their real path.

    An entry is a file, a folder (all in it) or a glob of files (``**`` for any folders), relative
    to ``folder`` or absolute. Entries keep their order, and the files of one are sorted by the
    parts of their path. Names that start with a dot are left out unless an entry says them, and so
    are links to folders inside a folder. A file that several entries or links lead to counts once,
    the first time.

    Raises:
        FileNotFoundError: An entry that means no file.
    """
    found: dict[str, Path] = {}
    for entry in entries:
        files = _files_of(folder, entry)
        if not files:
            raise FileNotFoundError(f"files: {entry!r} is no file in {str(folder)!r} or holds none")
        # Of several paths to a file the shortest counts: a glob follows links, also in circles.
        files.sort(key=lambda file: (len(file.parts), file.parts), reverse=True)
        nearest = {os.path.realpath(file): file for file in files}
        for real, file in sorted(nearest.items(), key=lambda item: item[1].parts):
            found.setdefault(real, file)
    return found


def _files_of(folder: Path, entry: str) -> list[Path]:
    path = folder / entry
    if path.is_file():
        return [path]
    if path.is_dir():
        return _files_under(path)
    matches = glob.glob(entry, root_dir=folder, recursive=True)
    return [folder / match for match in matches if (folder / match).is_file()]


def _files_under(folder: Path) -> list[Path]:
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(parent, name) for name in names if not name.startswith(".")]
        files += [path for path in paths if path.is_file()]
    return files
