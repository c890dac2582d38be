"""Everything that may be wished for a prompt is checked in one place, before anything runs."""

import inspect
import math
import re
from typing import Any

import pytest
import torch

from mblm import MBLM, Session
from mblm.inference.automaton import Automaton
from mblm.inference.request import Filters, Wishes, draws_of, request
from mblm.utils.naming import naming
from tests.models import mamba, model, transformer

V = 257


def without_address(value: object) -> str:
    """What a case is called, the same in every process."""
    return re.sub(" at 0x[0-9a-f]+", "", str(value))


def narrow() -> Automaton:
    """An automaton of a vocabulary of 2."""
    return Automaton(torch.zeros(2).long(), torch.tensor([[0]]), torch.tensor([True]))


@pytest.fixture(scope="module")
def m() -> MBLM:
    """A context of 30 bytes, which fixed positions limit."""
    return model(transformer(), transformer(), seq_lens=[6, 5], num_tokens=V, pad_token_id=256)


class Elsewhere(torch.Generator):
    """A generator of a GPU, which need not be there."""

    device = torch.device("cuda", 0)


class Compiles:
    """A constraint that compiles to what it is given."""

    def __init__(self, to: Any) -> None:
        self.to = to

    def compile(self, num_tokens: int) -> Any:
        if isinstance(self.to, Exception):
            raise self.to
        return self.to


def test_nothing_wished_is_greedy_to_the_end_of_the_context(m: MBLM) -> None:
    asked = request(m, "abc")
    assert asked.prompt.tolist() == [97, 98, 99]
    plan = asked.plan
    assert plan.max_tokens == 27 and plan.filters == (1.0, 1, 0.0, 0.0)
    assert plan.draws is plan.allow is plan.stop is None
    assert not plan.log_probs and not plan.pause
    assert asked.guide is asked.logits_processor is None


class TestFilters:
    @pytest.mark.parametrize(
        ("wishes", "filters"),
        [
            ({"filter_thres": 0.0}, (1.0, V, 0.0, 0.0)),
            ({"filter_thres": 0.9}, (1.0, 25, 0.0, 0.0)),
            ({"top_k": 5}, (1.0, 5, 0.0, 0.0)),
            ({"top_k": 5, "filter_thres": 0.5}, (1.0, 5, 0.0, 0.0)),
            ({"top_k": 10**6}, (1.0, 10**6, 0.0, 0.0)),
            ({"top_p": 0.5}, (1.0, V, 0.5, 0.0)),
            ({"min_p": 0.1}, (1.0, V, 0.0, 0.1)),
            ({"min_p": 0}, (1.0, V, 0.0, 0.0)),
            ({"min_p": 0.1, "top_k": 5}, (1.0, 5, 0.0, 0.1)),
            ({"min_p": 0.1, "top_p": 0.5}, (1.0, V, 0.5, 0.1)),
            ({"temperature": 0.5}, (0.5, 1, 0.0, 0.0)),
            ({"temperature": 0, "top_p": 0.9}, (0.0, V, 0.9, 0.0)),
            ({"temperature": 1e-31}, (0.0, 1, 0.0, 0.0)),
        ],
        ids=without_address,
    )
    def test_of_the_plan(self, m: MBLM, wishes: dict[str, Any], filters: Any) -> None:
        assert request(m, b"", **wishes).plan.filters == filters


class TestLength:
    def test_where_nothing_limits_it(self) -> None:
        m = model(mamba(), transformer(), seq_lens=[2, 3])
        assert request(m, [1, 2]).plan.max_tokens == 4
        assert request(m, [1] * 10).plan.max_tokens == 0
        assert request(m, [1] * 10, max_bytes=100).plan.max_tokens == 100

    def test_counts_what_the_row_has(self, m: MBLM) -> None:
        assert request(m, b"abc", 20).plan.max_tokens == 7
        with pytest.raises(ValueError, match=r"max_bytes: 8 bytes after .* 23 exceed"):
            request(m, b"abc", 20, max_bytes=8)


