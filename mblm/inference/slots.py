"""Rows by their handles: slots that are used again, and who uses a row at this time."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

from mblm.inference.cache import Row

_T = TypeVar("_T")
_SLOT_BITS = 32


class Slots(Generic[_T]):
    """What each row has, by its handle."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._rows: dict[Row, _T] = {}
        self._in_use: set[Row] = set()
        self._generations: list[int] = []  # per slot, how many rows it has had
        self._free: list[int] = []

    def add(self, values: Sequence[_T]) -> list[Row]:
        """New rows that have these."""
        with self._lock:
            rows = []
            for value in values:
                if self._free:
                    slot = self._free.pop()
                else:
                    slot = len(self._generations)
                    self._generations.append(0)
                row = slot | self._generations[slot] << _SLOT_BITS
                self._rows[row] = value
                rows.append(row)
            return rows

    def drop(self, rows: Sequence[Row]) -> list[_T]:
        """Forget rows, in use or not; returns what those had that there were."""
        dropped = []
        with self._lock:
            for row in rows:
                value = self._rows.pop(row, None)
                if value is not None:
                    slot = row & ((1 << _SLOT_BITS) - 1)
                    self._generations[slot] += 1
                    self._free.append(slot)
                    dropped.append(value)
        return dropped

    @contextmanager
    def using(self, rows: Sequence[Row]) -> Iterator[list[_T]]:
        """What rows have, for one call at a time.

        Raises:
            ValueError: A row that there is not, twice the same, or in another call.
        """
        taken: set[Row] = set()
        try:
            with self._lock:
                for row in rows:
                    if isinstance(row, bool) or not isinstance(row, int) or row not in self._rows:
                        raise ValueError(f"row {row!r}: there is no such row, or it was dropped")
                    if row in taken:
                        raise ValueError(f"row {row}: twice in one call")
                    if row in self._in_use:
                        raise ValueError(f"row {row}: in another call at this time")
                    taken.add(row)
                    self._in_use.add(row)
                values = [self._rows[row] for row in rows]
            yield values
        finally:
            with self._lock:
                self._in_use -= taken
