"""Automata: what they read, how far acceptance is, and tables that are refused."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mblm.inference.automaton import Automaton


def table(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows)


def accepting(*states: int, of: int) -> torch.Tensor:
    return torch.tensor([state in states for state in range(of)])


def read(automaton: Automaton, tokens: Any) -> list[bool]:
    """Whether it accepts after each token."""
    state, found = automaton.start, []
    for token in tokens:
        state = automaton.step(state, token)
        found.append(automaton.accepts(state))
    return found


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), max_size=5),
    st.lists(st.integers(0, 4), max_size=20),
)
def test_strings_are_found_wherever_they_end(strings: list[list[int]], tokens: list[int]) -> None:
    automaton = Automaton.of_strings(strings, 5)
    want = [
        any(tokens[: end + 1][-len(string) :] == string for string in strings)
        for end in range(len(tokens))
    ]
    assert read(automaton, tokens) == want


def test_a_string_with_an_id_outside_the_vocabulary_is_never_found() -> None:
    automaton = Automaton.of_strings([b"\xff", b"\x01"], 10)
    assert read(automaton, [9, 1, 0]) == [False, True, False]


def test_strings_that_are_empty_are_refused() -> None:
    with pytest.raises(ValueError, match="strings: expected strings that are not empty"):
        Automaton.of_strings([b"a", b""], 256)


class TestDistance:
    def test_is_the_fewest_tokens_to_acceptance(self) -> None:
        # 0 -a-> 1 -a-> 2 -a-> 3, and a short cut 0 -b-> 3 that no token has.
        rows = table([[1, 3], [2, -1], [3, -1], [-1, -1]])
        automaton = Automaton(torch.tensor([0, 0]), rows, accepting(3, of=4))
        assert automaton.distance.tolist() == [3, 2, 1, 0]

    def test_is_minus_one_where_none_is_reached(self) -> None:
        rows = table([[1, 2], [1, 1], [2, -1]])
        automaton = Automaton(torch.tensor([0, 1]), rows, accepting(2, of=3))
        assert automaton.distance.tolist() == [1, -1, 0]
        assert automaton.next.tolist() == [[-1, 2], [-1, -1], [2, -1]], "leads nowhere: forbidden"

    @settings(max_examples=100, deadline=None)
    @given(st.data())
    def test_any_table(self, data: st.DataObject) -> None:
        states, classes = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
        rows = [
            [data.draw(st.integers(-1, states - 1)) for _ in range(classes)] for _ in range(states)
        ]
        of_token = [data.draw(st.integers(0, classes - 1)) for _ in range(3)]
        ends = [data.draw(st.booleans()) for _ in range(states)]
        automaton = Automaton(torch.tensor(of_token), table(rows), torch.tensor(ends))
        reached = [{state} for state in range(states)]
        want = [0 if end else -1 for end in ends]
        for steps in range(1, states + 1):
            for state in range(states):
                reached[state] = {rows[s][c] for s in reached[state] for c in of_token} - {-1}
                if want[state] < 0 and any(ends[s] for s in reached[state]):
                    want[state] = steps
        assert automaton.distance.tolist() == want


class TestAllowed:
    # "ab" any number of times: 0 -a-> 1 -b-> 0; c is never allowed.
    pairs = Automaton(
        torch.tensor([0, 1, 2]), table([[1, -1, -1], [-1, 0, -1]]), accepting(0, of=2)
    )

    def test_leads_on(self) -> None:
        assert self.pairs.allowed(0, 10).tolist() == [True, False, False]
        assert self.pairs.allowed(1, 10).tolist() == [False, True, False]

    def test_the_end_stays_within_reach(self) -> None:
        assert self.pairs.allowed(0, 2).any()
        assert not self.pairs.allowed(0, 1).any(), "one token cannot be followed by the other"
        assert self.pairs.allowed(1, 1).any()

    def test_what_cannot_be_finished_goes_on(self) -> None:
        word = Automaton.of_strings([[0, 1, 2]], 3)
        assert word.allowed(0, 2).all()
        assert word.allowed(0, 3).tolist() == [True, False, False]

    def test_nothing_follows_what_is_forbidden(self) -> None:
        assert self.pairs.step(0, 2) == -1
        assert self.pairs.step(-1, 0) == -1 and not self.pairs.accepts(-1)


class TestEnd:
    # Even numbers of a, then one b at most: 0 -a-> 1 -a-> 0 -b-> 2. No token 2, 3.
    evens = Automaton(
        torch.tensor([0, 1, 2, 2]),
        table([[1, 2, -1], [0, -1, -1], [-1] * 3]),
        accepting(0, 2, of=3),
    )

    def test_comes_where_it_accepts_and_may_go_on(self) -> None:
        ended = self.evens.ending_by(3)
        assert ended.allowed(0, 9).tolist() == [True, True, False, True]
        assert ended.allowed(1, 9).tolist() == [True, False, False, False]
        assert ended.is_complete(2), "complete as before"
        assert ended.distance[:3].tolist() == self.evens.distance.tolist()

    def test_is_accepted_and_nothing_follows(self) -> None:
        ended = self.evens.ending_by(3)
        assert ended.is_complete(ended.step(0, 3))
        assert read(ended, [0, 0, 3]) == [False, True, True]


FITS = {
    "classes": torch.zeros(4, dtype=torch.int16),
    "next": torch.zeros(2, 1, dtype=torch.uint8),
    "accepting": torch.tensor([True, False]),
    "start": 1,
}


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"classes": [0]}, TypeError, "classes: expected a tensor of integers, got list"),
        ({"classes": torch.zeros(4)}, TypeError, "classes: .* got torch.float32"),
        ({"classes": torch.zeros(4).bool()}, TypeError, "classes: .* got torch.bool"),
        ({"classes": torch.zeros(2, 2).long()}, ValueError, "classes: expected 1 dimensions"),
        ({"classes": torch.ones(4).long()}, ValueError, r"classes: expected values in \[0, 1\)"),
        ({"classes": torch.full((4,), -1)}, ValueError, "classes"),
        ({"next": torch.zeros(2).long()}, ValueError, "next: expected 2 dimensions"),
        ({"next": torch.zeros(0, 1).long()}, ValueError, "next: expected 1 to .* states, got 0"),
        ({"next": torch.full((2, 1), 2)}, ValueError, r"next: expected values in \[-1, 2\)"),
        ({"next": torch.full((2, 1), -2)}, ValueError, "next"),
        ({"next": torch.full((2, 1), 2**40)}, ValueError, "next"),
        ({"next": torch.zeros(2, 0).long()}, ValueError, "classes"),
        ({"accepting": torch.zeros(2)}, TypeError, "accepting: expected a bool tensor"),
        ({"accepting": torch.zeros(3).bool()}, ValueError, r"accepting: expected shape \(2,\)"),
        ({"start": 2}, ValueError, r"start: expected a state in \[0, 2\), got 2"),
        ({"start": -1}, ValueError, "start"),
        ({"start": None}, TypeError, "start: expected an integer"),
    ],
)
def test_refuses_by_name(given: dict[str, Any], error: type[Exception], words: str) -> None:
    Automaton(**FITS)
    with pytest.raises(error, match=words):
        Automaton(**{**FITS, **given})
