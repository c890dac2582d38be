"""Constraints by llguidance: JSON schemas and context-free grammars, byte by byte.

llguidance says which bytes may come next. How far a grammar's end is, it does not know: guides look
for a way to it while the bytes that are left may be too few for another.
"""

import json
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mblm.constrain.completion import (
    BYTES,
    completes,
    completion,
    leads_on,
    may_follow,
    rejoined,
    tokenizer,
)
from mblm.constrain.endless import grammar_ends, schema_ends
from mblm.inference.guide import Guide
from mblm.utils.checks import check_integer
from mblm.utils.naming import naming

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from llguidance._lib import JsonCompileOptions

# With so many bytes more than the end needs, one byte hardly ever takes it out of reach. But after
# `patternProperties` whose names are all among `properties`, a comma may come that nothing follows,
# or what is said to be in its place, for which an end is looked for at each byte.
_MARGIN = 512
_COMMA = ord(",")
# With so few bytes more than an end needs, it is validated though it is known.
_TIGHT = 64
# Where these bytes may come and those complete it: per byte what completes it after that, or with
# how many bytes left none was found.
_Ways = dict[tuple[bytes, bytes], dict[int, bytes | int]]
_MAX_WAYS = 1000
# How many bytes to try for an end: before anything runs, now and then, and for each byte near it.
_FIRST_TRIES, _TRIES, _TRIES_EACH = 20_000, 4000, 500
# For so many bytes one is looked for at a time; others without do not come, and wait for the next.
_SEARCHES = 10


class _Guided:
    """A grammar in llguidance's own form, made of an argument; ``ends`` is asked in doubt."""

    def __init__(self, argument: str, grammar: str, ends: Callable[[], bool]) -> None:
        self._grammar = grammar
        with naming(argument):
            _, end = _start(grammar, 256)
            if end is None and not ends():
                raise ValueError("nothing satisfies it: what it describes has no end")

    def compile(self, num_tokens: int) -> Callable[[], Guide]:
        """What makes a row's guide, for a model of so many tokens; ids from 256 on are forbidden.

        Raises:
            ValueError: No byte may begin what satisfies it.
        """
        matcher, end = _start(self._grammar, check_integer("num_tokens", num_tokens))
        has_patterns = "patternProperties" in self._grammar
        margin = sys.maxsize if has_patterns and "item_separator" in self._grammar else _MARGIN
        return lambda: _RowGuide(matcher.deep_copy(), end, num_tokens, has_patterns, margin)


class JsonSchema(_Guided):
    """JSON texts that a schema describes, in UTF-8; nothing comes before or after.

    Args:
        schema: A JSON schema as a dict, or as a JSON text.
        max_spaces: How many white-space characters may come in a row outside strings. Default 1,
            so that a weak model does not go on with spaces.

    Raises:
        ImportError: llguidance is not installed: ``pip install "mblm[constrain]"``.
        TypeError, ValueError: It is no schema, nothing satisfies it, or it has something that
            llguidance does not support, which it names.
    """

    def __init__(self, schema: Mapping[str, Any] | bool | str, max_spaces: int = 1) -> None:
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"schema: no JSON: {error}") from error
        if isinstance(schema, bool):
            schema = {} if schema else {"enum": []}
        if not isinstance(schema, Mapping):
            raise TypeError(f"schema: expected a dict or a JSON text, got {schema!r}")
        max_spaces = check_integer("max_spaces", max_spaces, 0)
        try:
            text = json.dumps(dict(schema), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"schema: no JSON: {error}") from error
        options: JsonCompileOptions = {"whitespace_flexible": max_spaces > 0}
        if max_spaces:
            options["whitespace_pattern"] = rf"[ \t\r\n]{{0,{max_spaces}}}"
        try:
            grammar = _matcher().grammar_from_json_schema(text, overrides=options)
        except ValueError as error:
            raise ValueError(f"schema: {error}") from error
        super().__init__("schema", grammar, partial(schema_ends, schema))


class Grammar(_Guided):
    """Texts that a context-free grammar describes, in UTF-8.

    Args:
        lark: The grammar in llguidance's variant of Lark's syntax; it begins with ``start``.

    Raises:
        ImportError: llguidance is not installed: ``pip install "mblm[constrain]"``.
        TypeError, ValueError: It is no such grammar.
    """

    def __init__(self, lark: str) -> None:
        if not isinstance(lark, str):
            raise TypeError(f"lark: expected str, got {lark!r}")
        super().__init__("lark", _matcher().grammar_from_lark(lark), partial(grammar_ends, lark))


