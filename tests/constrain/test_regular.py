"""Constraints that are automata but are not written as a pattern, and what two have in common."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mblm.constrain import AllowedBytes, Prefix, Regex, Utf8
from tests.constrain.test_regex import reads


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(max_size=6), st.text(max_size=3).map(str.encode)))
def test_utf8_reads_what_python_decodes(data: bytes) -> None:
    try:
        data.decode()
        is_text = True
    except UnicodeDecodeError:
        is_text = False
    assert reads(Utf8().compile(257), data) == is_text


def test_utf8_ends_where_a_character_ends() -> None:
    automaton = Utf8().compile(257)
    state = automaton.step(automaton.start, 0xF0)
    assert automaton.distance[state] == 3
    allowed = automaton.allowed(automaton.start, 2).nonzero()[:, 0].tolist()
    assert allowed == [*range(0x80), *range(0xC2, 0xE0)], "no character of more bytes than left"


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=6), st.binary(max_size=8))
def test_a_prefix_comes_first(prefix: bytes, data: bytes) -> None:
    automaton = Prefix(prefix).compile(256)
    assert reads(automaton, data) == data.startswith(prefix)
    assert reads(automaton, prefix + data)


def test_a_prefix_may_be_as_long_as_a_file() -> None:
    data = b"no" * 25_000
    automaton = Prefix(data).compile(257)
    assert automaton.distance[automaton.start] == len(data)
    with pytest.raises(ValueError, match="more than 100000 states"):
        Prefix(data * 3)


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=1, max_size=5), st.binary(max_size=6))
def test_only_allowed_bytes_come(allowed: bytes, data: bytes) -> None:
    want = set(data) <= set(allowed)
    assert reads(AllowedBytes(allowed).compile(256), data) == want
    assert reads(AllowedBytes(set(allowed)).compile(256), data) == want


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([rb"[ab]*", rb"(aa)*b?", rb".*b", rb"\xc3.|a*", rb"(a|\xc3[\xa9\x00])*"]),
    st.sampled_from([Utf8(), Prefix(b"a"), AllowedBytes(b"ab\xc3"), Regex(rb"..?.?")]),
    st.text("ab\xc3\xa9\x00", max_size=4).map(lambda text: text.encode("latin-1")),
)
def test_what_two_have_in_common(pattern: bytes, other: Any, data: bytes) -> None:
    one = Regex(pattern)
    want = reads(one.compile(256), data) and reads(other.compile(256), data)
    assert reads((one & other).compile(256), data) == want
    assert reads((other & one).compile(256), data) == want


def test_of_three_in_common() -> None:
    automaton = (Utf8() & Regex(rb"(?s:.){3,5}") & AllowedBytes(b"\xc3\xa9")).compile(257)
    assert reads(automaton, "éé".encode()) and not reads(automaton, "é".encode())
    assert automaton.distance[automaton.start] == 4


def test_compiling_twice_gives_one_automaton() -> None:
    assert Regex(rb"ab*").compile(257) is Regex(rb"ab*").compile(257)
    assert Regex(rb"ab*").compile(256) is not Regex(rb"ab*").compile(257)
    both = Utf8() & Regex(rb"ab*")
    assert both.compile(257) is both.compile(257)


def test_nothing_in_common_is_refused() -> None:
    with pytest.raises(ValueError, match=r"nothing satisfies Regex\(b'a'\) & Regex\(b'b'\)"):
        (Regex(rb"a") & Regex(rb"b")).compile(257)
    with pytest.raises(ValueError, match="only the empty string satisfies"):
        (Regex(rb"a*") & Regex(rb"b*")).compile(257)
    with pytest.raises(TypeError, match="unsupported operand"):
        Regex(rb"a") & b"a"  # type: ignore[operator]


@pytest.mark.parametrize("num_tokens", [3, 256, 300])
def test_no_id_that_is_no_byte_is_allowed(num_tokens: int) -> None:
    for constraint in [Utf8(), Prefix(b""), AllowedBytes([0, 1]), Utf8() & Prefix(b"\x01")]:
        automaton = constraint.compile(num_tokens)
        assert len(automaton.classes) == num_tokens
        assert not automaton.allowed(automaton.start, 9)[256:].any()


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: AllowedBytes(b""), ValueError, r"allowed: expected .* in \[0, 256\), got \[\]"),
        (lambda: AllowedBytes([256]), ValueError, r"allowed: .* got \[256\]"),
        (lambda: AllowedBytes([-1]), ValueError, "allowed"),
        (lambda: AllowedBytes("ab"), TypeError, "allowed: expected bytes or integers, got 'ab'"),
        (lambda: AllowedBytes(["a"]), TypeError, "allowed: expected an integer"),
        (lambda: AllowedBytes(3), TypeError, "allowed"),
        (lambda: Prefix("a"), TypeError, "prefix: expected bytes, got 'a'"),
        (lambda: Utf8().compile("a"), TypeError, "num_tokens: expected an integer"),
    ],
)
def test_refuses_by_name(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_a_prefix_of_every_byte() -> None:
    every = bytes(range(256))
    automaton = Prefix(every).compile(256)
    assert reads(automaton, every) and not reads(automaton, every[:-1])
    assert torch.equal(automaton.classes.unique(), automaton.classes.sort().values)


def test_constraints_show_what_they_are() -> None:
    shown = repr(Utf8() & Prefix(b"a") & AllowedBytes(b"ba") & Regex("a+"))
    assert shown == "Utf8() & Prefix(b'a') & AllowedBytes(b'ab') & Regex('a+')"
