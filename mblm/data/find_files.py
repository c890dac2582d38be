"""From files, folders and globs to the files they mean."""

import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path


def find_files(
    folder: Path, entries: Sequence[str], without: str | Path | None = None
) -> dict[str, Path]:
    """The files that entries mean, by their real path.

    An entry is a file, a folder (all in it) or a glob of files (``**`` for any folders), relative
    to ``folder``, absolute, or in the home folder ``~``. A part of it such as ``[1]`` that exists
    as it is written means itself. Entries keep their order, and the files of one are sorted by the
    parts of their path. Names that start with a dot are left out unless an entry says them, and so
    are links to folders inside a folder or below ``**``. A file that several entries or links lead
    to counts once, the first time. What is in the folder ``without`` is left out, unless the entry
    itself is.

    Raises:
        FileNotFoundError: An entry that means no file.
        PermissionError: A folder that cannot be searched.
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
        # Of several paths to a file the shortest counts.
        files.sort(key=lambda file: (len(file.parts), file.parts), reverse=True)
        nearest = {os.path.realpath(file): file for file in files}
        for real, file in sorted(nearest.items(), key=lambda item: item[1].parts):
            found.setdefault(real, file)
    return found


def _is_in(folder: str | Path, path: str | Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _files_of(folder: Path, entry: Path) -> list[Path]:
    path = folder / entry
    if path.is_file():
        return [path]
    if path.is_dir():
        return list(_matches(path, ["**"]))
    anchor = entry.anchor  # "/" if the entry is absolute
    return list(_matches(folder / anchor, entry.parts[bool(anchor) :]))


def _matches(path: Path, parts: Sequence[str]) -> Iterator[Path]:
    """The files below a folder that names and patterns lead to, some of them twice."""
    first, *rest = parts
    if first == "**":
        yield from _matches(path, rest or ["*"])
        inner = [sub for sub in _select(path, "*") if sub.is_dir() and not sub.is_symlink()]
        steps = [(sub, parts) for sub in inner]
    else:
        steps = [(sub, rest) for sub in _select(path, first)]
    for sub, following in steps:
        if not following and sub.is_file():
            yield sub
        elif following and sub.is_dir():
            yield from _matches(sub, following)


def _select(folder: Path, pattern: str) -> list[Path]:
    """What in a folder has a name, or else matches a pattern."""
    names = os.listdir(folder)
    if pattern in (".", "..") or (pattern in names and not fnmatch(pattern, pattern)):
        return [folder / pattern]
    hidden = pattern.startswith(".")
    return [
        folder / name
        for name in names
        if fnmatch(name, pattern) and (hidden or not name.startswith("."))
    ]