class _RowGuide:
    """How far one row has come; see `mblm.inference.guide.Guide`.

    Args:
        matcher: At the row's beginning; its own.
        end: Bytes that complete it; None if not found.
        num_tokens: V.
        has_patterns: A comma may come that nothing follows.
        margin: With so many bytes more than the end needs, any that may come leaves it in reach.
    """

    def __init__(
        self,
        matcher: "LLMatcher",
        end: bytes | None,
        num_tokens: int,
        has_patterns: bool,
        margin: int,
    ) -> None:
        self._matcher, self._end, self._num_tokens = matcher, end, num_tokens
        self._has_patterns, self._margin = has_patterns, margin
        self._look_at = sys.maxsize  # with so many bytes left or fewer
        # What completes it after each token that may come, since the end is near.
        self._end_by_token: dict[int, bytes] = {}
        self._ways: _Ways = {}  # the row's own, so that other rows do not decide what may come

    def allowed(self, left: int) -> Tensor:
        tokens = self._may_follow()
        if left <= self._look_at:
            tokens = self._that_can_end(tokens, left)
        marks = bytearray(self._num_tokens)
        for token in tokens:
            marks[token] = True
        return torch.frombuffer(marks, dtype=torch.bool)

    def take(self, token: int) -> None:
        if token >= BYTES or not self._matcher.consume_token(token):
            raise ValueError(f"constraint: {_first_line(self._matcher) or f'no byte: {token}'}")
        if token in self._end_by_token:
            self._end = self._end_by_token[token]
        elif self._end is not None and self._end[:1] == bytes([token]):
            self._end = self._end[1:]
        self._end_by_token = {}

    def is_complete(self) -> bool:
        return self.accepts() and not self._may_follow()

    def accepts(self) -> bool:
        return bool(self._matcher.is_accepting())

    def _may_follow(self) -> list[int]:
        tokens = may_follow(self._matcher, self._num_tokens)
        if self._matcher.is_error():  # after which it allows nothing, and accepts nothing
            raise ValueError(f"constraint: {_first_line(self._matcher)}")
        is_doubtful = self._has_patterns and _COMMA in tokens
        if is_doubtful and not leads_on(self._matcher, _COMMA, self._num_tokens):
            tokens.remove(_COMMA)
        return tokens

    def _that_can_end(self, tokens: list[int], left: int) -> list[int]:
        """Those after which an end is within reach, if that may be in doubt."""
        if self._end is None or len(self._end) > left or not completes(self._matcher, self._end):
            self._end = completion(self._matcher, left, self._num_tokens, _TRIES)
        if self._end is None:
            self._look_at = left // 2
            return tokens
        spare = left - len(self._end) - self._margin
        if spare > 0 and self._num_tokens >= BYTES:
            # An end is a byte nearer with each byte, and may go as far away.
            self._look_at = left - spare // 2 - 1
            return tokens
        if len(self._ways) > _MAX_WAYS:
            self._ways.clear()
        ends = self._ways.setdefault((self._matcher.compute_bitmask(), self._end), {})
        found: dict[bytes, bytes | None] = {}
        for token in tokens:
            end = ends.get(token, 0)
            # Elsewhere the same may come, and another end. With room, that shows before it is late.
            if isinstance(end, bytes) and left - len(end) <= _TIGHT:
                end = end if completes(self._matcher, bytes([token]), end) else 0
            if len(end) >= left if isinstance(end, bytes) else end < left:
                new = self._end_after(token, left - 1, found)
                end = left if new is None else new
                if new is not None or len(found) < _SEARCHES:
                    ends[token] = end
            if isinstance(end, bytes):
                self._end_by_token[token] = end
        return list(self._end_by_token)

    def _end_after(self, token: int, limit: int, found: dict[bytes, bytes | None]) -> bytes | None:
        """Bytes that complete it after a token, at most ``limit``; None if they are not found.

        ``found`` is what was found after others, by what may come after them.
        """
        assert self._end is not None
        byte = bytes([token])
        for end in (self._end[1:], self._end, *found.values()):
            if end is not None and len(end) <= limit and completes(self._matcher, byte, end):
                return end
        after = self._matcher.deep_copy()
        if len(found) == _SEARCHES or not after.consume_token(token):
            return None
        mask = after.compute_bitmask()
        if mask in found:
            return None
        new = rejoined(after, self._end, limit, self._num_tokens)
        found[mask] = new or completion(after, limit, self._num_tokens, _TRIES_EACH)
        return found[mask]


def _matcher() -> "type[LLMatcher]":
    try:
        from llguidance import LLMatcher
    except ImportError as error:
        raise ImportError(
            'this constraint needs llguidance: pip install "mblm[constrain]"'
        ) from error
    return LLMatcher


@lru_cache(maxsize=64)
def _start(grammar: str, num_tokens: int) -> "tuple[LLMatcher, bytes | None]":
    """A matcher at a grammar's beginning, and bytes that complete it if they are found."""
    matcher_type = _matcher()
    matcher = matcher_type(tokenizer(), grammar, log_level=0)
    if matcher.is_error():
        raise ValueError(_first_line(matcher))
    if not may_follow(matcher, num_tokens):
        if matcher.is_accepting():
            raise ValueError("only the empty string satisfies it")
        raise ValueError("nothing satisfies it")
    end = completion(matcher, sys.maxsize, num_tokens, _FIRST_TRIES)
    if end is None:  # maybe since llguidance itself comes to no end
        trials = [matcher.deep_copy() for _ in may_follow(matcher, num_tokens)]
        if not any(map(matcher_type.consume_token, trials, may_follow(matcher, num_tokens))):
            raise ValueError(_first_line(trials[0]))
    return matcher, end


def _first_line(matcher: "LLMatcher") -> str:
    return matcher.get_error().partition("\n<state>")[0].strip()
