"""The bytes of many files in a row, memory-mapped: a corpus larger than the memory."""

import mmap
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


class MappedBytes:
    """Files as one row of bytes that is read where it is asked for, and nowhere else.

    Making one looks at the sizes of the files only. A file is mapped into memory when its bytes
    are first read; at most ``MAX_OPEN`` files stay mapped. What is read goes from the mapped file
    straight into the tensor that is returned. It reads like a one-dimensional tensor: ``len``,
    ``numel()``, ``shape``, ``dtype``, and slices, which are copies. A process that it is sent to
    maps the files itself.

    Args:
        files: Files in their order. Empty ones count for nothing.
        separator_id: The id between two files; none by default. May be above 255.

    Attributes:
        files: The files that have bytes.
        sizes: Their sizes.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A file is none, such as a folder. When reading: a file's size has changed.
    """

    MAX_OPEN = 64

    def __init__(self, files: Sequence[Path], separator_id: int | None = None) -> None:
        sizes = [_size(file) for file in files]
        # Absolute, so that a program may change its folder before a file is mapped.
        self.files = [file.absolute() for file, size in zip(files, sizes, strict=True) if size]
        self.sizes = [size for size in sizes if size]
        self._separator_id = separator_id
        between = 0 if separator_id is None else 1
        # Where each file starts, and where another one would.
        *self._starts, end = accumulate((size + between for size in self.sizes), initial=0)
        self._length = max(end - between, 0)
        self._maps: OrderedDict[int, NDArray[np.uint8]] = OrderedDict()

    def read(self, start: int, stop: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """The ids from ``start`` up to ``stop``, which the end cuts off: ``(stop - start,)``."""
        stop = min(stop, self._length)
        if not 0 <= start <= stop:
            raise IndexError(f"bytes {start} to {stop} of {self._length}")
        ids = torch.empty(stop - start, dtype=dtype, device="cpu")
        if self._separator_id is not None:  # what the files, copied over it, leave
            ids.fill_(self._separator_id)
        target = ids.numpy()
        first = max(bisect_right(self._starts, start) - 1, 0)
        for file in range(first, bisect_left(self._starts, stop)):
            origin = self._starts[file]
            piece = self._mapped(file)[max(start - origin, 0) : stop - origin]
            at = max(origin - start, 0)
            target[at : at + len(piece)] = piece
        return ids

    def _mapped(self, file: int) -> NDArray[np.uint8]:
        """The bytes of one file; the file that was not used for longest is closed for it."""
        mapped = self._maps.pop(file, None)
        if mapped is None:
            mapped = np.frombuffer(_map(self.files[file], self.sizes[file]), dtype=np.uint8)
        self._maps[file] = mapped
        if len(self._maps) > self.MAX_OPEN:
            self._maps.popitem(last=False)
        return mapped

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of slices: uint8, or int64 if the separator is above 255."""
        return torch.uint8 if (self._separator_id or 0) < 256 else torch.int64

    @property
    def shape(self) -> torch.Size:
        return torch.Size([self._length])

    def numel(self) -> int:
        return self._length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int | slice) -> torch.Tensor:
        if isinstance(index, slice):
            start, stop, step = index.indices(self._length)
            return self.read(start, max(start, stop), self.dtype)[::step]
        start = index + self._length if index < 0 else index
        if not 0 <= start < self._length:
            raise IndexError(f"byte {index} of {self._length}")
        return self.read(start, start + 1, self.dtype)[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": OrderedDict()}


def _size(file: Path) -> int:
    try:
        status = file.stat()
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {str(file)!r}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{str(file)!r} is no file")
    return status.st_size


def _map(file: Path, size: int) -> mmap.mmap:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        # A mapped file that has shrunk would end the process, not raise.
        if (now := os.fstat(descriptor).st_size) != size:
            raise ValueError(f"{str(file)!r} had {size} bytes and now has {now}")
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)
