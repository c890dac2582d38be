"""The bytes of many files in a row, read where they are asked for: a corpus larger than memory."""

import os
import stat
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mblm.utils.naming import naming_file


class FileBytes:
    """Files as one row of bytes that is read where it is asked for, and nowhere else.

    Making one opens every file once and notes its size; at most ``MAX_OPEN`` files stay open, so
    that a file may be deleted or replaced meanwhile. They are read, not mapped into memory, where
    a file that is cut short would end the process. ``len``, ``numel()``, indices and slices are as
    of a one-dimensional tensor, uint8 or, if the separator is above 255, int64; slices are copies.
    A process that it is sent to opens the files itself.

    Args:
        files: Files in their order. Empty ones count for nothing.
        separator_id: The id between two documents; none by default. May be above 255.
        starts: Where each document starts in the bytes of all files, ascending from 0, int64; by
            default, where each file does.

    Attributes:
        files: The files that have bytes.
        sizes: Their sizes.
        starts: Where each document starts in the row, int64.

    Raises:
        OSError: A file does not exist or cannot be read; also when reading.
        ValueError: A file is none, such as a folder. When reading: a file has lost bytes, or has
            been opened again and has another size.
    """

    MAX_OPEN = 64

    def __init__(
        self,
        files: Sequence[Path],
        separator_id: int | None = None,
        starts: NDArray[np.int64] | None = None,
    ) -> None:
        self._opened: OrderedDict[Path, _OpenFile] = OrderedDict()
        # Absolute, so that a program may change its folder before a file is opened again.
        paths = [file.absolute() for file in files]
        sizes = [self._open(path).size for path in paths]
        self.files = [path for path, size in zip(paths, sizes, strict=True) if size]
        self.sizes = [size for size in sizes if size]
        *self._origins, total = accumulate(self.sizes, initial=0)  # where each file starts
        self._separator_id = separator_id
        self.starts = np.array(self._origins, np.int64) if starts is None else starts
        if separator_id is not None:
            self.starts = self.starts + np.arange(len(self.starts))
            total += max(len(self.starts) - 1, 0)
        self._length = total

    def read(self, start: int, stop: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """The ids from ``start`` up to ``stop``, which the end cuts off: ``(stop - start,)``."""
        stop = min(stop, self._length)
        if not 0 <= start <= stop:
            raise IndexError(f"bytes {start} to {stop} of {self._length}")
        ids = torch.empty(stop - start, dtype=dtype, device="cpu")
        if self._separator_id is None or start == stop:
            ids.numpy()[:] = self._read_bytes(start, stop)
            return ids
        # Before a place in the row are as many separators as documents that start up to there,
        # but for the first, which has none before it.
        before, until = np.searchsorted(self.starts, (start, stop), side="right").tolist()
        is_byte = np.ones(stop - start, dtype=bool)
        is_byte[self.starts[before:until] - 1 - start] = False
        ids.fill_(self._separator_id)
        ids.numpy()[is_byte] = self._read_bytes(start - (before - 1), stop - (until - 1))
        return ids

    def _read_bytes(self, begin: int, end: int) -> NDArray[np.uint8]:
        """The bytes from ``begin`` up to ``end`` of all files."""
        pieces = []
        first = max(bisect_right(self._origins, begin) - 1, 0)
        for file in range(first, bisect_left(self._origins, end)):
            path, origin, size = self.files[file], self._origins[file], self.sizes[file]
            opened = self._open(path)
            if opened.size != size:
                raise ValueError(f"{str(path)!r} had {size} bytes and now has {opened.size}")
            pieces.append(opened.read(max(begin - origin, 0), min(end - origin, size)))
        return np.frombuffer(b"".join(pieces), dtype=np.uint8)  # a single one is not copied

    def _open(self, path: Path) -> "_OpenFile":
        """An open file; the one that was not used for longest is closed for it."""
        opened = self._opened.pop(path, None) or _OpenFile(path)
        self._opened[path] = opened
        if len(self._opened) > self.MAX_OPEN:
            self._opened.popitem(last=False)
        return opened

    def numel(self) -> int:
        return self._length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int | slice) -> torch.Tensor:
        if not isinstance(index, slice):
            place = range(self._length)[index]
            return self[place : place + 1][0]
        start, stop, step = index.indices(self._length)
        dtype = torch.uint8 if (self._separator_id or 0) < 256 else torch.int64
        return self.read(start, max(start, stop), dtype)[::step]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": OrderedDict()}


class _OpenFile:
    """A file that is open until nobody holds this; it has no position, so processes may share it.

    Attributes:
        size: Its size when it was opened.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = -1
        self._path = path
        if not stat.S_ISREG(path.stat().st_mode):  # before a pipe is opened, which would wait
            raise ValueError(f"{str(path)!r} is no file")
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self.size = os.fstat(self._descriptor).st_size

    def read(self, begin: int, end: int) -> bytes:
        """The bytes from ``begin`` up to ``end``."""
        pieces = []
        while begin < end:  # a system reads 2 GiB at most at once
            with naming_file(self._path):
                pieces.append(self._read_at(begin, end - begin))
            if not pieces[-1]:
                now = os.fstat(self._descriptor).st_size
                raise ValueError(f"{str(self._path)!r} had {self.size} bytes and now has {now}")
            begin += len(pieces[-1])
        return b"".join(pieces)

    def _read_at(self, begin: int, count: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._descriptor, count, begin)
        with self._path.open("rb") as file:  # on Windows: threads share a descriptor's position
            file.seek(begin)
            return file.read(count)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
