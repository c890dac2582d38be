"""What every engine's cache does, against whole forward passes over each row alone."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mblm.inference.automaton import Automaton
from mblm.inference.cache import Cache, Row
from mblm.inference.plan import Draws, Plan
from mblm.inference.session import Session
from tests.inference.caches import (
    CLOSE,
    PAIRS,
    InterruptedInTestError,
    MakeCache,
    build,
    fed,
    follow,
    ids_of,
    interrupted_at,
    numbers_of,
    on_every_engine,
    run_out,
    seeded,
    whole_logits,
)
from tests.models import hierarchies

pytestmark = on_every_engine
with_every_pair = pytest.mark.parametrize("kinds", PAIRS, ids=" above ".join)

# The logits of whole passes and of steps differ in their last bits, which must not decide.
FILTERS = [
    {"temperature": 0.0},
    {},
    {"top_k": 5},
    {"top_k": 19, "temperature": 1.7},
    {"top_p": 0.8},
    {"top_k": 12, "min_p": 0.05},
    {"top_p": 0.95, "min_p": 0.02, "temperature": 0.8},
]


@settings(max_examples=10, deadline=None)
@given(m=hierarchies(), data=st.data())
def test_any_schedule(make: MakeCache, m: Any, data: st.DataObject) -> None:
    """Rows come and go, are fed, run, copied, saved, in any order; each is as if alone."""
    with torch.no_grad():
        m.to_logits.weight *= 8
    cache = make(m)
    limit = 30 if m.max_length is None else min(30, m.max_length)
    rows: dict[Row, torch.Tensor] = {row: ids_of(0) for row in cache.add(2)}
    for step in range(data.draw(st.integers(1, 6), label="steps")):
        some = data.draw(st.lists(st.sampled_from(list(rows)), unique=True), label="rows")
        what = data.draw(st.sampled_from(["add", "feed", "run", "copy", "drop", "save"]))
        if what == "add":
            rows |= {row: ids_of(0) for row in cache.add(data.draw(st.integers(1, 2)))}
        elif what == "feed":
            parts = [
                ids_of(data.draw(st.integers(0, min(9, limit - len(rows[row])))), step)
                for row in some
            ]
            cache.feed(some, parts)
            rows |= {row: torch.cat((rows[row], p)) for row, p in zip(some, parts, strict=True)}
        elif what == "run":
            draws = seeded(step, max(1, len(some)))
            plans = [
                Plan(
                    data.draw(st.integers(0, min(9, limit - len(rows[row])))),
                    draws=draws,
                    lane=lane,
                    **data.draw(st.sampled_from(FILTERS)),
                )
                for lane, row in enumerate(some)
            ]
            cache.begin(some, plans)
            numbers = numbers_of(step, max(1, len(some)))
            for row, plan, ran in zip(some, plans, run_out(cache, some), strict=True):
                chosen, _, reason = follow(m, rows[row], plan, numbers)
                assert (ran.ids.tolist(), ran.reason) == (chosen, reason)
                rows[row] = torch.cat((rows[row], ran.ids))
        elif what == "copy":
            rows |= dict(zip(cache.copy(some), (rows[row] for row in some), strict=True))
        elif what == "drop":
            cache.drop(some)
            for row in some:
                del rows[row]
            rows |= {row: ids_of(0) for row in cache.add(1)}
        else:
            for row in some:
                state = cache.state(row)
                other = data.draw(st.sampled_from(list(rows)), label="other")
                cache.set_state(other, state)
                rows[other] = rows[row]
        check_logits(cache, m, rows)


def check_logits(cache: Cache, m: Any, rows: dict[Row, torch.Tensor]) -> None:
    assert cache.lengths(list(rows)) == [len(ids) for ids in rows.values()]
    logits = cache.logits(list(rows))
    for row, ids in zip(logits, rows.values(), strict=True):
        torch.testing.assert_close(row, whole_logits(m, ids), **CLOSE)


@with_every_pair
def test_rows_of_different_lengths_side_by_side(make: MakeCache, kinds: tuple[str, ...]) -> None:
    m = build(*kinds)
    prompts = [ids_of(length) for length in (0, 1, 4, 7, 8, 13)]
    cache = make(m)
    rows = fed(cache, *prompts)
    draws = seeded(3, len(rows))
    plans = [Plan(14, draws=draws, lane=lane, top_k=9) for lane in range(len(rows))]
    cache.begin(rows, plans)
    numbers = numbers_of(3, len(rows))
    for ran, prompt, plan in zip(run_out(cache, rows), prompts, plans, strict=True):
        assert ran.ids.tolist() == follow(m, prompt, plan, numbers)[0]


@pytest.mark.parametrize(
    ("left", "chosen"),
    [((0, 0, 0, 3), [1, 1, 1, 1]), ((0, 1, 1, 1), [0, 1, 1, 1]), ((0, 2), [0, 1]), ((0,), [1])],
    ids=["few amid a patch", "more amid it", "as many", "alone"],
)
def test_at_the_end_of_a_patch_the_fewer_rows_wait(
    make: MakeCache, left: tuple[int, ...], chosen: list[int]
) -> None:
    """So that the stages above take in patches of all at once, soon and from then on."""
    cache = make(build("transformer", "mamba1"))  # patches of 4 bytes
    rows = fed(cache, *(ids_of(8 - steps) for steps in left))
    cache.logits(rows)  # so that the first byte of each takes no step
    cache.begin(rows, [Plan(30)] * len(rows))
    assert [len(ran.ids) for ran in cache.run(rows, seconds=0)] == [1] * len(rows)
    assert [len(ran.ids) for ran in cache.run(rows, seconds=0)] == chosen
    run_out(cache, rows)
    assert cache.lengths(rows) == [8 - steps + 30 for steps in left]


@with_every_pair
def test_a_seed_means_what_it_does_in_a_session(make: MakeCache, kinds: tuple[str, ...]) -> None:
    m = build(*kinds)
    prompts = torch.stack([ids_of(6, seed) for seed in range(3)])
    generators = [torch.Generator().manual_seed(4) for _ in range(2)]
    want = Session(m, 3).feed(prompts).generate(15, filter_thres=0.5, generator=generators[0])
    cache = make(m)
    rows = fed(cache, *prompts)
    draws = Draws(generators[1], 3)
    cache.begin(rows, [Plan(15, top_k=9, draws=draws, lane=lane) for lane in range(3)])
    assert torch.equal(torch.stack([ran.ids for ran in run_out(cache, rows)]), want)
    assert torch.equal(*(torch.rand(1, generator=g) for g in generators)), "no number more"


@with_every_pair
def test_branches_of_branches(make: MakeCache, kinds: tuple[str, ...]) -> None:
    """What a shorter branch appends is not seen by a longer one, and the trunk may go first."""
    m = build(*kinds, seq_lens=(8, 3))
    cache = make(m)
    rows = {row: ids_of(4) for row in fed(cache, ids_of(4))}
    for step in range(1, 6):
        before = list(rows)
        branches = cache.copy(before)
        rows |= dict(zip(branches, [rows[row] for row in before], strict=True))
        for index, row in enumerate(branches if step % 2 else before):
            ids = ids_of(1 + index % 2, step + index)
            cache.feed([row], [ids])
            rows[row] = torch.cat((rows[row], ids))
        if step == 3:
            cache.drop(before[:2])
            rows = {row: ids for row, ids in rows.items() if row not in before[:2]}
    for some in (list(rows)[::3], list(rows)[1::3][::-1], list(rows)):
        logits = cache.logits(some)
        for row, got in zip(some, logits, strict=True):
            torch.testing.assert_close(got, whole_logits(m, rows[row]), **CLOSE)


def test_rows_with_the_same_bytes_draw_numbers_of_their_own(make: MakeCache) -> None:
    cache = make(build("transformer", "mamba1"))
    rows = fed(cache, *[ids_of(6)] * 3)
    draws = seeded(1, 3)
    plans = [Plan(12, temperature=3.0, top_k=19, draws=draws, lane=lane) for lane in range(3)]
    cache.begin(rows, plans)
    assert len({tuple(ran.ids.tolist()) for ran in run_out(cache, rows)}) == 3


def test_the_default_generator(make: MakeCache) -> None:
    m = build("transformer", "mamba1")
    torch.manual_seed(8)
    want = Session(m).generate(9, filter_thres=0.0)[0]
    cache = make(m)
    rows = cache.add()
    torch.manual_seed(8)
    cache.begin(rows, [Plan(9, top_k=19)])
    assert torch.equal(run_out(cache, rows)[0].ids, want)


def test_bytes_are_the_ids_that_they_are(make: MakeCache) -> None:
    cache = make(build("transformer", "mamba2", seq_lens=(30, 4)))
    row, other, long = cache.add(3)
    cache.feed([row, other, long], [b"\x05\x00\x07", b"", bytes(range(18)) * 4])
    assert cache.lengths([row, other, long]) == [3, 0, 72]
    ids = [torch.tensor([5, 0, 7]), ids_of(0), torch.arange(18).repeat(4)]
    same = cache.add(3)
    cache.feed(same, ids)
    assert torch.equal(cache.logits([row, other, long]), cache.logits(same))


def test_rows_come_in_any_sequence(make: MakeCache) -> None:
    cache = make(build("transformer", "mamba1"))
    cache.drop(cache.add(3))
    first = min(cache.add(3))
    rows = range(first, first + 3)  # which makes each number when it is asked for it
    cache.feed(rows, [ids_of(5), ids_of(6), ids_of(7)])
    assert cache.lengths(rows) == [5, 6, 7]
    assert len(cache.logits(rows)) == 3
    cache.drop(rows)
    with pytest.raises(ValueError, match=f"row {first + 1}: there is no such row"):
        cache.lengths(rows[1:])


@pytest.mark.parametrize("seq_lens", [(30,), (8, 4), (4, 3, 2), (3, 1, 2)], ids=str)
def test_pieces_of_any_size(make: MakeCache, seq_lens: tuple[int, ...]) -> None:
    kinds = ["transformer", "mamba2", "lstm with a state"][: len(seq_lens)]
    m = build(*kinds, seq_lens=seq_lens)
    ids = ids_of(23)
    cache = make(m)
    rows = cache.add(4)
    for row, size in zip(rows, (1, 2, 7, 23), strict=True):
        for piece in ids.split(size):
            cache.feed([row], [piece])
    for logits in cache.logits(rows):
        torch.testing.assert_close(logits, whole_logits(m, ids), **CLOSE)


class TestDrafts:
    @with_every_pair
    def test_right_and_wrong_at_every_offset(self, make: MakeCache, kinds: tuple[str, ...]) -> None:
        m = build(*kinds, seq_lens=(8, 5))
        prompt, count = ids_of(7), 9
        generator = torch.Generator().manual_seed(2)
        plain = make(m)
        rows = fed(plain, prompt)
        plain.begin(rows, [Plan(count, top_k=6, draws=Draws(generator), log_probs=True)])
        (want,) = run_out(plain, rows)
        state = generator.get_state()
        for offset in range(count + 1):
            draft = torch.cat((want.ids, ids_of(3)))  # and it may be longer than the plan
            if offset < count:
                draft[offset] = (draft[offset] + 1) % 18
            generator.manual_seed(2)
            cache = make(m)
            rows = fed(cache, prompt)
            cache.begin(rows, [Plan(count, top_k=6, draws=Draws(generator), log_probs=True)])
            (ran,) = run_out(cache, rows, [draft])
            assert torch.equal(ran.ids, want.ids) and ran.reason == "length"
            torch.testing.assert_close(ran.log_probs, want.log_probs, **CLOSE)
            assert torch.equal(generator.get_state(), state)
            torch.testing.assert_close(cache.logits(rows), plain.logits(plain_rows(plain)), **CLOSE)

    def test_of_several_rows_that_differ(self, make: MakeCache) -> None:
        m = build("mamba1", "transformer", seq_lens=(8, 6))
        prompts = [ids_of(length) for length in (0, 5, 6, 9)]
        numbers = numbers_of(1, 4)
        plans = [Plan(11, top_k=5, draws=seeded(1, 4), lane=lane) for lane in range(4)]
        want = [follow(m, p, plan, numbers)[0] for p, plan in zip(prompts, plans, strict=True)]
        drafts = [torch.tensor(ids) for ids in want]
        drafts[1][2] = (drafts[1][2] + 1) % 18
        cache = make(m)
        rows = fed(cache, *prompts)
        draws = seeded(1, 4)
        cache.begin(rows, [Plan(11, top_k=5, draws=draws, lane=lane) for lane in range(4)])
        ran = run_out(cache, rows, [drafts[0], drafts[1], None, drafts[3][:4]])
        assert [r.ids.tolist() for r in ran] == want

    def test_end_where_the_plan_does(self, make: MakeCache) -> None:
        m = build("transformer", "mamba2")
        (chosen, _, _) = follow(m, ids_of(5), Plan(12), numbers_of(0, 1))
        stop = Automaton.of_strings([chosen[3:5]], 19)
        want = follow(m, ids_of(5), Plan(12, stop=stop), numbers_of(0, 1))
        cache = make(m)
        rows = fed(cache, ids_of(5))
        cache.begin(rows, [Plan(12, stop=stop)])
        (ran,) = run_out(cache, rows, [torch.tensor(chosen)])
        assert (ran.ids.tolist(), ran.reason) == (want[0], "stop")
        torch.testing.assert_close(
            cache.logits(rows)[0], whole_logits(m, torch.cat((ids_of(5), ran.ids))), **CLOSE
        )


def plain_rows(cache: Cache) -> list[Row]:
    """The only row that a cache has had."""
    return [0]


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
        m = build("transformer", "mamba1", seq_lens=(2, 4))
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


class TestExceptions:
    """Whenever one comes, no row is torn and no byte is lost."""

    @pytest.mark.parametrize("kinds", [("transformer", "mamba1"), ("lstm with a state", "lstm")])
    def test_in_a_run(self, make: MakeCache, kinds: tuple[str, ...]) -> None:
        m = build(*kinds)
        prompts = [ids_of(3), ids_of(8)]
        numbers = numbers_of(7, 2)
        plans = [Plan(6, top_k=9, draws=seeded(7, 2), lane=lane) for lane in range(2)]
        want = [follow(m, p, plan, numbers)[0] for p, plan in zip(prompts, plans, strict=True)]
        call, calls = 0, [0]
        while call <= calls[0]:
            call += 1
            with interrupted_at(m, -1):  # hooks before the cache is made: no stage is compiled
                cache = make(m)
                rows = fed(cache, *prompts)
                draws = seeded(7, 2)
                cache.begin(rows, [Plan(6, top_k=9, draws=draws, lane=lane) for lane in range(2)])
                with interrupted_at(m, call) as calls:
                    try:
                        cache.run(rows, 60.0)
                    except InterruptedInTestError:
                        calls[0] = call
                last = [ran.ids for ran in cache.last(rows)]
                assert cache.lengths(rows) == [
                    len(p) + len(ids) for p, ids in zip(prompts, last, strict=True)
                ]
                logits = cache.logits(rows)
                for row, prompt, ids in zip(logits, prompts, last, strict=True):
                    whole = whole_logits(m, torch.cat((prompt, ids)))
                    torch.testing.assert_close(row, whole, **CLOSE)
                rest = run_out(cache, rows)
                assert [
                    a.tolist() + b.ids.tolist() for a, b in zip(last, rest, strict=True)
                ] == want
        assert call > 20

    def test_by_signals(self, make: MakeCache, alarms: Any) -> None:
        """At any instruction, most of them in a run."""
        m = build("transformer", "mamba1")
        prompts = [ids_of(3), ids_of(8)]
        numbers = numbers_of(7, 2)
        plans = [Plan(9, top_k=9, draws=seeded(7, 2), lane=lane) for lane in range(2)]
        want = [follow(m, p, plan, numbers)[0] for p, plan in zip(prompts, plans, strict=True)]
        cache, interrupts = make(m), 0
        while interrupts < 100:
            rows = fed(cache, *prompts)
            draws = seeded(7, 2)
            cache.begin(rows, [Plan(9, top_k=9, draws=draws, lane=lane) for lane in range(2)])
            got: list[list[int]] = [[], []]
            reasons = ["time"]
            while "time" in reasons:
                before = cache.lengths(rows)
                try:
                    with alarms():
                        ran = cache.run(rows, 60.0)
                except KeyboardInterrupt:
                    interrupts += 1
                    ran = cache.last(rows)
                    if cache.lengths(rows) == before:  # the run had not begun, maybe
                        continue
                for ids, row in zip(got, ran, strict=True):
                    ids += row.ids.tolist()
                assert cache.lengths(rows) == [3 + len(got[0]), 8 + len(got[1])]
                reasons = [row.reason for row in ran]
            assert got == want
            cache.drop(rows)

    @pytest.fixture
    def alarms(self) -> Iterator[Any]:
        """KeyboardInterrupt after up to 10 ms."""
        if not hasattr(signal, "setitimer"):
            pytest.skip("no timers")
        random, armed = Random(0), [False]

        def interrupt(*_: Any) -> None:
            if armed[0]:  # another thread may take a signal late, when the test is elsewhere
                raise KeyboardInterrupt

        @contextmanager
        def alarm() -> Iterator[None]:
            try:
                armed[0] = True
                signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0002, 0.01))
                yield
            finally:
                armed[0] = False
                signal.setitimer(signal.ITIMER_REAL, 0)

        before = signal.signal(signal.SIGALRM, interrupt)
        yield alarm
        signal.signal(signal.SIGALRM, before)

    @pytest.mark.parametrize("kinds", [("transformer", "mamba1"), ("lstm with a state", "lstm")])
    def test_in_what_takes_in_bytes(self, make: MakeCache, kinds: tuple[str, ...]) -> None:
        m = build(*kinds)
        call, calls = 0, [0]
        while call <= calls[0]:
            call += 1
            with interrupted_at(m, -1):
                cache = make(m)
                rows = fed(cache, ids_of(3), ids_of(8))
                before = cache.logits(rows)
                with interrupted_at(m, call) as calls:
                    try:
                        cache.feed(rows, [ids_of(6), ids_of(1)])
                    except InterruptedInTestError:
                        calls[0] = call
                        assert cache.lengths(rows) == [3, 8]
                        torch.testing.assert_close(cache.logits(rows), before, **CLOSE)
                        cache.feed(rows, [ids_of(6), ids_of(1)])
                for row, a, b in zip(cache.logits(rows), (3, 8), (6, 1), strict=True):
                    whole = whole_logits(m, torch.cat((ids_of(a), ids_of(b))))
                    torch.testing.assert_close(row, whole, **CLOSE)
        assert call > 5


class TestStates:
    @with_every_pair
    def test_a_row_goes_on_from_what_was_saved(
        self, make: MakeCache, kinds: tuple[str, ...]
    ) -> None:
        m = build(*kinds)
        numbers = numbers_of(5, 1)
        for length in (0, 1, 4, 7, 8):
            cache = make(m)
            (row,) = fed(cache, ids_of(length))
            state = cache.state(row)
            other = make(m)
            (loaded,) = other.add()
            other.set_state(loaded, state)
            cache.feed([row], [ids_of(2)])  # what was saved does not change
            for value in state.values():
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    value.fill_(float("nan"))  # and what was loaded is the cache's own
            assert other.lengths([loaded]) == [length]
            plan = Plan(9, top_k=9, draws=seeded())
            other.begin([loaded], [plan])
            (ran,) = run_out(other, [loaded])
            assert ran.ids.tolist() == follow(m, ids_of(length), plan, numbers)[0]

    @with_every_pair
    def test_saving_between_logits_makes_no_difference(
        self, make: MakeCache, kinds: tuple[str, ...]
    ) -> None:
        m = build(*kinds)
        cache = make(m)
        rows = fed(cache, ids_of(3))
        cache.logits(rows)
        cache.feed(rows, [ids_of(2)])
        cache.state(rows[0])
        whole = whole_logits(m, torch.cat((ids_of(3), ids_of(2))))
        torch.testing.assert_close(cache.logits(rows)[0], whole, **CLOSE)

    @with_every_pair
    def test_positions_follow_from_the_bytes(self, make: MakeCache, kinds: tuple[str, ...]) -> None:
        m = build(*kinds)
        cache = make(m)
        (row,) = fed(cache, ids_of(10))  # two patches of four, of which one byte after each
        state = cache.state(row)
        assert (state["length"], state["taken"]) == (10, 10)
        assert state["tail"].tolist() == ids_of(10).tolist()  # all that it knows
        assert state["1.context"].shape == (4, 8)
        if kinds[0].startswith("transformer"):
            assert state["0.keys"].shape == state["0.values"].shape == (1, 2, 3, 4)
            assert state["0.delayed"].shape == (1, 2, 4)
        if kinds[1] == "mamba2":
            assert state["1.ssm"].shape == (1, 4, 4, 4) and state["1.window"].shape == (1, 2, 24)

    def test_a_pending_byte_may_come_with_a_state(self, make: MakeCache) -> None:
        m = build("transformer", "mamba1")
        cache = make(m)
        (row,) = fed(cache, ids_of(7))
        state = cache.state(row)
        token = 5
        state["length"] += 1
        state["tail"] = torch.cat((state["tail"], torch.tensor([token])))
        cache.set_state(row, state)
        whole = whole_logits(m, torch.cat((ids_of(7), torch.tensor([token]))))
        torch.testing.assert_close(cache.logits([row])[0], whole, **CLOSE)

    @settings(max_examples=150, deadline=None, report_multiple_bugs=False)
    @given(data=st.data())
    def test_a_state_that_was_tampered_with(self, make: MakeCache, data: st.DataObject) -> None:
        """It is refused and nothing has changed, or it is a state like any other."""
        m = MODELS[data.draw(st.sampled_from(sorted(MODELS)))]
        cache = make(m)
        row, other = fed(cache, ids_of(data.draw(st.integers(0, 14))), ids_of(3))
        state = cache.state(row)
        before = cache.logits([other])
        keys = st.lists(st.sampled_from(sorted(state)), min_size=1, max_size=2, unique=True)
        for key in data.draw(keys):
            tamper(state, key, data)
        try:
            cache.set_state(other, state)
        except ValueError:
            assert cache.lengths([other]) == [3]
            assert torch.equal(cache.logits([other]), before)
        else:
            assert cache.lengths([other]) == [state["length"]]
            assert cache.logits([other]).shape == (1, 19)
            cache.feed([other], [ids_of(2)])

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"length": 8}, "state: taken is 7 with a length of 8|tail must be"),
            ({"length": 7.0}, "state: length: expected an integer"),
            ({"taken": 5}, "state: taken is 5 with a length of 7"),
            ({"taken": True}, "state: taken: expected an integer"),
            ({"length": -1, "taken": -1}, "state: length"),
            ({"tail": torch.tensor([1, 19, 3])}, "state: tail: token id 19"),
            (
                {"tail": torch.tensor([1])},
                r"state: tail must be \(3,\), or .* got \(1,\) after 7 bytes",
            ),
            ({"tail": [1, 2, 3]}, "state: tail: expected a tensor"),
            ({"0.output": torch.zeros(7)}, r"state: stage 0: output: expected shape \(8,\)"),
            (
                {"0.output": torch.zeros(8).long()},
                "state: stage 0: output: expected floating point",
            ),
            ({"0.keys": torch.zeros(1, 2, 3, 4)}, r"stage 0: keys: expected shape \(1, 2, 2, 4\)"),
            (
                {"1.ssm": None},
                "stage 1: ssm: expected a tensor, got NoneType",
            ),
            ({"1.more": torch.zeros(1)}, "stage 1: expected ssm, window"),
            ({"2.output": torch.zeros(8)}, "state: expected no 2.output"),
        ],
    )
    def test_refuses_by_name(self, make: MakeCache, change: dict[str, Any], words: str) -> None:
        cache = make(MODELS["transformer above mamba1"])
        row, other = fed(cache, ids_of(7), ids_of(2))
        state = cache.state(row)
        cache.set_state(other, state)
        with pytest.raises(ValueError, match=words):
            cache.set_state(other, {**state, **change})
        assert torch.equal(cache.logits([other]), cache.logits([row]))

    def test_a_plan_ends_with_the_row_it_was_for(self, make: MakeCache) -> None:
        cache = make(MODELS["transformer above mamba1"])
        rows = fed(cache, ids_of(7))
        cache.begin(rows, [Plan(4)])
        cache.set_state(rows[0], cache.state(rows[0]))
        with pytest.raises(ValueError, match="it has no plan"):
            cache.run(rows)


MODELS = {
    "transformer above mamba1": build("transformer", "mamba1"),
    "mamba2 above a transformer": build("mamba2", "fixed"),
    "three": build("lstm with a state", "transformer", "lstm", seq_lens=(4, 3, 2)),
}


def tamper(state: dict[str, Any], key: str, data: st.DataObject) -> None:
    """Change one entry of a state."""
    value = state[key]
    if data.draw(st.integers(0, 5)) == 0:
        del state[key]
    elif isinstance(value, int):
        new = st.sampled_from([0, -1, value - 1, value + 1, 2 * value, 2**31, 2**63, -(2**63)])
        state[key] = data.draw(new | st.sampled_from([None, 1.5, "1"]))
    elif isinstance(value, torch.Tensor):
        change = data.draw(st.sampled_from(sorted(CHANGES)))
        state[key] = CHANGES[change](value)
    else:
        state[key] = data.draw(st.sampled_from([None, (), [value], 3, "x", torch.zeros(1)]))


CHANGES: dict[str, Any] = {
    "longer": lambda t: torch.cat((t, t)),
    "shorter": lambda t: t[:-1],
    "empty": lambda t: t[:0],
    "wider": lambda t: t[None],
    "flat": lambda t: t.flatten(),
    "turned": lambda t: t.mT if t.ndim > 1 else t.flip(0),
    "int32": lambda t: t.int(),
    "float64": lambda t: t.double(),
    "half": lambda t: t.half(),
    "complex": lambda t: t.to(torch.complex64),
    "bool": lambda t: t.bool(),
    "negative": lambda t: -t - 1,
    "large": lambda t: t + 1000,
    "a list": lambda t: t.tolist(),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
}


CALLS: dict[str, Any] = {
    "copy": lambda cache, rows: cache.copy(rows),
    "feed": lambda cache, rows: cache.feed(rows, [ids_of(1)] * len(rows)),
    "begin": lambda cache, rows: cache.begin(rows, [Plan(1)] * len(rows)),
    "run": lambda cache, rows: cache.run(rows),
    "last": lambda cache, rows: cache.last(rows),
    "logits": lambda cache, rows: cache.logits(rows),
    "choose": lambda cache, rows: cache.choose(rows, ids=torch.zeros(len(rows)).long()),
    "lengths": lambda cache, rows: cache.lengths(rows),
}


class TestRows:
    @pytest.fixture
    def cache(self, make: MakeCache) -> Cache:
        return make(MODELS["transformer above mamba1"])

    @pytest.mark.parametrize("call", CALLS)
    def test_that_there_are_not_are_refused(self, cache: Cache, call: str) -> None:
        row, dropped = fed(cache, ids_of(3), ids_of(2))
        cache.drop([dropped])
        (after,) = cache.add()  # the same place, and another row
        cache.begin([row, after], [Plan(5, pause=True), Plan(5, pause=True)])
        for rows, words in (
            ([row, dropped], f"row {dropped}: there is no such row, or it was dropped"),
            ([row, 7], "row 7: there is no such row"),
            ([row, -1], "row -1: there is no such row"),
            ([row, 2**70], "there is no such row"),
            ([row, None], "row None: there is no such row"),
            ([row, True], "row True: there is no such row"),
            ([row, row], f"row {row}: twice in one call"),
        ):
            with pytest.raises((ValueError, TypeError), match=words):
                CALLS[call](cache, rows)
        assert cache.lengths([row, after]) == [3, 0]

    def test_of_which_there_are_none(self, cache: Cache) -> None:
        assert cache.add(0) == cache.copy([]) == cache.run([]) == cache.last([]) == []
        assert cache.lengths([]) == [] and cache.logits([]).shape == (0, 19)
        assert cache.choose([], mask=torch.ones(0, 19, dtype=torch.bool)) == []
        cache.feed([], [])
        cache.begin([], [])
        with pytest.raises(ValueError, match="count: expected a number >= 0, got -1"):
            cache.add(-1)
        with pytest.raises(TypeError, match="count: expected an integer"):
            cache.add(1.5)

    def test_dropping_never_raises(self, cache: Cache) -> None:
        row, other = cache.add(2)
        cache.drop([row, row, 99, -5])
        cache.drop([row])
        assert cache.lengths([other]) == [0]

    def test_places_are_used_again(self, cache: Cache) -> None:
        seen = set()
        for _ in range(50):
            rows = cache.add(3)
            seen.update(rows)
            cache.drop(rows)
        assert len(seen) == 150 and len({row % 2**32 for row in seen}) == 3

    def test_a_copy_goes_its_own_way(self, cache: Cache) -> None:
        m = MODELS["transformer above mamba1"]
        (row,) = fed(cache, ids_of(6))
        (copied,) = cache.copy([row])
        cache.feed([row], [ids_of(3)])
        cache.feed([copied], [ids_of(4)])
        for r, n in ((row, 3), (copied, 4)):
            whole = whole_logits(m, torch.cat((ids_of(6), ids_of(n))))
            torch.testing.assert_close(cache.logits([r])[0], whole, **CLOSE)

    @pytest.mark.parametrize(
        ("call", "words"),
        [
            (lambda c, r: c.feed(r, []), "ids: expected a list of 1, one for each row, got 0"),
            (lambda c, r: c.begin(r, [Plan(1)] * 2), "plans: expected a list of 1"),
            (lambda c, r: c.begin(r, [None]), r"plans\[0\]: expected a Plan, got NoneType"),
            (lambda c, r: c.run(r), "row 0: it has no plan"),
            (lambda c, r: c.last(r), "row 0: it has no plan"),
            (
                lambda c, r: c.begin(r, [Plan(1, stop=Automaton.of_strings([b"a"], 256))]),
                r"plans\[0\].stop: expected an automaton of 19 tokens, got one of 256",
            ),
        ],
    )
    def test_what_does_not_fit_is_refused(self, cache: Cache, call: Any, words: str) -> None:
        rows = fed(cache, ids_of(3))
        with pytest.raises((ValueError, TypeError), match=words):
            call(cache, rows)
        assert cache.lengths(rows) == [3]

    def test_plans_are_all_begun_or_none(self, cache: Cache) -> None:
        rows = cache.add(2)
        draws = seeded(1, 2)
        with pytest.raises(ValueError, match="lane: 1 of these draws serves another row"):
            cache.begin(rows, [Plan(3, draws=draws, lane=1)] * 2)
        cache.begin(rows[1:], [Plan(3, draws=draws, lane=1)])
        with pytest.raises(ValueError, match="it has no plan"):
            cache.run(rows)

    @pytest.mark.parametrize("seconds", [float("nan"), 10**400, "1", None])
    def test_seconds_are_a_number(self, cache: Cache, seconds: Any) -> None:
        rows = fed(cache, ids_of(3))
        cache.begin(rows, [Plan(4)])
        with pytest.raises((ValueError, TypeError), match="seconds: expected a number"):
            cache.run(rows, seconds)
        assert cache.lengths(rows) == [3]

    @pytest.mark.parametrize(
        ("draft", "words"),
        [
            (torch.tensor([19]), r"drafts\[0\]: token id 19"),
            (torch.tensor([[1]]), r"drafts\[0\]: expected shape \(n,\), got \(1, 1\)"),
            (torch.tensor([1.0]), r"drafts\[0\]: expected integer"),
            ([1], r"drafts\[0\]: expected a tensor"),
        ],
    )
    def test_drafts_are_of_token_ids(self, cache: Cache, draft: Any, words: str) -> None:
        rows = fed(cache, ids_of(3))
        cache.begin(rows, [Plan(4)])
        with pytest.raises((ValueError, TypeError), match=words):
            cache.run(rows, drafts=[draft])
        with pytest.raises(ValueError, match="drafts: expected a list of 1"):
            cache.run(rows, drafts=[])
        assert cache.lengths(rows) == [3]


def test_a_row_in_two_calls_at_once_is_refused_and_others_go_on(make: MakeCache) -> None:
    m = build("transformer", "lstm with a state")
    entered, leave = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        entered.set()
        leave.wait(30)

    cache = make(m)
    first, second = (fed(cache, ids_of(5)) for _ in range(2))
    cache.begin(first, [Plan(3)])
    handle = m.stage_models[1].lstm.register_forward_pre_hook(wait)
    thread = threading.Thread(target=cache.run, args=(first, 60.0))
    thread.start()
    try:
        assert entered.wait(30)
        handle.remove()
        with pytest.raises(ValueError, match=f"row {first[0]}: in another call at this time"):
            cache.feed(first, [ids_of(1)])
        cache.feed(second, [ids_of(2)])
        assert cache.lengths(second) == [7]
        cache.drop(first)  # which never waits
    finally:
        leave.set()
        thread.join()
    with pytest.raises(ValueError, match="there is no such row"):
        cache.lengths(first)