class TestStop:
    @staticmethod
    def ends(stop: Automaton, data: bytes) -> int | None:
        """After how many bytes it accepts."""
        state = stop.start
        for count, token in enumerate(data, 1):
            if stop.accepts(state := stop.step(state, token)):
                return count
        return None

    def test_after_any_string_or_the_end_token(self, m: MBLM) -> None:
        stop = request(m, b"", stop=[b"\n\n", "é"], end_token_id=7).plan.stop
        assert stop is not None
        assert self.ends(stop, b"a\nb\n\nc") == 5
        assert self.ends(stop, "née".encode()) == 3
        assert self.ends(stop, b"a\x07") == 2
        assert self.ends(stop, b"abc") is None

    @pytest.mark.parametrize("end", [None, -1, V, 2**70])
    def test_an_end_that_never_comes_costs_nothing(self, m: MBLM, end: int | None) -> None:
        assert request(m, b"", end_token_id=end).plan.stop is None

    def test_is_made_once(self, m: MBLM) -> None:
        first, second = (request(m, prompt, stop=[b"ab", "c"]).plan.stop for prompt in "xy")
        assert first is second and first is not request(m, b"", stop=[b"ab"]).plan.stop


class TestDraws:
    def test_each_request_has_its_own(self, m: MBLM) -> None:
        first, second = (request(m, b"", seed=3).plan.draws for _ in range(2))
        assert first is not second

    def test_of_a_generator(self, m: MBLM) -> None:
        generator = torch.Generator()
        draws = request(m, b"", generator=generator).plan.draws
        assert draws is not None and draws.generator is generator and draws.lanes == 1

    def test_of_several_rows(self, m: MBLM) -> None:
        draws = draws_of(m, None, None, lanes=3)
        assert draws is not None and draws.generator is None and draws.lanes == 3
        assert request(m, b"", 0, draws).plan.draws is draws


class TestConstraint:
    def test_an_automaton_runs_in_the_engine(self, m: MBLM) -> None:
        automaton = Automaton.of_strings([b"yes", b"no"], V)
        asked = request(m, b"", constraint=Compiles(automaton))
        assert asked.plan.allow is automaton and not asked.plan.pause and asked.guide is None

    def test_a_guide_and_a_processor_make_the_plan_pause(self, m: MBLM) -> None:
        asked = request(m, b"", constraint=Compiles(make := lambda: None))
        assert asked.guide is make and asked.plan.pause and asked.plan.allow is None
        asked = request(m, b"", logits_processor=(same := lambda ids, logits: logits))
        assert asked.logits_processor is same and asked.plan.pause


def test_log_probabilities(m: MBLM) -> None:
    assert request(m, b"", log_probs=True).plan.log_probs


