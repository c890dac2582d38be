"""Sets of characters as bytes: what one element of a regular expression matches."""

import re
import sys
from functools import lru_cache
from typing import Any

import numpy as np

if sys.version_info >= (3, 11):
    from re import _compiler, _constants, _parser  # type: ignore[attr-defined]
else:
    import sre_compile as _compiler
    import sre_constants as _constants
    import sre_parse as _parser

# A step of a small automaton that reads one character: a set of bytes, bit b for byte b, and the
# state that these lead to, or END.
Edge = tuple[int, int]
END = -1

_CODE_POINTS = 0x110000
_SURROGATES = slice(0xD800, 0xE000)  # have no UTF-8
_BLOCK = 64  # characters whose UTF-8 differs in the last byte alone


@lru_cache(maxsize=512)
def character_edges(element: Any, flags: int, is_text: bool) -> list[list[Edge]]:
    """An automaton for the one character that an element of a parsed pattern matches.

    Args:
        element: As ``re``'s parser gives it, lists in it as tuples.
        flags: Of ``re``.
        is_text: Characters are code points, read as UTF-8; otherwise bytes.

    Returns:
        Edges per state; it begins in the first. No two edges of a state have a byte in common.
    """
    if element[0] == _constants.LITERAL and element[1] < 0x80 and not flags & re.IGNORECASE:
        return [[(1 << element[1], END)]]
    member = np.zeros(_CODE_POINTS if is_text else 256, dtype=bool)
    for match in _runs_of(element, flags).finditer(_all_characters(is_text)):
        member[slice(*match.span())] = True
    if not is_text:
        return [_edges(np.where(member, END, 0))]
    member[_SURROGATES] = False
    return _utf8_edges(member)


def _runs_of(element: Any, flags: int) -> re.Pattern[Any]:
    """Matches runs of an element: ``re`` itself knows its categories, its cases and the rest."""
    state = _parser.State()
    state.flags = flags
    one = _parser.SubPattern(state, [element])
    repeat: Any = (_constants.MAX_REPEAT, (1, _constants.MAXREPEAT, one))
    return _compiler.compile(_parser.SubPattern(state, [repeat]), flags)


@lru_cache(maxsize=2)
def _all_characters(is_text: bool) -> str | bytes:
    if not is_text:
        return bytes(range(256))
    return np.arange(_CODE_POINTS, dtype="<u4").tobytes().decode("utf-32-le", "surrogatepass")


def _utf8_edges(member: np.ndarray) -> list[list[Edge]]:
    """The automaton of a set of code points: equal blocks of 64 are one state, from the last byte
    to the first."""
    states: list[list[Edge]] = [[]]
    known: dict[bytes, int] = {bytes(4 * _BLOCK): 0}  # nothing leads to state 0

    def fold(targets: np.ndarray) -> np.ndarray:
        """The states that read one byte more, per block; 0 is none."""
        found, rows = [], targets.astype(np.int32).tobytes()
        for begin in range(0, len(rows), 4 * _BLOCK):
            row = rows[begin : begin + 4 * _BLOCK]
            if row not in known:
                known[row] = len(states)
                states.append(_edges(np.frombuffer(row, dtype=np.int32), first=0x80))
            found.append(known[row])
        return np.array(found)

    last = fold(np.where(member, END, 0))  # one byte to come, per 64 code points
    two = last[: 0x800 // _BLOCK]
    three = np.where(np.arange(0x10000 // _BLOCK) < len(two), 0, last[: 0x10000 // _BLOCK])
    four = np.zeros(8 * _BLOCK, dtype=np.int64)  # two bytes to come, up to lead byte 0xf7
    four[16 : _CODE_POINTS // _BLOCK**2] = fold(last[0x10000 // _BLOCK :])
    lead = np.zeros(256, dtype=np.int64)
    lead[:0x80] = np.where(member[:0x80], END, 0)
    lead[0xC2:0xE0] = two[2:]
    lead[0xE0:0xF0] = fold(three)
    lead[0xF0:0xF8] = fold(four)
    states[0] = _edges(lead)
    return states


def _edges(targets: np.ndarray, first: int = 0) -> list[Edge]:
    """Edges of a state whose bytes from ``first`` on lead to ``targets``; 0 is none."""
    sets: dict[int, int] = {}
    for byte, target in enumerate(targets.tolist(), first):
        if target:
            sets[target] = sets.get(target, 0) | 1 << byte
    return [(of_bytes, target) for target, of_bytes in sets.items()]
