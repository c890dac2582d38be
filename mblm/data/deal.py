"""Deal documents out to the parts of a dataset, so that each has its share of the bytes."""

from collections.abc import Mapping
from typing import Any


class Dealer:
    """Gives each document to the part that lacks most bytes of its share so far.

    Args:
        shares: The parts and their shares, which sum to 1.
    """

    def __init__(self, shares: Mapping[Any, float]) -> None:
        self._shares = dict(shares)
        self._lacking = dict.fromkeys(shares, 0.0)

    def deal(self, size: int) -> Any:
        """The part that the next document goes to, of so many bytes."""
        for part, share in self._shares.items():
            self._lacking[part] += share * size
        part = max(self._lacking, key=self._lacking.__getitem__)
        self._lacking[part] -= size
        return part
