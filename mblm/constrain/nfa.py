"""Regular expressions as nondeterministic automata over bytes (Thompson 1968, CACM 11 (6)).

Python's own parser reads them, so that they mean what they mean to ``re.fullmatch``.
"""

import re
from collections.abc import Sequence
from typing import Any

from mblm.constrain.characters import END, Edge, _constants, _parser, character_edges

MAX_STATES = 100_000

_ALPHABETS = re.ASCII | re.LOCALE | re.UNICODE
_CHARACTERS = {"LITERAL", "NOT_LITERAL", "IN", "ANY"}
_REPEATS = {"MAX_REPEAT", "MIN_REPEAT"}
_BEGINS = {"AT_BEGINNING", "AT_BEGINNING_STRING"}
_ENDS = {"AT_END", "AT_END_STRING"}
_NOT_REGULAR = {
    "ASSERT": "a lookahead or lookbehind",
    "ASSERT_NOT": "a negative lookahead or lookbehind",
    "FAILURE": "a negative lookahead or lookbehind",  # what (?!) is parsed as
    "GROUPREF": "a backreference",
    "GROUPREF_EXISTS": "a conditional group",
    "ATOMIC_GROUP": "an atomic group",
    "POSSESSIVE_REPEAT": "a possessive quantifier",
    "AT_BOUNDARY": r"a word boundary (\b)",
    "AT_NON_BOUNDARY": r"a word boundary (\B)",
}


class Nfa:
    """A nondeterministic automaton over bytes that begins in state 0.

    Args:
        pattern: A compiled pattern; one of str reads the UTF-8 of what it matches.

    Attributes:
        edges: Per state, sets of bytes (bit b for byte b) and the states that these lead to.
        free: Per state, the states that are reached without a byte.
        end: The state that accepts.
    """

    def __init__(self, pattern: re.Pattern[Any]) -> None:
        self.edges: list[list[Edge]] = []
        self.free: list[list[int]] = []
        self._is_text = isinstance(pattern.pattern, str)
        flags = pattern.flags & ~re.DEBUG  # which prints
        parsed: Any = _parser.parse(pattern.pattern, flags)
        self.end = self._sequence(parsed, flags, self._state(), True, True)

    def _state(self) -> int:
        if len(self.edges) >= MAX_STATES:
            raise ValueError(f"pattern: it needs more than {MAX_STATES} states; repeat less often")
        self.edges.append([])
        self.free.append([])
        return len(self.edges) - 1

    def _sequence(
        self, items: Sequence[Any], flags: int, state: int, is_first: bool, is_last: bool
    ) -> int:
        """Read items one after the other from a state on; returns the state after them.

        ``is_first``, ``is_last``: nothing comes before, after them in the whole pattern.
        """
        wide = [index for index, (op, _) in enumerate(items) if str(op) != "AT"]
        for index, (op, value) in enumerate(items):
            first = is_first and index <= min(wide[:1], default=index)
            last = is_last and index >= max(wide[-1:], default=index)
            state = self._item(str(op), value, flags, state, first, last)
        return state

    def _item(
        self, op: str, value: Any, flags: int, begin: int, is_first: bool, is_last: bool
    ) -> int:
        if op in _CHARACTERS:
            return self._character((getattr(_constants, op), value), flags, begin)
        if op == "SUBPATTERN":
            _, added, removed, items = value
            if added & _ALPHABETS:  # of which one holds
                flags &= ~_ALPHABETS
            return self._sequence(items, (flags | added) & ~removed, begin, is_first, is_last)
        if op == "BRANCH":
            ends = [
                self._sequence(items, flags, self._after(begin), is_first, is_last)
                for items in value[1]
            ]
            return self._after(*ends)
        if op in _REPEATS:
            return self._repeat(value, flags, begin)
        if op == "AT":
            op = str(value)
            if (is_first and op in _BEGINS) or (is_last and op in _ENDS):
                return begin
            if op in _BEGINS | _ENDS:
                raise ValueError("pattern: expected ^ $ \\A \\Z only where it begins and ends")
        raise ValueError(f"pattern: {_NOT_REGULAR.get(op, op)} is not supported")

    def _after(self, *states: int) -> int:
        """A new state that follows others without a byte."""
        new = self._state()
        for state in states:
            self.free[state].append(new)
        return new

    def _character(self, element: Any, flags: int, begin: int) -> int:
        edges = character_edges(_hashable(element), flags, self._is_text)
        states = {0: begin, END: self._state()}
        states.update((index, self._state()) for index in range(1, len(edges)))
        for index, of_state in enumerate(edges):
            self.edges[states[index]] += [(of_bytes, states[to]) for of_bytes, to in of_state]
        return states[END]

    def _repeat(self, value: tuple[int, int, Sequence[Any]], flags: int, begin: int) -> int:
        least, most, items = value
        state = begin
        for _ in range(least):
            before = state
            state = self._sequence(items, flags, before, False, False)
            if state == before:  # it reads nothing
                return state
        if most == _constants.MAXREPEAT:
            loop = self._after(state)
            self.free[self._sequence(items, flags, loop, False, False)].append(loop)
            return self._after(loop)
        ends = [state]
        for _ in range(most - least):
            begin = self._after(state)
            state = self._sequence(items, flags, begin, False, False)
            if state == begin:
                break
            ends.append(state)
        return self._after(*ends)


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value
