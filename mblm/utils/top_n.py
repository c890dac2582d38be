"""Keep the best few of many items."""

import copy
import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, SupportsFloat, TypeVar

T = TypeVar("T")


@dataclass(order=True)
class _Entry(Generic[T]):
    rank: float  # higher is better
    value: float = field(compare=False)
    item: T = field(compare=False)


class TopN(Generic[T]):
    """Keeps the `n` items with the smallest values and iterates over them, best first.

        best = TopN[str](2)
        for value, item in ((1, "a"), (3, "b"), (2, "c")):
            best.add((value, item))
        list(best)  # [(1.0, "a"), (2.0, "c")]

    An item that is no better than the worst of `n` kept ones is not added. NaN is worse than any
    other value.

    Args:
        n: Items to keep; with 0 nothing is kept.
        deep_copy: Keep copies, so that later changes to an item do not reach what is kept.
        top_largest: Keep the items with the largest values instead.

    Raises:
        ValueError: `n` is negative.
    """

    def __init__(self, n: int, *, deep_copy: bool = False, top_largest: bool = False) -> None:
        if n < 0:
            raise ValueError(f"n must be at least 0, got {n}")
        self._capacity = n
        self._deep_copy = deep_copy
        self._top_largest = top_largest
        self._heap: list[_Entry[T]] = []  # the worst of those kept is at the root

    def add(self, item: tuple[SupportsFloat, T]) -> None:
        """Offer a pair of a value and an item; it is kept if it is among the best."""
        value, data = float(item[0]), item[1]
        rank = value if self._top_largest else -value
        if math.isnan(rank):
            rank = -math.inf
        is_full = len(self._heap) >= self._capacity
        if self._capacity == 0 or (is_full and rank <= self._heap[0].rank):
            return
        entry = _Entry(rank, value, copy.deepcopy(data) if self._deep_copy else data)
        if is_full:
            heapq.heapreplace(self._heap, entry)
        else:
            heapq.heappush(self._heap, entry)

    def get_top(self, best: int | None = None) -> list[tuple[float, T]]:
        """Return the `best` best pairs of value and item, best first; all of them by default."""
        ranked = sorted(self._heap, key=lambda entry: -entry.rank)
        return [(entry.value, entry.item) for entry in ranked[: best or self._capacity]]

    def __iter__(self) -> Iterator[tuple[float, T]]:
        return iter(self.get_top())

    def __len__(self) -> int:
        return len(self._heap)
