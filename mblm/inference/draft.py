"""Drafts: bytes that may come next, for a pass over several positions to check.

A draft changes no byte. Where its bytes are those that the plan chooses anyway, they come sooner;
where they are not, the pass took somewhat longer.
"""

from collections.abc import Sequence

# Bytes that are proposed at a time, at most: beyond, a pass of the engine pays for each.
MOST_DRAFTED = 24

_SHORTEST, _LONGEST = 3, 12  # bytes of a match
_LOOKED_AT = 8  # so many of the last places where the shortest match is: late ones count for more
# How often the byte after a match is right, before any was, and how fast that is learned.
_EXPECTED, _RATE = 0.6, 1 / 16


class Proposer:
    """Proposes a row's next bytes: those that came after the longest earlier match of its last.

    The last 12 to 3 bytes are looked for: the longest match that there is, and of equally long ones
    the latest. The bytes after it are followed as long as they are right, whether they are drafted
    or not: so it is known how often they are, for each length of the match. The engine in C++ does
    the same.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        # Of the shortest match: where it ends last, and for each place where it ends before that.
        self._last: dict[tuple[int, ...], int] = {}
        self._before: list[int] = []
        self._at = -1  # the byte after the match; -1 without one
        self._match = 0
        self._right = [_EXPECTED] * (_LONGEST + 1)

    @property
    def known(self) -> int:
        """How many bytes have been noted."""
        return len(self._ids)

    def follow(self, ids: Sequence[int]) -> None:
        """Take note of bytes that have come."""
        if not ids:
            return
        is_right = len(ids) == 1 and self._at >= 0 and self._ids[self._at] == ids[0]
        if len(ids) == 1 and self._at >= 0:
            self._right[self._match] += _RATE * (is_right - self._right[self._match])
        self._at = self._at + 1 if is_right else -1
        self._match = min(self._match + 1, _LONGEST)
        self._ids.extend(ids)
        for end in range(len(self._before) + 1, len(self._ids) + 1):
            last = tuple(self._ids[max(end - _SHORTEST, 0) : end])
            self._before.append(self._last.get(last, -1))
            if len(last) == _SHORTEST:
                self._last[last] = end
        if self._at < 0:
            self._search()

    def propose(self, most: int, price: float) -> list[int]:
        """At most so many of the next bytes.

        Args:
            most: How many, at most `MOST_DRAFTED` of which count.
            price: What a position more in a pass costs, in bytes that are chosen in that time. A
                byte is proposed if it is right, with all before it, with a higher probability.
        """
        proposed: list[int] = []
        expected = 1.0
        while self._at >= 0 and len(proposed) < min(most, MOST_DRAFTED):
            expected *= self._right[min(self._match + len(proposed), _LONGEST)]
            if expected <= price:
                break
            # A match that overlaps the end goes on periodically.
            at = self._at + len(proposed)
            known = len(self._ids)
            proposed.append(self._ids[at] if at < known else proposed[at - known])
        return proposed

    def _search(self) -> None:
        ids, end = self._ids, len(self._ids)
        self._match = 0
        candidate, looked = self._before[end - 1], 0
        while candidate >= 0 and looked < _LOOKED_AT and self._match < _LONGEST:
            length, longest = _SHORTEST, min(_LONGEST, candidate)
            while length < longest and ids[candidate - 1 - length] == ids[end - 1 - length]:
                length += 1
            if length > self._match:
                self._match, self._at = length, candidate
            candidate, looked = self._before[candidate - 1], looked + 1
