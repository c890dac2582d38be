"""How bytes are shown: as characters where they are printable UTF-8, else as hexadecimal digits."""

import unicodedata

WIDE = 8
TAB, NEWLINE = 9, 10


def glyph_sizes(data: bytes) -> bytearray:
    """For each byte, how many from there on are shown as one character.

    0 where a byte is shown as hexadecimal digits, as are invalid UTF-8 and control characters but
    the tab and the newline, and for all but the first byte of a character. `WIDE` is added for one
    that takes two columns, as digits do.
    """
    sizes = bytearray(len(data))
    known: dict[str, tuple[int, int]] = {"\t": (1, 1), "\n": (1, 1)}
    at = 0
    for character in data.decode(errors="surrogateescape"):
        if character not in known:
            known[character] = _size(character)
        count, sizes[at] = known[character]
        at += count
    return sizes


def _size(character: str) -> tuple[int, int]:
    """How many bytes a character has, and how it is shown."""
    count = len(character.encode(errors="surrogateescape"))
    if not character.isprintable():
        return count, 0
    return count, count + WIDE * (unicodedata.east_asian_width(character) in "WF")
