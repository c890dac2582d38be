"""The way to the end of a grammar: which bytes complete what llguidance has read so far.

llguidance knows what may come next, not how far the end is. It is looked for, closing what is open
first; what is found is checked by llguidance itself, and need not be the shortest.
"""

import heapq
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from itertools import compress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# A byte and the matcher after it.
_Step = tuple[int, Any]

# How many of llguidance's tokens are bytes; others, such as the end, come after them.
BYTES = 256

# Bytes that tend to close something come first, those that open something last.
_CLOSING, _OPENING = b"\"'`}])>;,0123456789.:@/=*|&#%$!?_~^-+ \n\t\r", b"<([{\\"
_OTHER = bytes(byte for byte in range(256) if byte not in _CLOSING + _OPENING)
_ORDER = _CLOSING + _OTHER + _OPENING
# How many bytes are tried where many may come: of digits, letters and the rest few stand for all.
_MANY, _FEW = 16, 2
# How many bytes lead to an end that is known.
_BRIDGE = 3
# White space, and after how much of it nothing else is expected.
_WHITE, _MAX_SPACES = b" \n\r\t", 64
_VISIBLE = bytes(byte for byte in _ORDER if byte not in _WHITE)
# The end is looked for so far away, then further.
_REACHES = (32, 128, 512, 2048)


@lru_cache(maxsize=1)
def tokenizer() -> "LLTokenizer":
    """llguidance's own for bytes: it does not survive a Ctrl-C in one that is written in Python."""
    from llguidance import LLTokenizer

    return LLTokenizer("byte", slices=[])


def may_follow(matcher: "LLMatcher", num_tokens: int) -> list[int]:
    """The bytes that may come next, of a vocabulary of so many."""
    return list(compress(range(min(BYTES, num_tokens)), matcher.compute_logit_bias()))


def leads_on(matcher: "LLMatcher", byte: int, num_tokens: int) -> bool:
    """Whether more than white space may follow a byte that may come, or nothing needs to.

    Each is validated: a mask has llguidance look for forced text, and white space may be forced
    without an end.
    """
    tokens, eos = [byte, 0], tokenizer().eos_token
    for _ in range(_MAX_SPACES):
        for tokens[-1] in (*_VISIBLE[:num_tokens], eos):
            if matcher.validate_tokens(tokens) == len(tokens):
                return True
        for tokens[-1] in _WHITE:
            if matcher.validate_tokens(tokens) == len(tokens):
                break
        else:
            return False
        tokens.append(0)
    return False


def completes(matcher: "LLMatcher", *parts: bytes) -> bool:
    """Whether some bytes more make it complete."""
    tokens = [*b"".join(parts), tokenizer().eos_token]
    # One that has found no way on validates anything.
    return not matcher.is_error() and matcher.validate_tokens(tokens) == len(tokens)


def completion(matcher: "LLMatcher", limit: int, num_tokens: int, max_tries: int) -> bytes | None:
    """Bytes that make it complete, at most ``limit``; None if they are not found.

    Args:
        matcher: What was read so far.
        limit: How many there may be.
        num_tokens: V; only its bytes come.
        max_tries: How many bytes are tried at most.
    """
    for reach in _REACHES:
        reach = limit if limit < 2 * reach else reach
        found = _within(matcher, reach, num_tokens, max_tries // len(_REACHES))
        if found is not None or reach == limit:
            return found
    return None


def rejoined(matcher: "LLMatcher", end: bytes, limit: int, num_tokens: int) -> bytes | None:
    """A few bytes that lead to an end that is known, or to what is left of it; arguments and what
    is returned are those of `completion`, which takes longer.

    It closes a string after an escape, and completes a character of several bytes.
    """
    bridge = b""
    for _ in range(_BRIDGE):
        step = next(filter(None, _steps(matcher, num_tokens)), None)
        if step is None:
            return None
        byte, matcher = step
        bridge += bytes([byte])
        for left_out in range(_BRIDGE):
            rest = end[left_out:]
            if len(bridge) + len(rest) <= limit and completes(matcher, rest):
                return bridge + rest
    return None


def _within(matcher: "LLMatcher", limit: int, num_tokens: int, max_tries: int) -> bytes | None:
    """The best guess at each byte first, then strings that differ from it at one, at two, ...:
    limited discrepancy search (Harvey and Ginsberg 1995, IJCAI). What is found is shortened."""
    if matcher.is_accepting():
        return b""
    best = None
    # Strings and how to go on from them, by differences, where the last one is, and the longest.
    paths: list[tuple[int, int, int, int, bytes, Iterator[_Step | None]]] = [
        (0, 0, 0, 0, b"", _steps(matcher, num_tokens))
    ]
    tried = 0
    while paths and tried < max_tries:
        differences, where, _, _, string, steps = heapq.heappop(paths)
        if len(string) >= limit:
            continue
        for step in steps:
            tried += 1
            if step is not None:
                break
        else:
            continue
        byte, reached = step
        order = (differences + 1, len(string), -len(string), 2 * tried)
        heapq.heappush(paths, (*order, string, steps))
        forced = reached.compute_ff_bytes()
        string += bytes([byte]) + forced
        if len(string) > limit or max(forced, default=0) >= num_tokens:
            continue
        reached.consume_tokens(list(forced))
        if reached.is_accepting():
            best, limit = string, len(string) - 1
            max_tries = min(max_tries, 2 * tried + 100)
        else:
            order = (differences, where, -len(string), 2 * tried + 1)
            heapq.heappush(paths, (*order, string, _steps(reached, num_tokens)))
    return best


def _steps(matcher: "LLMatcher", num_tokens: int) -> Iterator[_Step | None]:
    """Bytes that may come next and what they lead to, the best guess first.

    Of what is alike, one byte stands for all after which the same may come, and None comes for the
    others; not of a few letters, which may begin words.
    """
    candidates = _few(may_follow(matcher, num_tokens))
    now = matcher.compute_bitmask()
    seen: set[tuple[bytes, int]] = set()
    loop = None
    for byte in candidates:
        after = matcher.deep_copy()
        if not after.consume_token(byte):
            continue
        mask = after.compute_bitmask()
        is_letter = len(candidates) <= _MANY and chr(byte).isalpha() and byte < 0x80
        kind = (mask, byte if is_letter else 0)
        if mask == now:  # as within a string: it leads to no end
            loop = loop or (byte, after)
            yield None
        elif kind in seen:
            yield None
        else:
            seen.add(kind)
            yield byte, after
    if loop:
        yield loop


def _few(candidates: list[int]) -> list[int]:
    """Some of the bytes, in the order in which they are tried."""
    ordered = sorted(candidates, key=_ORDER.index)
    if len(ordered) <= _MANY:
        return ordered
    count = Counter[str]()
    chosen = []
    for byte in ordered:
        kind = unicodedata.category(chr(byte))[0] if byte < 0x80 else "beyond ASCII"
        count[kind] += 1
        if kind in "PSZ" or count[kind] <= _FEW:  # punctuation, symbols, spaces: all
            chosen.append(byte)
    return chosen
