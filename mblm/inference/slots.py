"""Rows by their handles: slots that are used again, and who uses a row at this time."""

from collections.abc import Sequence
from threading import Lock, RLock
from typing import Generic, TypeVar

from mblm.inference.cache import Row

_T = TypeVar("_T")
_SLOT_BITS = 32


class Slots(Generic[_T]):
    """What each row has, by its handle."""

    def __init__(self) -> None:
        self._lock = RLock()
        self._rows: dict[Row, _T] = {}
        self._calls: dict[Row, Lock] = {}  # the last call that each was in
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
                if type(row) is int and row in self._rows:
                    value = self._rows.pop(row)
                    self._calls.pop(row, None)
                    slot = row & ((1 << _SLOT_BITS) - 1)
                    self._generations[slot] += 1
                    self._free.append(slot)
                    dropped.append(value)
        return dropped

    def take(self, rows: Sequence[Row], call: Lock) -> list[_T]:
        """What rows have, for one call at a time: as long as ``call`` is locked.

        A lock is released by no code of Python, in which a signal might come before.
        """
        with self._lock:
            taken: set[Row] = set()
            for row in rows:
                if type(row) is not int or row not in self._rows:
                    raise ValueError(f"row {row!r}: there is no such row, or it was dropped")
                if row in taken:
                    raise ValueError(f"row {row}: twice in one call")
                if row in self._calls and self._calls[row].locked():
                    raise ValueError(f"row {row}: in another call at this time")
                taken.add(row)
            for row in rows:
                self._calls[row] = call
            return [self._rows[row] for row in rows]
