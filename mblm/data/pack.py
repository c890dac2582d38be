"""Pack documents from anywhere into a folder that training reads fast: `mblm.data.packed`."""

import hashlib
import os
import shutil
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from mblm.data.deal import Dealer
from mblm.data.documents import Source, find_source, read_source
from mblm.data.packed import BYTES, DOCUMENTS, SUMMARY, PackedPart, PackSummary
from mblm.data.types import ModelMode
from mblm.utils.atomic import atomic_write, sync_directory
from mblm.utils.lock import hold
from mblm.utils.naming import naming_file


def pack(
    sources: Sequence[str | os.PathLike[str] | Source],
    out: str | os.PathLike[str],
    *,
    field: str = "text",
    valid: float = 0.01,
    whole: bool = False,
    on_read: Callable[[int], object] = lambda size: None,
) -> PackSummary:
    """Write the documents of sources into a new folder, which is there as a whole or not at all.

    Args:
        sources: Files, folders, globs, URLs or names on the hub; `find_source` says which is which.
        out: The folder.
        field: The column of tables that holds the documents.
        valid: The validation part's share of the bytes, in whole documents from all over; 0: none.
        whole: Whether tables are one document each, as other files are.
        on_read: Called with how many bytes of a file were read.

    Returns:
        What is in the folder's ``pack.json``.

    Raises:
        TypeError: ``sources`` is no list but a single name.
        FileExistsError: There is such a folder already.
        OSError: A source is missing, or the folder cannot be written.
        ValueError: A source is empty or cannot be read, a row lacks the field, or no document is
            left for a part.
    """
    if not 0 <= valid < 1:
        raise ValueError(f"valid: expected a share in [0, 1), got {valid}")
    if isinstance(sources, (str, os.PathLike)):
        raise TypeError(f"sources: expected a list of names, got {sources!r}; of one it is [name]")
    found = [
        source if isinstance(source, Source) else find_source(os.fspath(source))
        for source in sources
    ]
    seen: dict[str, str] = {}  # of each file by its real path the source; of the hub by the name
    for source in found:
        for file in [os.path.realpath(file) for file in source.files] or [source.name]:
            if file in seen:
                raise ValueError(
                    f"sources: {file!r} is given twice, by {seen[file]!r} and {source.name!r}"
                )
            seen[file] = source.name
    shares = {ModelMode.TRAIN.value: 1 - valid}
    if valid:
        shares[ModelMode.VALID.value] = valid
    dealer = Dealer(shares)
    left_out: Counter[str] = Counter()
    with _new_folder(Path(out)) as folder:
        writers = {part: _PartWriter(folder / part) for part in shares}
        for source in found:
            count, without = 0, Counter[str]()
            for document in read_source(source, field, whole=whole, on_read=on_read):
                if document.trouble:
                    without[document.trouble] += 1
                else:
                    writers[dealer.deal(len(document.data))].add(document.data, source.name)
                    count += 1
            if not count:
                raise ValueError(f"{source.name}: holds no document" + _told(without))
            left_out += without
        parts = {part: writer.close() for part, writer in writers.items()}
        for part, told in parts.items():
            if not told.documents:
                documents = sum(other.documents for other in parts.values())
                raise ValueError(
                    f"valid: {valid:g} of the bytes leaves the {part} part none of {documents} "
                    "documents: ask for a larger share, or 0"
                )
        summary = PackSummary(parts=parts, left_out=dict(left_out))
        with atomic_write(folder / SUMMARY) as stream:
            stream.write(summary.model_dump_json(indent=2).encode() + b"\n")
    return summary


class _PartWriter:
    """Writes the files of one part."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._file = (folder / BYTES).open("xb")
        self._offsets = array("q", [0])
        self._hash = hashlib.sha256()
        self._sources: Counter[str] = Counter()

    def add(self, document: bytes, source: str) -> None:
        self._file.write(document)
        self._hash.update(document)
        self._offsets.append(self._offsets[-1] + len(document))
        self._sources[source] += len(document)

    def close(self) -> PackedPart:
        with self._file as file:
            file.flush()
            os.fsync(file.fileno())
        with atomic_write(self._folder / DOCUMENTS) as file:
            np.save(file, np.frombuffer(self._offsets, np.int64))
        return PackedPart(
            documents=len(self._offsets) - 1,
            bytes=self._offsets[-1],
            sha256=self._hash.hexdigest(),
            sources=dict(self._sources),
        )


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that becomes ``out`` when the block ends without an error, and else is removed.

    What a process that was killed has left is removed, too.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists already: remove it, or name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder, lock = (out.absolute().with_name(f".{out.name}.{end}") for end in ("tmp", "lock"))
    with hold(lock, f"{out}: it is being packed into already"):
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            with naming_file(out):
                yield folder
            os.rename(folder, out)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            lock.unlink(missing_ok=True)  # another that ended just now may have removed it
    sync_directory(out.absolute().parent)


def _told(left_out: Counter[str]) -> str:
    return "".join(f", {count:,} are {trouble}" for trouble, count in left_out.items())
