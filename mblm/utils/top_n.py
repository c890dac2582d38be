"""Keep the best few of many items."""

import bisect
import copy
import math
from collections.abc import Iterator
from operator import itemgetter
from typing import Generic, SupportsFloat, TypeVar

from mblm.utils.checks import check_integer

T = TypeVar("T")


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
        TypeError: `n` is no integer.
        ValueError: `n` is negative.
    """

    def __init__(self, n: int, *, deep_copy: bool = False, top_largest: bool = False) -> None:
        check_integer("n", n, 0)
        self._capacity = n
        self._deep_copy = deep_copy
        self._top_largest = top_largest
        self._kept: list[tuple[float, float, T]] = []  # rank, value and item, the best first

    def add(self, item: tuple[SupportsFloat, T]) -> None:
        """Offer a pair of a value and an item; it is kept if it is among the best."""
        value, data = float(item[0]), item[1]
        rank = -value if self._top_largest else value  # lower is better
        if math.isnan(rank):
            rank = math.inf
        if len(self) >= self._capacity and not (self._kept and rank < self._kept[-1][0]):
            return
        data = copy.deepcopy(data) if self._deep_copy else data
        bisect.insort(self._kept, (rank, value, data), key=itemgetter(0))
        del self._kept[self._capacity :]

    def get_top(self, best: int | None = None) -> list[tuple[float, T]]:
        """Return the `best` best pairs of value and item, best first; all of them by default."""
        return [(value, item) for _, value, item in self._kept[: best or None]]

    def __iter__(self) -> Iterator[tuple[float, T]]:
        return iter(self.get_top())

    def __len__(self) -> int:
        return len(self._kept)
