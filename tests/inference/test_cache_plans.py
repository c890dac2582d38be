"""What every engine makes of plans: pauses, automata, the context, runs."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mblm.inference.automaton import Automaton
from mblm.inference.cache import Cache, Row
from mblm.inference.plan import Draws, Plan
from tests.inference.caches import (
    CLOSE,
    PAIRS,
    MakeCache,
    build,
    fed,
    follow,
    ids_of,
    numbers_of,
    on_every_engine,
    run_out,
    seeded,
    whole_logits,
)
from tests.inference.test_cache import FILTERS

pytestmark = on_every_engine


class TestPauses:
    @pytest.fixture
    def m(self) -> Any:
        return build("mamba2", "transformer")

    def begin(self, make: MakeCache, m: Any, plan: Plan) -> tuple[Cache, list[Row]]:
        cache = make(m)
        rows = fed(cache, ids_of(6))
        cache.begin(rows, [plan])
        return cache, rows

    @pytest.mark.parametrize("answer", ["logits", "mask"])
    def test_sampling_by_the_caller_is_what_the_plan_does(
        self, make: MakeCache, m: Any, answer: str
    ) -> None:
        want = follow(m, ids_of(6), Plan(9, top_k=7), numbers_of(5, 1))
        plan = Plan(9, top_k=7, draws=seeded(5), pause=True, log_probs=True)
        cache, rows = self.begin(make, m, plan)
        chosen, log_probs = [], []
        while cache.run(rows)[0].reason == "logits":
            given: dict[str, torch.Tensor] = {"logits": cache.logits(rows)}
            if answer == "mask":
                given = {"mask": torch.ones(1, 19, dtype=torch.bool)}
            (ran,) = cache.choose(rows, **given)
            assert torch.equal(cache.last(rows)[0].ids, ran.ids)
            chosen += ran.ids.tolist()
            log_probs += ran.log_probs.tolist()
        assert (chosen, ran.reason) == (want[0], want[2])
        assert log_probs == pytest.approx(want[1], abs=1e-4)

    def test_what_the_caller_changes_decides(self, make: MakeCache, m: Any) -> None:
        plan = Plan(9, pause=True, log_probs=True)
        cache, rows = self.begin(make, m, plan)
        own = cache.logits(rows)[0].log_softmax(-1)
        logits = torch.full((1, 19), -5.0)
        logits[0, 3] = 5.0
        (ran,) = cache.choose(rows, logits=logits)
        assert ran.ids.tolist() == [3]
        assert ran.log_probs.item() == pytest.approx(own[3].item(), abs=1e-4), "of the model's own"
        mask = torch.zeros(1, 19, dtype=torch.bool)
        mask[0, 11] = True
        assert cache.choose(rows, mask=mask)[0].ids.tolist() == [11]
        assert cache.choose(rows, ids=torch.tensor([0]))[0].ids.tolist() == [0]
        bytes_now = torch.cat((ids_of(6), torch.tensor([3, 11, 0])))
        torch.testing.assert_close(cache.logits(rows)[0], whole_logits(m, bytes_now), **CLOSE)

    def test_a_byte_that_is_given_draws_nothing(self, make: MakeCache, m: Any) -> None:
        generator = torch.Generator().manual_seed(1)
        state = generator.get_state()
        plan = Plan(9, top_k=5, draws=Draws(generator), pause=True)
        cache, rows = self.begin(make, m, plan)
        cache.choose(rows, ids=torch.tensor([4]))
        assert torch.equal(generator.get_state(), state)

    def test_the_others_go_on(self, make: MakeCache, m: Any) -> None:
        cache, rows = self.begin(make, m, Plan(3, pause=True))
        other = fed(cache, ids_of(3))
        cache.begin(other, [Plan(5)])
        ran = run_out_but_pauses(cache, rows + other)
        assert ran == ["logits", "length"]
        assert cache.lengths(rows + other) == [6, 8]

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({}, "pass exactly one of ids, logits and mask"),
            ({"ids": torch.tensor([1]), "logits": torch.zeros(1, 19)}, "pass exactly one"),
            ({"ids": torch.tensor([19])}, "ids: token id 19"),
            ({"ids": torch.tensor([-1])}, "ids"),
            ({"ids": torch.tensor([1, 2])}, r"ids: expected shape \(1,\), got \(2,\)"),
            ({"ids": torch.tensor([1.0])}, "ids: expected a tensor of integers"),
            ({"logits": torch.zeros(1, 18)}, r"logits: expected shape \(1, 19\)"),
            ({"logits": torch.zeros(1, 19).long()}, "logits: expected a tensor of floating"),
            ({"logits": torch.zeros(1, 19, device="meta")}, "logits: expected a dense tensor with"),
            ({"mask": torch.ones(1, 19).bool().to_sparse()}, "mask: expected a dense tensor with"),
            ({"ids": torch.zeros(1, device="meta").long()}, "ids: expected a dense tensor with"),
            ({"logits": torch.full((1, 19), -torch.inf)}, "nothing is left to choose from"),
            ({"mask": torch.zeros(1, 19)}, "mask: expected a tensor of bool"),
            ({"mask": torch.zeros(1, 19).bool()}, r"rows\[0\]: nothing is left to choose from"),
        ],
    )
    def test_bad_answers_change_nothing(
        self, make: MakeCache, m: Any, given: dict[str, Any], words: str
    ) -> None:
        cache, rows = self.begin(make, m, Plan(4, pause=True))
        before = cache.logits(rows)
        with pytest.raises(ValueError, match=words):
            cache.choose(rows, **given)
        assert cache.lengths(rows) == [6] and torch.equal(cache.logits(rows), before)

    def test_only_plans_that_pause_and_go_on(self, make: MakeCache, m: Any) -> None:
        cache, rows = self.begin(make, m, Plan(1, pause=True))
        cache.choose(rows, ids=torch.tensor([1]))
        with pytest.raises(ValueError, match=r"its plan has ended \(length\)"):
            cache.choose(rows, ids=torch.tensor([1]))
        cache.begin(rows, [Plan(1)])
        with pytest.raises(ValueError, match="does not pause"):
            cache.choose(rows, ids=torch.tensor([1]))


def run_out_but_pauses(cache: Cache, rows: list[Row]) -> list[str]:
    while "time" in (reasons := [ran.reason for ran in cache.run(rows)]):
        pass
    return reasons


# Over tokens 0 .. 18 in three classes: even, odd, and 18 alone.
CLASSES = torch.tensor([*([0, 1] * 9), 2])


class TestAutomata:
    @settings(max_examples=25, deadline=None)
    @given(data=st.data())
    def test_any_table(self, make: MakeCache, data: st.DataObject) -> None:
        m = build(*data.draw(st.sampled_from(PAIRS)))
        states = data.draw(st.integers(1, 4))
        table = [[data.draw(st.integers(-1, states - 1)) for _ in range(3)] for _ in range(states)]
        ends = [data.draw(st.booleans()) for _ in range(states)]
        automaton = Automaton(CLASSES, torch.tensor(table), torch.tensor(ends))
        uses = data.draw(st.sampled_from(["allow", "stop"]))
        plan = Plan(
            data.draw(st.integers(0, 7)),
            draws=seeded(),
            **{uses: automaton},
            **data.draw(st.sampled_from(FILTERS)),
        )
        cache = make(m)
        rows = fed(cache, ids_of(5))
        if uses == "allow" and automaton.distance[0] < 0:
            with pytest.raises(ValueError, match=r"plans\[0\].allow: the automaton never accepts"):
                cache.begin(rows, [plan])
            return
        cache.begin(rows, [plan])
        (ran,) = run_out(cache, rows)
        chosen, _, reason = follow(m, ids_of(5), plan, numbers_of(5, 1))
        assert (ran.ids.tolist(), ran.reason) == (chosen, reason)
        if uses == "allow" and automaton.distance[0] <= plan.max_tokens:
            state = automaton.start
            for token in chosen:
                state = automaton.step(state, token)
            assert automaton.accepts(state), "what can be finished is"

    def test_each_row_has_its_own(self, make: MakeCache) -> None:
        m = build("transformer", "transformer without rotary")
        even = Automaton(CLASSES, torch.tensor([[0, -1, -1]]), torch.tensor([True]))
        odd = Automaton(CLASSES, torch.tensor([[-1, 0, -1]]), torch.tensor([True]))
        cache = make(m)
        rows = fed(cache, ids_of(3), ids_of(3), ids_of(3))
        cache.begin(rows, [Plan(8, allow=even), Plan(8, allow=odd), Plan(8)])
        ran = run_out(cache, rows)
        assert set((ran[0].ids % 2).tolist()) == {0} and set((ran[1].ids % 2).tolist()) == {1}
        assert ran[2].ids.tolist() == follow(m, ids_of(3), Plan(8), numbers_of(0, 1))[0]

    def test_the_context_counts_among_what_is_left(self, make: MakeCache) -> None:
        m = with_fixed_positions()
        word = Automaton(
            CLASSES, torch.tensor([[0, -1, 1], [-1, -1, -1]]), torch.tensor([0, 1]) > 0
        )
        cache = make(m)
        rows = fed(cache, ids_of(m.max_length - 3))
        cache.begin(rows, [Plan(100, allow=word)])
        (ran,) = run_out(cache, rows)
        assert ran.reason == "matched" and ran.ids[-1] == 18

    def test_bytes_that_are_given_must_be_allowed(self, make: MakeCache) -> None:
        even = Automaton(CLASSES, torch.tensor([[0, -1, -1]]), torch.tensor([True]))
        cache = make(build("mamba1", "mamba2"))
        rows = fed(cache, ids_of(3))
        cache.begin(rows, [Plan(8, allow=even, pause=True)])
        with pytest.raises(ValueError, match=r"ids\[0\]: the plan does not allow 3 here"):
            cache.choose(rows, ids=torch.tensor([3]))
        assert cache.lengths(rows) == [3]
        assert cache.choose(rows, ids=torch.tensor([4]))[0].ids.tolist() == [4]

    def test_the_first_that_is_allowed_comes_where_the_model_rules_all_of_it_out(
        self, make: MakeCache
    ) -> None:
        m = build("mamba1", "mamba2")
        with torch.no_grad():
            m.to_logits.bias[1::2] = -torch.inf
        odd = Automaton(CLASSES, torch.tensor([[-1, 0, -1]]), torch.tensor([True]))
        cache = make(m)
        rows = fed(cache, ids_of(3))
        cache.begin(rows, [Plan(3, allow=odd)])
        assert run_out(cache, rows)[0].ids.tolist() == [1, 1, 1]


def with_fixed_positions() -> Any:
    """A model that takes 12 bytes."""
    return build("fixed", "mamba1", seq_lens=(3, 4))


class TestContext:
    def test_a_row_ends_where_positions_do(self, make: MakeCache) -> None:
        m = with_fixed_positions()
        cache = make(m)
        rows = fed(cache, ids_of(5), ids_of(12))
        cache.begin(rows, [Plan(100), Plan(100)])
        ran = run_out(cache, rows)
        assert [(len(r.ids), r.reason) for r in ran] == [(7, "context"), (0, "context")]
        assert cache.logits(rows).isfinite().all()

    def test_more_bytes_than_positions_are_refused_for_all(self, make: MakeCache) -> None:
        m = with_fixed_positions()
        cache = make(m)
        rows = fed(cache, ids_of(5), ids_of(11))
        before = cache.logits(rows)
        with pytest.raises(ValueError, match="11 bytes and 2 more exceed the context of 12 bytes"):
            cache.feed(rows, [ids_of(2), ids_of(2)])
        assert cache.lengths(rows) == [5, 11] and torch.equal(cache.logits(rows), before)


class TestRuns:
    def test_a_run_that_is_over_gives_its_reason_again(self, make: MakeCache) -> None:
        cache = make(build("mamba1", "transformer"))
        rows = fed(cache, ids_of(2))
        cache.begin(rows, [Plan(3, log_probs=True)])
        run_out(cache, rows)
        (ran,) = cache.run(rows)
        assert (ran.ids.tolist(), ran.log_probs.tolist(), ran.reason) == ([], [], "length")
        cache.begin(rows, [Plan(0)])
        assert cache.run(rows)[0].reason == "length"

    def test_a_run_without_time_chooses_a_byte(self, make: MakeCache) -> None:
        cache = make(build("mamba1", "transformer"))
        rows = fed(cache, ids_of(2))
        cache.begin(rows, [Plan(3)])
        (ran,) = cache.run(rows, 0.0)
        assert len(ran.ids) >= 1 and ran.ids.dtype == torch.long and ran.log_probs is None

    def test_one_that_ends_does_not_stop_the_others(self, make: MakeCache) -> None:
        cache = make(build("mamba1", "transformer"))
        rows = fed(cache, ids_of(2), ids_of(3))
        cache.begin(rows, [Plan(1), Plan(9)])
        assert [len(ran.ids) for ran in cache.run(rows, 60.0)] == [1, 9]

    def test_what_is_fed_between_runs_counts(self, make: MakeCache) -> None:
        m = build("mamba1", "transformer")
        cache = make(m)
        rows = fed(cache, ids_of(2))
        cache.begin(rows, [Plan(8)])
        first = cache.run(rows, 0.0)[0].ids
        cache.feed(rows, [ids_of(3)])
        ids = torch.cat((ids_of(2), first, ids_of(3)))
        want = follow(m, ids, Plan(8 - len(first)), numbers_of(0, 1))[0]
        assert run_out(cache, rows)[0].ids.tolist() == want

    def test_a_stop_reads_chosen_bytes_only(self, make: MakeCache) -> None:
        m = build("mamba1", "transformer")
        chosen = follow(m, ids_of(4), Plan(6), numbers_of(0, 1))[0]
        stop = Automaton.of_strings([[int(ids_of(4)[-1]), chosen[0]]], 19)
        cache = make(m)
        rows = fed(cache, ids_of(4))
        cache.begin(rows, [Plan(6, stop=stop)])
        want = follow(m, ids_of(4), Plan(6, stop=stop), numbers_of(0, 1))
        (ran,) = run_out(cache, rows)
        assert (ran.ids.tolist(), ran.reason) == (want[0], want[2])

    def test_a_plan_stays_behind_when_a_row_is_copied(self, make: MakeCache) -> None:
        cache = make(build("mamba1", "transformer"))
        rows = fed(cache, ids_of(2))
        cache.begin(rows, [Plan(3)])
        copies = cache.copy(rows)
        with pytest.raises(ValueError, match=f"row {copies[0]}: it has no plan"):
            cache.run(copies)
        assert len(run_out(cache, rows)[0].ids) == 3 and cache.lengths(copies) == [2]

    def test_lanes_of_rows_that_end_at_different_bytes(self, make: MakeCache) -> None:
        m = build("transformer", "mamba2")
        cache = make(m)
        rows = fed(cache, *(ids_of(n) for n in (1, 2, 3)))
        draws, numbers = seeded(6, 3), numbers_of(6, 3)
        plans = [Plan(n, top_k=9, draws=draws, lane=lane) for lane, n in enumerate((9, 2, 5))]
        cache.begin(rows, plans)
        for n, plan, ran in zip((1, 2, 3), plans, run_out(cache, rows), strict=True):
            assert ran.ids.tolist() == follow(m, ids_of(n), plan, numbers)[0]
        with pytest.raises(ValueError, match="1 of these draws has ended after 2 bytes"):
            cache.begin(rows[1:2], [Plan(1, draws=draws, lane=1)])

    def test_lanes_that_are_refused_together_stay_as_they_were(self, make: MakeCache) -> None:
        m = build("transformer", "mamba2")
        cache = make(m)
        rows = fed(cache, *(ids_of(n) for n in (1, 2, 3)))
        draws, numbers = seeded(6, 2), numbers_of(6, 2)
        plans = [Plan(5, top_k=9, draws=draws, lane=lane) for lane in (0, 1)]
        cache.begin(rows[1:2], plans[1:])
        with pytest.raises(ValueError, match="1 of these draws serves another row"):
            cache.begin([rows[0], rows[2]], plans)
        with pytest.raises(ValueError, match="it has no plan"):
            cache.run(rows[:1])
        (second,) = run_out(cache, rows[1:2])
        cache.begin(rows[:1], plans[:1])  # its numbers were kept
        (first,) = run_out(cache, rows[:1])
        for n, plan, ran in zip((1, 2), plans, (first, second), strict=True):
            assert ran.ids.tolist() == follow(m, ids_of(n), plan, numbers)[0]
