"""What every engine's cache does, against whole forward passes over each row alone."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mblm.inference.automaton import Automaton
from mblm.inference.cache import Cache, Row
from mblm.inference.plan import Draws, Plan
from mblm.inference.session import Session
from tests.hierarchies import hierarchies
from tests.inference.caches import (
    CLOSE,
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
    with_every_pair,
)

pytestmark = on_every_engine

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
        first = fed(plain, prompt)
        plain.begin(first, [Plan(count, top_k=6, draws=Draws(generator), log_probs=True)])
        (want,) = run_out(plain, first)
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
            torch.testing.assert_close(cache.logits(rows), plain.logits(first), **CLOSE)

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
