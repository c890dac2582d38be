"""What is proposed after a row's bytes, and that both languages propose the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mblm.inference.proposer import Proposer
from mblm.ops import _native
from tests.native import needs_native


def proposed(parts: list[list[int]], most: int, price: float) -> list[int]:
    """What is proposed after bytes that come in pieces."""
    proposer, ids = Proposer(), torch.empty(0, dtype=torch.long)
    for part in parts:
        ids = torch.cat((ids, ids.new_tensor(part)))
        proposer.follow(ids)
    return proposer.propose(ids, most, price).tolist()


def after(text: str, most: int = 6, price: float = 0.0) -> str:
    return "".join(map(chr, proposed([[ord(letter)] for letter in text], most, price)))


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("", ""),
        ("ab", ""),
        ("abcdefg", ""),
        ("abcdefghi, abc", "defghi"),
        ("zabc1 yabc2zabc3 xabc", "3 xabc"),
        ("zabc12345 yabc67890 zabc", "12345 "),
        ("a longer match, long", "er mat"),
        ("ababab", "ababab"),
        ("-----", "------"),
    ],
    ids=[
        *["nothing", "too little", "no match", "a match", "the latest", "the longest"],
        *["four bytes", "periodically", "one byte again"],
    ],
)
def test_what_came_after_a_match(text: str, want: str) -> None:
    assert after(text) == want


def test_little_where_it_is_seldom_right() -> None:
    wrong = "".join(f"the {chr(65 + n)}" for n in range(40)) + "the "
    assert after(wrong) != "" and after(wrong, price=0.3) == ""
    assert after(wrong + "same the " * 40, price=0.3) == "same t"


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.lists(st.integers(0, 3), max_size=40), max_size=30),
    price=st.sampled_from([0.0, 0.2, 0.6]),
)
def test_is_the_same_in_both_languages(parts: list[list[int]], price: float) -> None:
    pieces: list[list[int]] = []  # some whole, some byte by byte
    for part in parts:
        pieces += [part] if len(part) % 2 else [[token] for token in part]
    assert proposed(pieces, 9, price) == _native.library().proposed(pieces, 9, price)
