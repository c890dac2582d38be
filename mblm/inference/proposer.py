"""What may come next in a row: what came after an earlier match of its last bytes."""

from itertools import takewhile

import torch
from torch import Tensor

_SHORTEST, _LONGEST = 3, 12  # bytes of a match
_LOOKED_AT = 8  # so many of the last places where the shortest match is: late ones count for more
# How often the byte after a match is right, before any was, and how fast that is learned.
_EXPECTED, _RATE = 0.6, 1 / 16


class Proposer:
    """Proposes what came after the longest match of the last 12 to 3 bytes; after the latest of
    equally long ones.

    It is followed as long as it is right, whether it is drafted or not: so it is known how often it
    is, for each length of the match. csrc/decode/proposer.h does the same.
    """

    def __init__(self) -> None:
        self.known = 0  # bytes that it has taken note of
        self._at = -1  # the byte after the match; -1 without one
        self._match = 0
        self._right = [_EXPECTED] * (_LONGEST + 1)

    def follow(self, ids: Tensor) -> None:
        """Take note of a row's bytes ``(n,)``: those that it knows, and others after them."""
        come, self.known = len(ids) - self.known, len(ids)
        if come and not (come == 1 and self._at >= 0 and self._is_right(ids)):
            self._search(ids)

    def propose(self, ids: Tensor, most: int, price: float) -> Tensor:
        """At most so many bytes ``(n,)`` that may come after those it knows.

        Each is right, with all before it, with a probability above ``price``.
        """
        count, expected = 0, 1.0
        while self._at >= 0 and count < most:
            expected *= self._right[min(self._match + count, _LONGEST)]
            if expected <= price:
                break
            count += 1
        # A match that overlaps the end goes on periodically.
        return ids[self._at + torch.arange(count, device="cpu") % (len(ids) - self._at)]

    def _is_right(self, ids: Tensor) -> bool:
        """Go on with the match if the last byte is the one after it."""
        is_right = bool(ids[self._at] == ids[-1])
        self._right[self._match] += _RATE * (is_right - self._right[self._match])
        self._at += 1
        self._match = min(self._match + 1, _LONGEST)
        return is_right

    def _search(self, ids: Tensor) -> None:
        self._at, self._match = -1, 0
        if len(ids) <= _SHORTEST:
            return
        parts = ids.unfold(0, _SHORTEST, 1)
        places = (parts[:-1] == parts[-1]).all(1).nonzero()[-_LOOKED_AT:, 0] + _SHORTEST
        last = ids[-_LONGEST:].tolist()
        for at in reversed(places.tolist()):
            before = ids[max(at - _LONGEST, 0) : at].tolist()
            pairs = zip(reversed(before), reversed(last), strict=False)
            length = len([*takewhile(lambda pair: pair[0] == pair[1], pairs)])
            if length > self._match:
                self._at, self._match = at, length
