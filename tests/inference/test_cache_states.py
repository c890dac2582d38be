"""States of rows that every engine saves and loads, and what it refuses."""

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mblm.inference.automaton import Automaton
from mblm.inference.cache import Cache
from mblm.inference.plan import Plan
from tests.inference.caches import (
    CLOSE,
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
    with_every_pair,
)

pytestmark = on_every_engine


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
    def test_positions_follow_from_the_bytes(self, make: MakeCache, kinds: tuple[str, ...]) -> None:
        m = build(*kinds)
        cache = make(m)
        (row,) = fed(cache, ids_of(10))  # two patches of four, of which one byte after each
        state = cache.state(row)
        assert (state["length"], state["taken"]) == (10, 10)
        assert state["tail"].tolist() in (ids_of(10).tolist(), ids_of(10)[8:].tolist())
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
            ({"length": 2**63, "taken": 2**63}, "state: length 9223372036854775808 exceeds"),
            ({"tail": torch.tensor([1, 19, 3])}, "state: tail: token id 19"),
            (
                {"tail": torch.tensor([1])},
                r"state: tail must be \(3,\), or .* got \(1,\) after 7 bytes",
            ),
            ({"tail": [1, 2, 3]}, "state: tail: expected a tensor"),
            (
                {"0.output": torch.zeros(7)},
                r"output: expected shape \(8,\)|0.output must have shape",
            ),
            (
                {"0.output": torch.zeros(8).long()},
                "state: stage 0: output: expected floating point",
            ),
            (
                {"0.keys": torch.zeros(1, 2, 3, 4)},
                r"keys: expected shape \(1, 2, 2, 4\)|0.keys must",
            ),
            (
                {"1.ssm": None},
                "stage 1: ssm: expected a tensor, got NoneType",
            ),
            ({"1.more": torch.zeros(1)}, "stage 1: expected ssm, window|state must hold 9 tensors"),
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

    @pytest.mark.parametrize("name", ["length", "taken", "tail"])
    def test_what_is_missing_is_named(self, make: MakeCache, name: str) -> None:
        cache = make(MODELS["transformer above mamba1"])
        (row,) = fed(cache, ids_of(7))
        state = cache.state(row)
        del state[name]
        with pytest.raises(ValueError, match=f"state: {name}: expected an? .*, got None"):
            cache.set_state(row, state)
        assert cache.lengths([row]) == [7]

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
        with pytest.raises(ValueError, match="count: expected at most 16777216 rows, got"):
            cache.add(1 << 40)

    def test_dropping_never_raises(self, cache: Cache) -> None:
        row, other = cache.add(2)
        cache.drop([row, row, 99, -5])
        cache.drop([row])
        assert cache.lengths([other]) == [0]

    def test_no_handle_comes_to_mean_another_row(self, cache: Cache) -> None:
        seen = set()
        for _ in range(50):
            rows = cache.add(3)
            seen.update(rows)
            cache.drop(rows)
        assert len(seen) == 150

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

    @pytest.mark.parametrize(
        "ids",
        [
            torch.tensor([3, 19]),
            torch.tensor([-1]),
            torch.tensor([1.0]),
            torch.tensor([[1]]),
            torch.tensor(1),
            torch.tensor([1]).to_sparse(),
            torch.zeros(1, device="meta").long(),
            b"\x13",
            bytearray(1),
            "a",
            [1],
            None,
        ],
    )
    def test_what_is_fed_is_token_ids(self, cache: Cache, ids: Any) -> None:
        rows = fed(cache, ids_of(3), ids_of(2))
        with pytest.raises((ValueError, TypeError), match="ids"):
            cache.feed(rows, [ids_of(4), ids])
        assert cache.lengths(rows) == [3, 2]

    def test_bytes_are_fed_whatever_the_default_device_is(self, cache: Cache) -> None:
        rows = cache.add(2)
        with torch.device("meta"):
            cache.feed(rows, [b"\3\4", b""])
        assert torch.equal(cache.logits(rows[:1]), cache.logits(fed(cache, torch.tensor([3, 4]))))

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
            (torch.ones(1, device="meta").long(), r"drafts\[0\]: expected a dense tensor with"),
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
    m = build("lstm with a state", "transformer")
    entered, leave = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        entered.set()
        leave.wait(30)

    cache = make(m)
    first, second = (fed(cache, ids_of(5)) for _ in range(2))
    cache.begin(first, [Plan(5)])
    handle = m.stage_models[0].lstm.register_forward_pre_hook(wait)
    thread = threading.Thread(target=cache.run, args=(first, 60.0))
    thread.start()
    try:
        assert entered.wait(30)
        handle.remove()
        for call in (cache.logits, cache.copy, cache.last, cache.lengths, cache.run):
            with pytest.raises(ValueError, match=f"row {first[0]}: in another call at this time"):
                call(first)
        cache.feed(second, [ids_of(2)])
        assert cache.lengths(second) == [7]
        cache.drop(first)  # which never waits
    finally:
        leave.set()
        thread.join()
    with pytest.raises(ValueError, match="there is no such row"):
        cache.lengths(first)
