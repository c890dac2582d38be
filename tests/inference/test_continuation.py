"""Rows that go on as requested: they join and leave, pause for guides and processors, may fail."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch

from mblm import MBLM, MBLMReturnType
from mblm.inference.automaton import Automaton
from mblm.inference.cache import Cache, Ran
from mblm.inference.continuation import Continuation, Course
from mblm.inference.request import Request, request
from mblm.inference.torch_cache import TorchCache
from tests.inference.caches import MakeCache, build, ids_of, on_every_engine

V = 19
SAMPLING: dict[str, Any] = {"temperature": 1.5, "filter_thres": 0.0}


class Follows:
    """A constraint whose guide follows an automaton in Python."""

    def __init__(self, automaton: Automaton) -> None:
        self.automaton = automaton

    def compile(self, num_tokens: int) -> Callable[[], "Follower"]:
        return lambda: Follower(self.automaton)


class Follower:
    def __init__(self, automaton: Automaton) -> None:
        self.automaton, self.state = automaton, automaton.start

    def allowed(self, left: int) -> torch.Tensor:
        return self.automaton.allowed(self.state, left)

    def take(self, token: int) -> None:
        self.state = self.automaton.step(self.state, token)
        assert self.state >= 0, "only what was allowed is taken"

    def is_complete(self) -> bool:
        return self.automaton.is_complete(self.state)

    def accepts(self) -> bool:
        return self.automaton.accepts(self.state)


class InTheEngine(Follows):
    """The same constraint without a guide."""

    def compile(self, num_tokens: int) -> Any:
        return self.automaton


def words(*lengths: int) -> Automaton:
    """Accepts that many bytes, each even; nothing may follow the longest."""
    states = max(lengths)
    table = torch.full((states + 1, 2), -1)
    table[:-1, 0] = torch.arange(1, states + 1)
    accepting = torch.zeros(states + 1, dtype=torch.bool)
    accepting[list(lengths)] = True
    return Automaton(torch.arange(V) % 2, table, accepting)


def same(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return logits


@pytest.fixture
def m() -> MBLM:
    return build("transformer", "mamba1")


def begun(m: MBLM, cache: Cache, requests: list[Request], **how: Any) -> tuple[Continuation, Any]:
    rows = cache.add(len(requests))
    cache.feed(rows, [asked.prompt for asked in requests])
    continuation = Continuation(cache, **how)
    continuation.add(rows, list(map(Course, requests)))
    return continuation, rows


def finished(m: MBLM, make: MakeCache, asked: Request) -> Any:
    """What has become of one request alone."""
    continuation, (row,) = begun(m, make(m), [asked])
    while continuation.going:
        continuation.run()
    return continuation[row]


def one(m: MBLM, **wishes: Any) -> Request:
    return request(m, ids_of(5), **{"max_bytes": 12, "seed": 3, **SAMPLING, **wishes})


@on_every_engine
def test_rows_go_byte_by_byte_only_with_one_that_pauses(m: MBLM, make: MakeCache) -> None:
    cache = make(m)
    continuation, rows = begun(m, cache, [one(m, logits_processor=same), one(m), one(m)])
    continuation.remove(rows[1])
    with patch.object(cache, "run", wraps=cache.run) as runs:
        continuation.run(seconds=0)
        assert max(len(ran.ids) for ran in continuation[rows[2]].ran) == 1
        continuation.remove(rows[0])
        runs.reset_mock()
        continuation.run(seconds=60.0)
    assert [call.args for call in runs.call_args_list] == [([rows[2]], 60.0)]
    assert continuation[rows[2]].reason == "length"


@on_every_engine
def test_what_is_fresh_is_told_once(m: MBLM, make: MakeCache) -> None:
    for pausing in ({}, {"logits_processor": same}):
        continuation, (row,) = begun(m, make(m), [one(m, **pausing)])
        course, told = continuation[row], []
        while continuation.going:
            continuation.run(seconds=0)
            told.append(course.fresh())
        assert torch.equal(torch.cat(told), course.ids()) and course.reason == "length"
        assert len(told) >= 12 and len(course.fresh()) == 0


def test_what_another_thread_adds_while_it_is_told_is_told_next(m: MBLM) -> None:
    runs = [Ran(torch.tensor([token]), None, "time") for token in (1, 2)]

    class Growing(list[Ran]):
        def __len__(self) -> int:
            count = super().__len__()
            self.extend(runs[count:])  # between the two looks at it
            return count

    course = Course(one(m))
    course.ran = Growing(runs[:1])
    assert [course.fresh().tolist() for _ in range(3)] == [[1], [2], []]


class TestGuide:
    @on_every_engine
    @pytest.mark.parametrize("max_bytes", [0, 2, 3, 5, 6, 9])
    def test_means_what_an_automaton_in_the_engine_means(
        self, m: MBLM, make: MakeCache, max_bytes: int
    ) -> None:
        """Same bytes, same numbers, same end, also where the length does not suffice."""
        automaton = words(3, 6)
        wishes = {"max_bytes": max_bytes, "log_probs": True}
        guided = finished(m, make, one(m, constraint=Follows(automaton), **wishes))
        want = finished(m, make, one(m, constraint=InTheEngine(automaton), **wishes))
        assert torch.equal(guided.ids(), want.ids()) and guided.reason == want.reason
        torch.testing.assert_close(guided.log_probs(), want.log_probs())
        assert guided.is_matched() is want.is_matched() is (max_bytes >= 3)
        assert want.reason == ("matched" if max_bytes in (5, 6, 9) else "length")

    @on_every_engine
    def test_a_stop_string_comes_before_the_match(self, m: MBLM, make: MakeCache) -> None:
        whole = finished(m, make, one(m, constraint=Follows(words(4))))
        last = bytes(whole.ids()[-2:].tolist())
        asked = one(m, constraint=Follows(words(4)), stop=[last])
        course = finished(m, make, asked)
        assert torch.equal(course.ids(), whole.ids())
        assert course.reason == "stop" and course.is_matched()

    @on_every_engine
    def test_that_is_complete_at_the_beginning(self, m: MBLM, make: MakeCache) -> None:
        nothing = Automaton(torch.zeros(V).long(), torch.tensor([[-1]]), torch.tensor([True]))
        course = finished(m, make, one(m, constraint=Follows(nothing)))
        assert course.reason == "matched" and course.is_matched() and len(course.ids()) == 0

    @on_every_engine
    def test_that_leads_nowhere(self, m: MBLM, make: MakeCache) -> None:
        class Stuck(Follower):
            def allowed(self, left: int) -> torch.Tensor:
                return super().allowed(left) & torch.tensor(self.state < 2)

        asked = one(m, constraint=type("C", (), {"compile": lambda *_: lambda: Stuck(words(4))})())
        with pytest.raises(ValueError, match="constraint: nothing may follow"):
            finished(m, make, asked)

    @on_every_engine
    @pytest.mark.parametrize("processor", [None, same], ids=["", "processor"])
    @pytest.mark.parametrize(
        "given",
        [None, [True] * V, torch.ones(V), torch.ones(V - 1).bool(), torch.ones(1, V).bool()],
    )
    def test_that_allows_what_is_no_mask(
        self, m: MBLM, make: MakeCache, given: Any, processor: Any
    ) -> None:
        stuck = type("G", (Follower,), {"allowed": lambda *_: given})
        maker = type("C", (), {"compile": lambda *_: lambda: stuck(words(4))})
        asked = one(m, constraint=maker(), logits_processor=processor)
        with pytest.raises(TypeError, match="constraint: expected allowed to give bools"):
            finished(m, make, asked)

    @on_every_engine
    def test_that_is_none(self, m: MBLM, make: MakeCache) -> None:
        asked = one(m, constraint=type("C", (), {"compile": lambda *_: lambda: None})())
        with pytest.raises(
            TypeError, match="constraint: expected what makes a guide, it made None"
        ):
            finished(m, make, asked)

    def test_that_the_logits_leave_nothing_of(self, m: MBLM) -> None:
        with torch.no_grad():
            m.to_logits.bias[::2] = -torch.inf
        with pytest.raises(ValueError, match=r"^constraint: it leaves nothing to choose from"):
            finished(m, TorchCache, one(m, constraint=Follows(words(4))))


class TestProcessor:
    @on_every_engine
    @pytest.mark.parametrize("kind", ["sampled", "greedy"])
    def test_that_changes_nothing(self, m: MBLM, make: MakeCache, kind: str) -> None:
        wishes: dict[str, Any] = {"temperature": 0} if kind == "greedy" else {}
        wishes["log_probs"] = True
        plain = finished(m, make, one(m, **wishes))
        processed = finished(m, make, one(m, logits_processor=same, **wishes))
        assert torch.equal(processed.ids(), plain.ids())
        torch.testing.assert_close(processed.log_probs(), plain.log_probs())

    @on_every_engine
    def test_gets_the_ids_so_far_and_the_logits(self, m: MBLM, make: MakeCache) -> None:
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def spy(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            seen.append((ids, logits.clone()))
            return logits.zero_()  # its own

        course = finished(m, make, one(m, logits_processor=spy, max_bytes=6))
        so_far = torch.cat((ids_of(5), course.ids()))
        assert [ids.tolist() for ids, _ in seen] == [so_far[:n].tolist() for n in range(5, 11)]
        with torch.no_grad():
            want = m(so_far[None], return_type=MBLMReturnType.LOGITS)[0, 4:-1]
        torch.testing.assert_close(torch.stack([own for _, own in seen]), want)

    @on_every_engine
    def test_decides(self, m: MBLM, make: MakeCache) -> None:
        def count_up(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            return torch.where(torch.arange(V) == (ids[-1] + 1) % V, 0.0, -torch.inf).double()

        course = finished(m, make, one(m, logits_processor=count_up))
        first = int(ids_of(5)[-1])
        assert course.ids().tolist() == [(first + n) % V for n in range(1, 13)]

    @on_every_engine
    @pytest.mark.parametrize("kind", [Follows, InTheEngine])
    def test_together_with_a_constraint(self, m: MBLM, make: MakeCache, kind: Any) -> None:
        def prefer(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            logits[[3, 4]] += 1000  # of which one is odd
            return logits

        asked = one(m, constraint=kind(words(5)), logits_processor=prefer)
        course = finished(m, make, asked)
        assert course.ids().tolist() == [4] * 5 and course.reason == "matched"

    @on_every_engine
    @pytest.mark.parametrize(
        ("returned", "error", "message"),
        [
            (None, TypeError, "floating point logits, got NoneType"),
            (torch.zeros(V).long(), TypeError, "floating point logits, got torch.int64"),
            (torch.zeros(V - 1), ValueError, r"logits \(19,\), got \(18,\)"),
            (torch.tensor([torch.nan] + [0.0] * (V - 1)), ValueError, "NaN"),
            (torch.full((V,), -torch.inf), ValueError, "leaves nothing to choose from"),
        ],
        ids=["none", "integers", "too few", "NaN", "-inf"],
    )
    def test_that_returns_no_logits(
        self, m: MBLM, make: MakeCache, returned: Any, error: type[Exception], message: str
    ) -> None:
        asked = one(m, logits_processor=lambda ids, logits: returned)
        with pytest.raises(error, match=f"logits_processor: .*{message}"):
            finished(m, make, asked)

    @on_every_engine
    def test_that_leaves_nothing_a_constraint_allows(self, m: MBLM, make: MakeCache) -> None:
        odd = torch.where(torch.arange(V) % 2 == 1, 0.0, -torch.inf)
        for kind in (Follows, InTheEngine):
            asked = one(m, constraint=kind(words(4)), logits_processor=lambda ids, logits: odd)
            with pytest.raises(ValueError, match=r"logits_processor: .* nothing"):
                finished(m, make, asked)


class TestAnswers:
    @on_every_engine
    def test_of_rows_that_pause_are_one_choice(self, m: MBLM, make: MakeCache) -> None:
        """Whatever each pauses for, and whatever one of them is left."""
        nothing = torch.full((V,), -torch.inf)
        wishes: list[dict[str, Any]] = [
            {"logits_processor": lambda ids, logits: logits.roll(1)},
            {"constraint": Follows(words(5, 8))},
            {"constraint": Follows(words(4)), "logits_processor": lambda ids, logits: -logits},
        ]
        cache = make(m)
        stuck = one(m, logits_processor=lambda ids, own: own if len(ids) < 8 else nothing)
        requests = [one(m, **own) for own in wishes] + [stuck]
        continuation, rows = begun(m, cache, requests, isolates=True)
        with patch.object(cache, "choose", wraps=cache.choose) as choices:
            continuation.run(seconds=0)
        assert [call.args[0] for call in choices.call_args_list] == [rows]
        while continuation.going:
            continuation.run()
        for row, own in zip(rows, wishes, strict=False):
            want = finished(m, make, one(m, **own))
            assert torch.equal(continuation[row].ids(), want.ids())
            assert continuation[row].reason == want.reason
        course = continuation[rows[3]]
        assert len(course.ids()) == 3 and "leaves nothing" in str(course.error)


def fails_after(count: int, error: BaseException) -> Any:
    calls = []

    def processor(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        calls.append(ids)
        if len(calls) > count:
            raise error
        return logits

    return processor


class TestErrors:
    @on_every_engine
    @pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=repr)
    def test_lose_no_byte_and_give_numbers_back(
        self, m: MBLM, make: MakeCache, error: BaseException
    ) -> None:
        numbers = torch.Generator().manual_seed(7)
        own: dict[str, Any] = {"seed": None, "generator": numbers, "log_probs": True}
        plain = finished(m, make, one(m, seed=7, log_probs=True))
        processor = fails_after(4, error)
        continuation, (row,) = begun(m, make(m), [one(m, logits_processor=processor, **own)])
        with pytest.raises(type(error)):
            continuation.run(seconds=60)
        course = continuation[row]
        assert torch.equal(course.ids(), plain.ids()[:4])
        torch.testing.assert_close(course.log_probs(), plain.log_probs()[:4])
        again = torch.Generator().manual_seed(7)
        for _ in range(4):
            torch.empty(1, V).uniform_(generator=again)
        assert torch.equal(numbers.get_state(), again.get_state())

    @on_every_engine
    def test_within_the_cache_lose_no_byte(
        self, m: MBLM, make: MakeCache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What was chosen is found where the results of a call were never seen."""
        for pausing, name in (({}, "run"), ({"logits_processor": same}, "choose")):
            want = finished(m, make, one(m)).ids()
            cache = make(m)
            continuation, (row,) = begun(m, cache, [one(m, log_probs=True, **pausing)])
            continuation.run(seconds=0)
            call = getattr(cache, name)

            def interrupted(*args: Any, call: Any = call, **given: Any) -> None:
                call(*args, **given)
                raise KeyboardInterrupt

            monkeypatch.setattr(cache, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                continuation.run(seconds=0)
            course = continuation[row]
            assert torch.equal(course.ids(), want[:2]) and len(course.log_probs()) == 2

    @on_every_engine
    @pytest.mark.parametrize("call", ["choose", "take"])
    def test_after_a_choice_leave_no_guide_behind(
        self, m: MBLM, make: MakeCache, call: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Neither that of the row whose turn it was nor those of others."""
        cache = make(m)
        requests = [one(m, constraint=Follows(words(2, 5))) for _ in range(3)]
        continuation, rows = begun(m, cache, requests)
        continuation.run(seconds=0)
        of, name = (cache, call) if call == "choose" else (Follower, call)
        original = getattr(of, name)

        def interrupted(*args: Any, **given: Any) -> None:
            monkeypatch.setattr(of, name, original)
            original(*args, **given)
            raise KeyboardInterrupt

        monkeypatch.setattr(of, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            continuation.run(seconds=0)
        assert [len(continuation[row].ids()) for row in rows] == [2] * 3
        assert all(continuation[row].is_matched() for row in rows)

    @on_every_engine
    def test_of_memory(self, m: MBLM, make: MakeCache, monkeypatch: pytest.MonkeyPatch) -> None:
        for isolates in (False, True):
            cache = make(m)
            continuation, (row,) = begun(m, cache, [one(m)], isolates=isolates)
            ran = Ran(torch.tensor([4]), None, "memory")
            monkeypatch.setattr(cache, "run", lambda *_, ran=ran: [ran])
            with nullcontext() if isolates else pytest.raises(MemoryError):
                continuation.run()
            assert continuation[row].reason == "memory"
            assert continuation[row].ids().tolist() == [4]
