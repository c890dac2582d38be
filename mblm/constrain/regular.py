"""Constraints that are finite automata: the engine follows them in compiled code."""

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from mblm.constrain.dfa import determinize, intersection
from mblm.constrain.nfa import Nfa
from mblm.inference.automaton import Automaton
from mblm.utils.checks import check_integer


class Regular:
    """A set of byte strings that a finite automaton reads; immutable.

    ``a & b`` is what both allow.
    """

    def compile(self, num_tokens: int) -> Automaton:
        """The automaton for a model of so many tokens; ids from 256 on are forbidden.

        Raises:
            ValueError: Nothing satisfies it, or only the empty string does, or it is too large.
        """
        raise NotImplementedError

    def __and__(self, other: "Regular") -> "Regular":
        return _Both(self, other) if isinstance(other, Regular) else NotImplemented


class Regex(Regular):
    """All that a regular expression matches as a whole, as ``re.fullmatch`` does.

    Args:
        pattern: A pattern of bytes, which matches bytes, or of str, which matches the UTF-8 of what
            it matches in text; or a compiled one, with its flags. ``.`` is any byte (character) but
            a newline, unless the flag ``s`` is set. ``^ $ \\A \\Z`` may stand where it begins and
            ends, and change nothing there.

    Raises:
        TypeError: Another type.
        ValueError: It is no regular expression, or has lookaround, backreferences, conditional or
            atomic groups, possessive quantifiers or word boundaries, which are not supported.
    """

    def __init__(self, pattern: str | bytes | re.Pattern[Any]) -> None:
        if not isinstance(pattern, (str, bytes, re.Pattern)):
            raise TypeError(f"pattern: expected str, bytes or re.Pattern, got {pattern!r}")
        try:
            self.pattern = re.compile(pattern)
            _nfa(self.pattern)
            self._shown = repr(self.pattern.pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"pattern: no regular expression: {error}") from error

    def compile(self, num_tokens: int) -> Automaton:
        return _automaton(self.pattern, check_integer("num_tokens", num_tokens))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._shown})"


class Utf8(Regex):
    """Any text: valid UTF-8, without surrogates, ending where a character ends."""

    def __init__(self) -> None:
        super().__init__("(?s:.*)")
        self._shown = ""


class Prefix(Regex):
    """Whatever begins with a prefix.

    Args:
        prefix: The first bytes.

    Raises:
        TypeError: Another type.
    """

    def __init__(self, prefix: bytes) -> None:
        if not isinstance(prefix, bytes):
            raise TypeError(f"prefix: expected bytes, got {prefix!r}")
        super().__init__(re.escape(prefix) + rb"(?s:.*)")
        self._shown = repr(prefix)


class AllowedBytes(Regex):
    """Any string of some bytes.

    Args:
        allowed: The bytes, as ``bytes`` or integers in [0, 256).

    Raises:
        TypeError, ValueError: Something else, or none at all.
    """

    def __init__(self, allowed: bytes | Iterable[int]) -> None:
        if isinstance(allowed, str) or not isinstance(allowed, Iterable):
            raise TypeError(f"allowed: expected bytes or integers, got {allowed!r}")
        values = [check_integer("allowed", value) for value in allowed]
        if not values or not all(0 <= value < 256 for value in values):
            raise ValueError(f"allowed: expected integers in [0, 256), got {values}")
        super().__init__(b"[" + b"".join(b"\\x%02x" % value for value in values) + b"]*")
        self._shown = repr(bytes(sorted(set(values))))


class _Both(Regular):
    def __init__(self, a: Regular, b: Regular) -> None:
        self._a, self._b = a, b

    def compile(self, num_tokens: int) -> Automaton:
        return _both(self._a, self._b, check_integer("num_tokens", num_tokens))

    def __repr__(self) -> str:
        return f"{self._a!r} & {self._b!r}"


@lru_cache(maxsize=16)
def _nfa(pattern: re.Pattern[Any]) -> Nfa:
    return Nfa(pattern)


@lru_cache(maxsize=64)
def _automaton(pattern: re.Pattern[Any], num_tokens: int) -> Automaton:
    return _satisfiable(determinize(_nfa(pattern), num_tokens), f"{pattern.pattern!r}")


@lru_cache(maxsize=64)
def _both(a: Regular, b: Regular, num_tokens: int) -> Automaton:
    automaton = intersection(a.compile(num_tokens), b.compile(num_tokens))
    return _satisfiable(automaton, f"{a!r} & {b!r}")


def _satisfiable(automaton: Automaton, what: object) -> Automaton:
    if automaton.distance[automaton.start] < 0:
        raise ValueError(f"nothing satisfies {what}")
    if automaton.is_complete(automaton.start):
        raise ValueError(f"only the empty string satisfies {what}")
    return automaton