@pytest.mark.parametrize(
    ("wishes", "error", "words"),
    [
        ({"prompt": None}, TypeError, "prompt: expected bytes, text or token ids"),
        ({"prompt": [300]}, ValueError, r"prompt: token id 300 at position \(0,\)"),
        ({"prompt": b"a" * 31}, ValueError, "prompt: 31 bytes exceed the context of 30"),
        ({"max_bytes": 31}, ValueError, "max_bytes: 31 bytes exceed the context of 30"),
        ({"max_bytes": -1}, ValueError, "max_bytes: expected a number >= 0, got -1"),
        ({"max_bytes": 2.0}, TypeError, "max_bytes: expected an integer, got 2.0"),
        ({"end_token_id": "a"}, TypeError, "end_token_id: expected an integer, got 'a'"),
        ({"temperature": -1.0}, ValueError, "temperature: expected a finite number >= 0, got"),
        ({"temperature": 10**400}, TypeError, "temperature: expected a number"),
        ({"temperature": math.nan}, ValueError, "temperature"),
        ({"temperature": "1"}, TypeError, "temperature: expected a number, got '1'"),
        ({"filter_thres": -0.1}, ValueError, r"filter_thres: expected a number in \[0, 1\]"),
        ({"filter_thres": math.nan, "top_k": 3}, ValueError, "filter_thres"),
        ({"top_k": 0}, ValueError, "top_k: expected a number >= 1, got 0"),
        ({"top_k": 3, "top_p": 0.5}, ValueError, "at most one of top_k and top_p"),
        ({"top_p": 0}, ValueError, r"top_p: expected a number in \(0, 1\], got 0"),
        ({"top_p": 3}, ValueError, r"top_p: expected a number in \(0, 1\], got 3"),
        ({"top_p": math.nan}, ValueError, r"top_p: expected a number in \(0, 1\], got nan"),
        ({"min_p": -0.1}, ValueError, r"min_p: expected a number in \[0, 1\], got -0.1"),
        ({"stop": b"abc"}, ValueError, "stop: expected a list of byte strings or texts, got b'"),
        ({"stop": [b"a", b""]}, ValueError, "stop: expected .* none empty, got b''"),
        ({"stop": ["\udc80"]}, ValueError, "stop: expected text that UTF-8 can encode"),
        ({"seed": 1.5}, TypeError, "seed: expected an integer, got 1.5"),
        ({"seed": 2**64}, ValueError, "seed: expected an integer in"),
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "at most one of seed and"),
        ({"generator": 5}, TypeError, "generator: expected a torch.Generator, got 5"),
        ({"generator": Elsewhere()}, ValueError, "generator: expected one of cpu, .* cuda:0"),
        ({"colour": 5}, TypeError, "unexpected keyword argument 'colour'"),
        ({"length": 5}, TypeError, "'length'"),
        ({"constraint": "a+"}, TypeError, r"constraint: expected one of mblm.constrain, got 'a\+'"),
        ({"constraint": Compiles(3)}, TypeError, "constraint: expected compile to give .* got int"),
        (
            {"constraint": Compiles(narrow())},
            ValueError,
            "constraint: expected an automaton of 257",
        ),
        ({"constraint": Compiles(ValueError("no"))}, ValueError, "^constraint: no$"),
        ({"logits_processor": 3}, TypeError, "logits_processor: expected a function, got int"),
        ({"log_probs": 1}, TypeError, "log_probs: expected a bool, got 1"),
    ],
    ids=without_address,
)
def test_is_refused_by_name(
    m: MBLM, wishes: dict[str, Any], error: type[Exception], words: str
) -> None:
    wishes = dict(wishes)
    before = torch.get_rng_state()
    with pytest.raises(error, match=words):
        request(m, wishes.pop("prompt", b""), **wishes)
    assert torch.equal(torch.get_rng_state(), before)


def test_errors_use_the_callers_names(m: MBLM) -> None:
    for prompt, wishes, words in (
        (3, {}, "of x: prime: expected bytes"),
        ([1, 2.0], {}, r"of x: prime\[1\]: expected an integer"),
        (b"a" * 31, {}, "of x: prime: 31 bytes"),
        (b"", {"max_bytes": -1}, "of x: count: expected"),
        (b"", {"top_k": 1, "top_p": 0.5}, "of x: pass at most one"),
        (b"", {"constraint": Compiles(ValueError("prompt: no"))}, "of x: constraint: prompt: no"),
    ):
        with (
            pytest.raises((TypeError, ValueError), match=f"^{words}"),
            naming("of x", prompt="prime", max_bytes="count"),
        ):
            request(m, prompt, **wishes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^prompt of mine"), naming(prompt="prime"):
        raise ValueError("prompt of mine")


@pytest.mark.parametrize(
    ("method", "wishes"),
    [
        (MBLM.generate, Filters.__optional_keys__),
        (MBLM.stream, Wishes.__optional_keys__ - Filters.__optional_keys__),
        (Session.generate, Filters.__optional_keys__ - {"seed", "generator"}),
    ],
    ids=["generate", "stream", "session"],
)
def test_help_names_every_wish(method: Any, wishes: set[str]) -> None:
    text = inspect.getdoc(method)
    assert text is not None
    for name in wishes:
        assert f"``{name}``" in text
