"""From files, folders and globs to the files they mean."""

import os
from collections.abc import Sequence
from pathlib import Path


def find_files(
    folder: Path, entries: Sequence[str], without: str | Path | None = None
) -> dict[str, Path]:
    """The files that entries mean, by their real path.

    An entry is a file, a folder (all in it) or a glob of files (``**`` for any folders), relative
    to ``folder``, absolute, or in the home folder ``~``; one that exists as it is written is no
    glob. Entries keep their order, and the files of one are sorted by the parts of their path.
    Names that start with a dot are left out unless the entry has one, and so are links to folders
    inside a folder or below ``**``. A file that several entries or links lead to counts once, the
    first time. What is in the folder ``without`` is left out, unless the entry itself is.

    Raises:
        FileNotFoundError: An entry that means no file.
        PermissionError: A folder in a folder that is an entry cannot be searched.
    """
    found: dict[str, Path] = {}
    for entry in entries:
        path = Path(os.path.expanduser(entry))
        files = _files_of(folder, path)
        if without is not None and not _is_in(without, folder / path):
            files = [file for file in files if not _is_in(without, file)]
        if not files:
            of = "" if entry == "." else f" of {entry!r}"
            raise FileNotFoundError(f"files: no file{of} in {str(folder)!r}")
        for file in sorted(files, key=lambda file: file.parts):
            found.setdefault(os.path.realpath(file), file)
    return found


def _is_in(folder: str | Path, path: str | Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _files_of(folder: Path, entry: Path) -> list[Path]:
    path = folder / entry
    if path.is_file():
        return [path]
    if path.is_dir():
        return _files_in(path)
    base = folder / entry.anchor  # "/" if the entry is absolute
    parts = list(entry.parts[bool(entry.anchor) :])
    names_hidden, depth = any(map(_is_hidden, parts)), len(base.parts)
    if parts[-1:] == ["**"]:
        parts.append("*")
    return [
        file
        for file in base.glob("/".join(parts))
        if file.is_file() and (names_hidden or not any(map(_is_hidden, file.parts[depth:])))
    ]


def _files_in(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise error

    found: list[Path] = []
    for path, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        found += [Path(path, name) for name in names if not _is_hidden(name)]
    return [file for file in found if file.is_file()]


def _is_hidden(name: str) -> bool:
    return name.startswith(".") and name != ".."
