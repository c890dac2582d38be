"""Regular expressions over bytes: they read what ``re.fullmatch`` matches, and nothing else."""

import re
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mblm.constrain import Regex
from mblm.inference.automaton import Automaton


def reads(automaton: Automaton, data: bytes) -> bool:
    state = automaton.start
    for byte in data:
        state = automaton.step(state, byte)
    return automaton.accepts(state)


def matches(pattern: str | bytes, data: bytes) -> bool:
    """What has to come out."""
    if isinstance(pattern, bytes):
        return re.fullmatch(pattern, data) is not None
    try:
        return re.fullmatch(pattern, data.decode()) is not None
    except UnicodeDecodeError:
        return False


def grown(atoms: list[str], counts: list[str]) -> st.SearchStrategy[str]:
    """Patterns of atoms, repeated, in sequences, in groups, side by side."""

    def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        return st.one_of(
            st.lists(inner, max_size=3).map("".join),
            st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
            st.tuples(inner, st.sampled_from(counts)).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
            inner.map(lambda part: f"(?i:{part})"),
            inner.map(lambda part: f"(?s:{part})"),
        )

    return st.recursive(st.sampled_from(atoms), larger, max_leaves=6)


COUNTS = ["*", "+", "?", "*?", "+?", "??", "{2}", "{0,2}", "{1,3}?", "{,2}", "{2,}", "{0}"]
ATOMS = ["a", "b", "K", ".", r"\d", r"\W", r"\s", "[ab]", "[^a]", "[a-k_]", r"[^\w]", r"\n", ""]
BYTES = [*ATOMS, r"\xff", r"[\x80-\xff]", r"[^\x00-\x7f]", r"\x00"]
LETTERS = ["é", "\u017f", "\U0001f600", r"\u20ac"]
TEXT = [*ATOMS, *LETTERS, "[à-ÿ]", "[^é]", "[\u0800-\uffff]", r"(?a:\w)"]


@settings(max_examples=75, deadline=None)
@given(grown(BYTES, COUNTS), st.data())
def test_bytes_are_read_as_re_does(pattern: str, data: st.DataObject) -> None:
    of_bytes = pattern.encode("latin-1")
    automaton = compiled(of_bytes)
    given = [st.binary(max_size=5), st.text("abKk\n 1\xff\x80\x00", max_size=5)]
    for _ in range(5):
        drawn = data.draw(st.one_of(*given))
        string = drawn if isinstance(drawn, bytes) else drawn.encode("latin-1")
        assert reads(automaton, string) == matches(of_bytes, string), string


@settings(max_examples=75, deadline=None)
@given(grown(TEXT, COUNTS), st.data())
def test_text_is_read_as_re_does(pattern: str, data: st.DataObject) -> None:
    automaton = compiled(pattern)
    characters = st.text("abKk\u212a\n 1éÉ\u017f\U0001f600€\x80\x00", max_size=5)
    given = [st.binary(max_size=5), characters, st.text(max_size=3)]
    for _ in range(5):
        drawn = data.draw(st.one_of(*given))
        string = drawn if isinstance(drawn, bytes) else drawn.encode()
        assert reads(automaton, string) == matches(pattern, string), string


@settings(max_examples=50, deadline=None)
@given(grown(BYTES, COUNTS), st.randoms(use_true_random=False))
def test_what_the_automaton_leads_to_matches(pattern: str, random: Any) -> None:
    of_bytes = pattern.encode("latin-1")
    automaton = compiled(of_bytes)
    state, string = automaton.start, b""
    for left in range(12, 0, -1):
        allowed = automaton.allowed(state, left).nonzero()[:, 0].tolist()
        if not allowed:
            break
        byte = random.choice(allowed)
        state, string = automaton.step(state, byte), string + bytes([byte])
    if automaton.distance[automaton.start] <= 12:
        assert matches(of_bytes, string), string


def compiled(pattern: str | bytes) -> Automaton:
    try:
        return Regex(pattern).compile(256)
    except ValueError as error:
        assume(not re.search("nothing satisfies|only the empty string", str(error)))
        raise


def test_every_character_of_a_class_is_read() -> None:
    """Each code point there is, alone."""
    pattern = re.compile(r"[\w\U00010fff-\U00011abc]", re.IGNORECASE)
    automaton = Regex(pattern).compile(256)
    ends = [0, 0x80, 0x800, 0x10000, 0x110000]
    for length, (first, end) in enumerate(pairwise(ends), 1):
        characters = [chr(point) for point in range(first, end) if not 0xD800 <= point < 0xE000]
        codes = torch.frombuffer(bytearray("".join(characters).encode()), dtype=torch.uint8)
        states = torch.zeros(len(characters), dtype=torch.long)
        for column in codes.view(-1, length).long().T:
            after = automaton.next[states, automaton.classes[column].long()].long()
            states = torch.where(states < 0, states, after)
        got = (states >= 0) & (automaton.distance[states] == 0)
        want = [pattern.fullmatch(character) is not None for character in characters]
        assert torch.equal(got, torch.tensor(want))


def test_no_text_has_surrogates_overlong_forms_or_more_than_0x10ffff() -> None:
    text = Regex("(?s:.*)").compile(256)
    for data in [b"\xed\xa0\x80", b"\xc0\x80", b"\xe0\x80\x80", b"\xf4\x90\x80\x80", b"\xf8"]:
        assert not reads(text, data)
    for data in [b"", b"\xed\x9f\xbf", b"\xee\x80\x80", b"\xf4\x8f\xbf\xbf"]:
        assert reads(text, data)


