"""Plans and draws: their ranges, and which numbers a lane gets."""

import copy
import math
import pickle
from dataclasses import asdict
from typing import Any

import pytest
import torch

from mblm.inference.engine import cache_for
from mblm.inference.plan import Draws, Plan
from tests.models import model, transformer

LIKE = torch.zeros(1, 7)


def drawn(seed: int, lanes: int, count: int) -> torch.Tensor:
    """What the contract says: one call of ``uniform_`` per byte."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.zeros(lanes, 7).uniform_(generator=generator) for _ in range(count)])


class TestDraws:
    def test_each_byte_of_all_lanes_is_one_drawing(self) -> None:
        draws = Draws(torch.Generator().manual_seed(1), lanes=3)
        want = drawn(1, 3, 4)
        for index in (2, 0, 1):
            lane = draws.enter(index)
            assert lane.begin == 0
            for n in range(4):
                assert torch.equal(lane.numbers(n, LIKE), want[n, index])

    def test_numbers_may_be_asked_for_again(self) -> None:
        lane = Draws(torch.Generator().manual_seed(1)).enter(0)
        want = drawn(1, 1, 2)
        for n in (0, 1, 0, 1):
            assert torch.equal(lane.numbers(n, LIKE), want[n, 0])

    def test_nothing_is_drawn_before_it_is_needed(self) -> None:
        generator = torch.Generator().manual_seed(1)
        before = generator.get_state()
        Draws(generator, lanes=2).enter(0)
        assert torch.equal(generator.get_state(), before)

    def test_numbers_that_no_lane_has_come_to_are_given_back(self) -> None:
        generator = torch.Generator().manual_seed(1)
        draws = Draws(generator, lanes=2)
        first, second = draws.enter(0), draws.enter(1)
        for n in range(3):
            first.numbers(n, LIKE)
        first.pass_on(2)
        second.pass_on(1)
        draws.give_back()
        after = torch.Generator().manual_seed(1)
        torch.zeros(2, 2, 7).uniform_(generator=after)
        assert torch.equal(generator.get_state(), after.get_state())
        want = drawn(1, 2, 3)
        assert torch.equal(second.numbers(1, LIKE), want[1, 1])
        assert torch.equal(first.numbers(2, LIKE), want[2, 0])

    def test_a_lane_goes_on_with_the_next_row(self) -> None:
        draws = Draws(torch.Generator().manual_seed(1))
        lane = draws.enter(0)
        lane.numbers(0, LIKE)
        lane.leave(1)
        lane = draws.enter(0)
        assert lane.begin == 1 and torch.equal(lane.numbers(1, LIKE), drawn(1, 1, 2)[1, 0])

    def test_a_lane_serves_one_row_at_a_time(self) -> None:
        draws = Draws(lanes=2)
        lane = draws.enter(1)
        with pytest.raises(ValueError, match="lane: 1 of these draws serves another row"):
            draws.enter(1)
        lane.pass_on(3)
        assert draws.enter(1, instead_of=lane).begin == 3
        lane.leave(0)  # what was replaced changes nothing
        with pytest.raises(ValueError, match="serves another row"):
            draws.enter(1)

    def test_a_lane_that_has_left_is_not_waited_for(self) -> None:
        draws = Draws(lanes=2)
        first, second = draws.enter(0), draws.enter(1)
        first.leave(1)
        for n in range(100):
            second.pass_on(n)
            second.numbers(n, LIKE)
        assert len(draws._kept[1]) == 1
        with pytest.raises(ValueError, match="0 of these draws has ended after 1 bytes, and the"):
            draws.enter(0)
        second.leave(100)
        assert not draws._kept[1] and draws.enter(1).begin == 100

    def test_a_lane_that_has_not_begun_is_waited_for(self) -> None:
        draws = Draws(torch.Generator().manual_seed(1), lanes=2)
        first = draws.enter(0)
        for n in range(3):
            first.numbers(n, LIKE)
            first.pass_on(n + 1)
        assert torch.equal(draws.enter(1).numbers(0, LIKE), drawn(1, 2, 1)[0, 1])

    def test_threads_that_ask_at_once_share_the_generator_of_a_seed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        draws, cpu, made = Draws(seed=3), torch.device("cpu"), torch.Generator
        others: list[torch.Generator] = []

        def make(device: torch.device) -> torch.Generator:
            monkeypatch.setattr(torch, "Generator", made)
            others.append(draws.generator_on(device))  # by another thread, meanwhile
            return made(device)

        monkeypatch.setattr(torch, "Generator", make)
        assert draws.generator_on(cpu) is others[0] is draws.generator_on(cpu)

    def test_the_default_generator_and_the_dtype_of_the_logits(self) -> None:
        torch.manual_seed(3)
        numbers = Draws().enter(0).numbers(0, LIKE.double())
        torch.manual_seed(3)
        assert torch.equal(numbers, torch.zeros(1, 7).double().uniform_()[0])

    @pytest.mark.parametrize(
        ("arguments", "error", "words"),
        [
            ({"generator": 5}, TypeError, "generator: expected a torch.Generator, got 5"),
            ({"lanes": 0}, ValueError, "lanes: expected a number >= 1, got 0"),
            ({"lanes": 1.5}, TypeError, "lanes: expected an integer"),
        ],
    )
    def test_refuses_by_name(
        self, arguments: dict[str, Any], error: type[Exception], words: str
    ) -> None:
        with pytest.raises(error, match=words):
            Draws(**arguments)


class TestPlan:
    def test_default_is_greedy(self) -> None:
        plan = Plan(5)
        assert (plan.top_k, plan.temperature, plan.top_p, plan.min_p) == (1, 1.0, 0.0, 0.0)

    def test_temperatures_of_no_effect_are_0_and_those_without_a_float32_are_finite(self) -> None:
        assert Plan(1, temperature=5e-324).temperature == 0
        assert math.isfinite(torch.tensor(Plan(1, temperature=1e300).temperature).item())

    @pytest.mark.parametrize(
        ("arguments", "error", "words"),
        [
            ({"max_tokens": -1}, ValueError, "max_tokens: expected a number >= 0, got -1"),
            ({"max_tokens": 1.0}, TypeError, "max_tokens: expected an integer"),
            ({"temperature": -1.0}, ValueError, "temperature: expected a finite number >= 0"),
            ({"temperature": math.nan}, ValueError, "temperature"),
            ({"temperature": "1"}, TypeError, "temperature"),
            ({"top_k": 0}, ValueError, "top_k: expected a number >= 1, got 0"),
            ({"top_k": None}, TypeError, "top_k"),
            ({"top_p": 1.1}, ValueError, r"top_p: expected a number in \[0, 1\], got 1.1"),
            ({"top_p": math.nan}, ValueError, "top_p"),
            ({"min_p": -0.1}, ValueError, r"min_p: expected a number in \[0, 1\]"),
            ({"draws": torch.Generator()}, TypeError, "draws: expected Draws or None"),
            ({"lane": 1}, ValueError, "lane: expected a number below the 1 of draws, got 1"),
            ({"draws": Draws(lanes=2), "lane": 2}, ValueError, "lane: .* below the 2 of draws"),
            ({"lane": -1}, ValueError, "lane"),
            ({"allow": [b"a"]}, TypeError, "allow: expected Automaton or None"),
            ({"stop": b"a"}, TypeError, "stop: expected Automaton or None"),
            ({"pause": 1}, TypeError, "pause: expected a bool, got 1"),
            ({"log_probs": None}, TypeError, "log_probs"),
        ],
    )
    def test_refuses_by_name(
        self, arguments: dict[str, Any], error: type[Exception], words: str
    ) -> None:
        with pytest.raises(error, match=words):
            Plan(**{"max_tokens": 1, **arguments})

    def test_of_one_that_the_engine_has_read_a_copy_is_made_as_of_any(self) -> None:
        cache = cache_for(model(transformer(), seq_lens=[4, 2]), "float32")
        plan = Plan(5, temperature=0.5)
        cache.begin(cache.add(1), [plan])
        copies = copy.deepcopy(plan), copy.copy(plan), pickle.loads(pickle.dumps(plan))
        for other in (*copies, plan.of_lane(1)):
            assert other.compiled is None and other.temperature == 0.5
        assert repr(plan) == repr(Plan(5, temperature=0.5))
        assert asdict(plan) == asdict(Plan(5, temperature=0.5))
