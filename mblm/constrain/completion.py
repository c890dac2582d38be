"""The way to the end of a grammar: which bytes complete what llguidance has read so far.

llguidance knows what may come next, not how far the end is. It is looked for, closing what is open
first; what is found is checked by llguidance itself, and need not be the shortest.
"""

import heapq
import unicodedata
from collections import Counter
from itertools import compress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLMatcher

# llguidance's own token for the end; those before it are the bytes.
END = 256

# Bytes that tend to close something come first, those that open something last.
_CLOSING, _OPENING = b"\"'`}])>;,0123456789.:@/=*|&#%$!?_~^-+ \n\t\r", b"<([{\\"
_OTHER = bytes(byte for byte in range(256) if byte not in _CLOSING + _OPENING)
_ORDER = _CLOSING + _OTHER + _OPENING
# How many bytes are tried where many may come: of digits, letters and the rest few stand for all.
_MANY, _FEW = 16, 2
# The end is looked for so far away, then further.
_REACHES = (32, 128, 512, 2048)


def may_follow(matcher: "LLMatcher", num_tokens: int) -> list[int]:
    """The bytes that may come next, of a vocabulary of so many."""
    return list(compress(range(min(END, num_tokens)), matcher.compute_logit_bias()))


def completes(matcher: "LLMatcher", *parts: bytes) -> bool:
    """Whether some bytes more make it complete; at least one."""
    tokens = [*b"".join(parts), END]
    return matcher.validate_tokens(tokens) == len(tokens)


def completion(matcher: "LLMatcher", limit: int, num_tokens: int, max_tries: int) -> bytes | None:
    """Bytes that make it complete, at most ``limit``; None if they are not found.

    Args:
        matcher: What was read so far.
        limit: How many there may be.
        num_tokens: V; only its bytes come.
        max_tries: How many bytes are tried at most.
    """
    for reach in _REACHES:
        found = _within(matcher, min(reach, limit), num_tokens, max_tries // len(_REACHES))
        if found is not None or reach >= limit:
            return found
    return None


def _within(matcher: "LLMatcher", limit: int, num_tokens: int, max_tries: int) -> bytes | None:
    """The best guess at each byte first, then strings that differ from it at one, at two, ...:
    limited discrepancy search (Harvey and Ginsberg 1995, IJCAI). What is found is shortened."""
    best = None
    # Differences, where the last one is, and the longest first.
    paths: list[tuple[int, int, int, int, bytes, LLMatcher]] = [
        (0, 0, 0, 0, b"", matcher.deep_copy())
    ]
    tried = 0
    while paths and tried < max_tries:
        differences, turn, _, _, string, reached = heapq.heappop(paths)
        if len(string) > limit:
            continue
        if reached.is_accepting():
            best, limit = string, len(string) - 1
            max_tries = min(max_tries, 2 * tried)
        elif len(string) < limit:
            candidates = _few(may_follow(reached, num_tokens))
            for rank, (byte, after) in enumerate(_choices(reached, candidates)):
                where = len(string) if rank else turn
                order = (differences + rank, where, -len(string), tried + rank)
                heapq.heappush(paths, (*order, string + bytes([byte]), after))
            tried += len(candidates)
    return best


def _choices(matcher: "LLMatcher", candidates: list[int]) -> list[tuple[int, "LLMatcher"]]:
    """The best guess first, and what it leads to.

    Of what is alike, one byte stands for all after which the same may come; not of a few letters,
    which may begin words.
    """
    found: dict[tuple[bytes, int], tuple[int, LLMatcher]] = {}
    now = matcher.compute_bitmask()
    loops: list[tuple[int, LLMatcher]] = []
    for byte in candidates:
        after = matcher.deep_copy()
        if not after.consume_token(byte):
            continue
        mask = after.compute_bitmask()
        if mask == now:  # as within a string: it leads to no end
            loops = loops or [(byte, after)]
        else:
            is_letter = len(candidates) <= _MANY and chr(byte).isalpha() and byte < 0x80
            found.setdefault((mask, byte if is_letter else 0), (byte, after))
    return [*found.values(), *loops]


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