def test_a_compiled_pattern_keeps_its_flags() -> None:
    flags = re.VERBOSE | re.IGNORECASE | re.DOTALL
    automaton = Regex(re.compile(rb"a .  # any", flags)).compile(256)
    assert reads(automaton, b"A\n") and not reads(automaton, b"A \n")


def test_flags_hold_where_they_are_set() -> None:
    automaton = Regex(r"\w(?a:\w)(?i:k)\w").compile(256)
    for text in ["éak\u212aé", "ééké", "éaKé", "éa\u212aé", "éakE"]:
        assert reads(automaton, text.encode()) == matches(r"\w(?a:\w)(?i:k)\w", text.encode())


@pytest.mark.parametrize(
    "pattern", [rb"^ab$", rb"\Aab\Z", rb"^^ab$$", rb"(^a|^a)(b$|c)", rb"(?m)^ab$"]
)
def test_anchors_at_the_ends_change_nothing(pattern: bytes) -> None:
    automaton = Regex(pattern).compile(256)
    assert reads(automaton, b"ab") and not reads(automaton, b"ab\n")


@pytest.mark.parametrize("num_tokens", [98, 256, 257, 300])
def test_ids_that_are_no_bytes_are_forbidden(num_tokens: int) -> None:
    automaton = Regex(rb"[\x00-\xff]+").compile(num_tokens)
    want = torch.arange(num_tokens) < 256
    assert torch.equal(automaton.allowed(automaton.start, 5), want)


def test_a_vocabulary_that_lacks_bytes_forbids_what_needs_them() -> None:
    automaton = Regex(rb"a+|ab").compile(98)
    assert automaton.allowed(automaton.step(automaton.start, 97), 5).nonzero().tolist() == [[97]]
    with pytest.raises(ValueError, match="nothing satisfies"):
        Regex(rb"b+").compile(98)


def test_what_is_repeated_often_is_compiled_at_once() -> None:
    automaton = Regex(rb"[^\n]{0,1000}\n").compile(257)
    assert reads(automaton, b"a" * 1000 + b"\n") and not reads(automaton, b"a" * 1001 + b"\n")
    assert reads(Regex(rb"(){4000000000}(|a){,2}").compile(257), b"aa"), "of nothing, any number"


HOSTILE = [
    rb"(a|b)*a(a|b){30}",
    rb"(?s).*a.{2000}",
    rb"((a{1,1000}){1,1000}){1,1000}",
    r"(\w{1,100}\W{1,100}){1,100}",
    rb"a{4294967294}",
    rb"(a?){0,60000}(a?){0,60000}",
]


@pytest.mark.slow
@pytest.mark.parametrize("pattern", HOSTILE)
def test_too_many_states_are_refused(pattern: bytes | str) -> None:
    with pytest.raises(ValueError, match=r"needs more than|takes over"):
        Regex(pattern).compile(257)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (rb"(?=a)b", "a lookahead or lookbehind is not supported"),
        (rb"a(?<=a)", "a lookahead or lookbehind is not supported"),
        (rb"(?!a)b", "a negative lookahead or lookbehind is not supported"),
        (rb"a(?!)", "a negative lookahead or lookbehind is not supported"),
        (rb"(a)\1", "a backreference is not supported"),
        (rb"(?P<x>a)(?P=x)", "a backreference is not supported"),
        (rb"(a)?(?(1)b|c)", "a conditional group is not supported"),
        (rb"\bab", r"a word boundary \(\\b\) is not supported"),
        (rb"a\Bb", r"a word boundary \(\\B\) is not supported"),
        (rb"a^b", "expected .* only where it begins and ends"),
        (rb"a$b", "expected .* only where it begins and ends"),
        (rb"(^a)*", "expected .* only where it begins and ends"),
        (rb"(a", "no regular expression: missing \\)"),
        ("[", "no regular expression: unterminated"),
        (rb"(?i", "no regular expression"),
        ("(" * 5000 + ")" * 5000, "no regular expression"),
    ],
)
def test_what_no_automaton_can_be_is_refused_by_name(pattern: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"pattern: {words}"):
        Regex(pattern)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python's re has them from 3.11 on")
@pytest.mark.parametrize(
    ("pattern", "words"), [(rb"a*+a", "a possessive quantifier"), (rb"(?>a|ab)", "an atomic group")]
)
def test_what_never_goes_back_is_refused_by_name(pattern: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=f"pattern: {words} is not supported"):
        Regex(pattern)


@pytest.mark.parametrize("pattern", [b"", rb"(|)", "^$", rb"(?:a{0})*"])
def test_only_the_empty_string_is_refused(pattern: bytes | str) -> None:
    with pytest.raises(ValueError, match="only the empty string satisfies"):
        Regex(pattern).compile(256)


@pytest.mark.parametrize("pattern", [rb"[^\x00-\xff]", "\ud800", r"a[\ud800-\udfff]"])
def test_what_nothing_satisfies_is_refused(pattern: bytes | str) -> None:
    with pytest.raises(ValueError, match="nothing satisfies"):
        Regex(pattern).compile(256)


def test_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match=r"pattern: expected str, bytes or re\.Pattern, got 3"):
        Regex(3)  # type: ignore[arg-type]
