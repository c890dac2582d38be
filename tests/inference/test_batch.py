"""Many prompts in one call: each as if alone, whatever else runs; and what goes wrong with some."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mblm import MBLM
from mblm.inference import batch
from mblm.inference.cache import Ran
from mblm.inference.generation import Generation, generation_of
from mblm.inference.torch_cache import TorchCache
from tests.decoding import CLOSE, in_pytorch
from tests.inference.caches import after as joined
from tests.inference.caches import build, whole_logits
from tests.inference.test_continuation import Follower, Follows, InTheEngine, words
from tests.native import needs_native

# Contexts without an end, and one of 256 bytes that positions limit.
KINDS = {
    "transformers": lambda: build("transformer", "transformer", seq_lens=(64, 4)),
    "mamba over a transformer": lambda: build("mamba2", "transformer", seq_lens=(64, 4)),
    "three stages": lambda: build("mamba1", "transformer", "mamba2", seq_lens=(16, 4, 3)),
    "one stage": lambda: build("transformer", seq_lens=(256,)),
    "a context of 256": lambda: build("fixed", "mamba1", seq_lens=(64, 4)),
    "a stage of one's own": lambda: build("lstm with a state", "transformer", seq_lens=(64, 4)),
}
WARM = {"temperature": 1.5, "top_p": 0.95}


@contextmanager
def every_session_in_pytorch() -> Iterator[None]:
    with in_pytorch(), patch.object(batch, "cache_for", lambda model, weights: TorchCache(model)):
        yield


@pytest.fixture(params=["native", "torch"])
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each engine."""
    if request.param == "native":
        yield
    else:
        with every_session_in_pytorch():
            yield


every_way = pytest.mark.usefixtures("way")


@pytest.fixture
def m() -> MBLM:
    torch.manual_seed(0)
    return KINDS["mamba over a transformer"]()


def alone(m: MBLM, prompt: bytes, seed: int, **wishes: Any) -> list[int]:
    """What `generate` gives after a prompt."""
    ids = torch.tensor(list(prompt), dtype=torch.long)
    if "max_bytes" in wishes:
        wishes["num_tokens_to_generate"] = wishes.pop("max_bytes")
    generated = m.generate(ids, seed=seed, enable_progress=False, **wishes)
    return generated[len(prompt) :].tolist()


def together(m: MBLM, prompts: Any, **wishes: Any) -> list[Generation]:
    return m.generate_batch(prompts, enable_progress=False, **wishes)


def some_prompts(*lengths: int) -> list[bytes]:
    numbers = np.random.default_rng(3)
    return [numbers.integers(0, 18, length, dtype=np.uint8).tobytes() for length in lengths]


def no_zero(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """A logits processor."""
    logits[0] = -100
    return logits


# -- As if alone -----------------------------------------------------------------------------------

REQUESTS = st.fixed_dictionaries(
    {
        "length": st.one_of(st.integers(0, 12), st.integers(0, 200)),
        "seed": st.integers(0, 9),
        "max_bytes": st.integers(0, 30),
        "temperature": st.sampled_from([0.0, 0.7, 1.5]),
        "top_p": st.sampled_from([None, 0.8, 1.0]),
        "stop": st.lists(st.binary(min_size=1, max_size=2).map(lambda s: bytes(b % 18 for b in s))),
    }
)


def check_any_schedule(data: st.DataObject, weights: str = "float32") -> None:
    torch.manual_seed(data.draw(st.integers(0, 3), label="model"))
    m = KINDS[data.draw(st.sampled_from(sorted(KINDS)), label="kind")]()
    requests = data.draw(st.lists(REQUESTS, max_size=9), label="requests")
    prompts = some_prompts(*(request.pop("length") for request in requests))
    names = ("max_bytes", "temperature", "top_p", "stop")
    wishes = {name: [request[name] for request in requests] for name in names}
    wishes["stop"] = [list(stop) for stop in wishes["stop"]] if any(wishes["stop"]) else ()
    given: dict[int, bytes] = {}

    def on_bytes(index: int, new: bytes) -> None:
        given[index] = given.get(index, b"") + new

    with patch.object(batch, "_SECONDS", data.draw(st.sampled_from([0, 1e-4, 1e-3, 0.02]))):
        results = together(
            m,
            prompts if data.draw(st.booleans(), label="list") else iter(prompts),
            seeds=[request["seed"] for request in requests],
            max_rows=data.draw(st.integers(1, 5), label="rows"),
            on_bytes=on_bytes,
            weights=weights,
            **wishes,
        )
    for index, (request, prompt, result) in enumerate(zip(requests, prompts, results, strict=True)):
        assert result.prompt.tolist() == list(prompt)
        assert result.ids.tolist() == alone(m, prompt, weights=weights, **request)
        assert result.data == given.get(index, b"")
        assert result.seed == request["seed"] and result.error is None
        ended = any(result.data.endswith(s) for s in request["stop"]) and len(result.ids) > 0
        assert result.finish_reason == ("stop" if ended else "length")


@needs_native
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_any_schedule(weights: str, data: st.DataObject) -> None:
    check_any_schedule(data, weights)


@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_any_schedule_in_pytorch(data: st.DataObject) -> None:
    with every_session_in_pytorch():
        check_any_schedule(data)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(data=st.data(), native=st.booleans())
def test_hundreds_of_schedules(data: st.DataObject, native: bool) -> None:
    if native:
        check_any_schedule(data, data.draw(st.sampled_from(["float32", "bfloat16", "int8"])))
    else:
        with every_session_in_pytorch():
            check_any_schedule(data)


@needs_native
def test_the_company_changes_no_bit(m: MBLM) -> None:
    prompts = some_prompts(0, 7, 130, 3, 18)
    wishes = {"max_bytes": 20, "log_probs": True, **WARM}
    for prompt, seed, result in zip(
        prompts, range(5), together(m, prompts, seeds=range(5), **wishes), strict=True
    ):
        (single,) = together(m, [prompt], seeds=seed, **wishes)
        assert torch.equal(result.ids, single.ids)
        assert torch.equal(result.log_probs, single.log_probs)


@every_way
def test_log_probs_are_those_of_a_pass_over_all(m: MBLM) -> None:
    prompts = some_prompts(0, 9, 30)
    results = together(m, prompts, max_bytes=6, log_probs=[True, False, True], **WARM)
    assert results[1].log_probs is None
    for index in (0, 2):
        ids = results[index].ids
        so_far = torch.cat((results[index].prompt, ids))
        begin = len(prompts[index])
        want = [whole_logits(m, so_far[: begin + n]).log_softmax(-1)[ids[n]] for n in range(6)]
        torch.testing.assert_close(results[index].log_probs, torch.stack(want), **CLOSE)


@every_way
def test_constraints_and_processors_of_some_prompts(m: MBLM) -> None:
    prompts = some_prompts(2, 5, 0, 3)
    even = words(2, 4)
    constraints = [InTheEngine(even), None, Follows(even), None]
    processors = [None, no_zero, no_zero, None]
    wishes = {"constraint": constraints, "logits_processor": processors}
    with patch.object(batch, "_SECONDS", 0):
        results = together(m, prompts, max_bytes=9, max_rows=3, seeds=range(4), **wishes, **WARM)
    for index, result in enumerate(results):
        own = {name: values[index] for name, values in wishes.items()}
        assert result.ids.tolist() == alone(m, prompts[index], index, max_bytes=9, **own, **WARM)
        assert result.is_matched is (None if constraints[index] is None else True)
        assert result.finish_reason == ("length" if constraints[index] is None else "matched")
    unfinished = together(m, prompts[:2], max_bytes=1, constraint=[Follows(even), None])
    assert [r.is_matched for r in unfinished] == [False, None]


# -- Rows and prompts ------------------------------------------------------------------------------


@every_way
def test_prompts_are_read_as_rows_come_free(m: MBLM) -> None:
    read: list[int] = []
    done: list[int] = []

    def prompts() -> Iterator[bytes]:
        for index in range(9):
            assert index - len(done) <= 2, "of three rows, one is free"
            read.append(index)
            yield bytes([index])

    real = generation_of

    def noted(*arguments: Any) -> Generation:
        done.append(1)
        return real(*arguments)

    with patch.object(batch, "generation_of", noted):
        results = together(m, prompts(), max_bytes=4, max_rows=3)
    assert read == list(range(9))
    assert [result.prompt.tolist() for result in results] == [[index] for index in range(9)]


@every_way
def test_a_row_comes_when_no_other_has_to_wait_for_it(m: MBLM) -> None:
    """At the end of a patch, rows wait for those that are within theirs."""
    cache = batch.cache_for(m, "float32")
    real, rows, late = cache.feed, [], []

    def to_go(length: int) -> int:
        return -(length - 1) % 4

    def feed(new: Sequence[int], ids: Sequence[torch.Tensor]) -> None:
        going = [row for row in rows if row in batches[0]._going]
        if going:
            others = max(map(to_go, cache.lengths(going)))
            late.append(max(to_go(len(part)) for part in ids) > others)
        rows.extend(new)
        real(new, ids)

    batches: list[batch.Batch] = []
    begin = batch.Batch.__init__

    def noted(self: batch.Batch, *arguments: Any) -> None:
        batches.append(self)
        begin(self, *arguments)

    with (
        patch.object(cache, "feed", feed),
        patch.object(batch, "cache_for", lambda *_: cache),
        patch.object(batch, "_SECONDS", 0),
        patch.object(batch.Batch, "__init__", noted),
    ):
        prompts = some_prompts(*range(5, 25))
        together(m, prompts, max_bytes=[n % 7 + 3 for n in range(20)], max_rows=3)
    assert len(late) > 5 and not any(late)


@every_way
@pytest.mark.parametrize("rounds", [1, 2, 3, 5])
def test_a_free_row_waits_for_a_patch_at_most(m: MBLM, rounds: int) -> None:
    """However many bytes of a patch, here of 4, a run has time for."""
    cache = batch.cache_for(m, "float32")
    real, rows_of_runs = cache.run, []

    def run(rows: Sequence[int], seconds: float = 0) -> list[Ran]:
        rows_of_runs.append(len(rows))
        ran = real(rows, 0)
        for _ in range(rounds - 1):
            ran = [joined(a, b) for a, b in zip(ran, real(rows, 0), strict=True)]
        return ran

    prompts = some_prompts(8, *range(5, 25))
    with patch.object(cache, "run", run), patch.object(batch, "cache_for", lambda *_: cache):
        together(m, prompts, max_bytes=[200] + [5] * 20, max_rows=2)
    full = [rows == 2 for rows in rows_of_runs]
    last = len(full) - full[::-1].index(True)  # from there on, the first prompt is alone
    alone = max(len(runs) for runs in "".join("x" if f else "." for f in full[:last]).split("x"))
    assert alone * rounds <= max(4, rounds)


def test_no_prompts() -> None:
    assert together(build("mamba1"), []) == together(build("mamba1"), iter([])) == []


def test_prompts_of_every_kind(m: MBLM) -> None:
    kinds = ["\x01\x02", b"\x01\x02", torch.tensor([[1, 2]]), np.array([1, 2]), [1, 2], (1, 2)]
    for result in together(m, kinds, max_bytes=5):
        assert result.prompt.tolist() == [1, 2]
        assert result.ids.tolist() == alone(m, b"\x01\x02", 0, max_bytes=5)
    equal = together(m, torch.tensor([[1, 2], [3, 4]]), max_bytes=2)
    assert [result.prompt.tolist() for result in equal] == [[1, 2], [3, 4]]


def test_more_rows_than_prompts_and_one_row_are_the_same(m: MBLM) -> None:
    prompts = some_prompts(5, 0, 40)
    many, one = (together(m, prompts, max_bytes=9, seeds=1, max_rows=n, **WARM) for n in (64, 1))
    assert [r.ids.tolist() for r in many] == [r.ids.tolist() for r in one]


def test_the_default_is_to_go_on_to_the_end_of_the_context() -> None:
    m = KINDS["a context of 256"]()
    full, one_left, empty = together(m, some_prompts(256, 255, 0))
    assert [len(r.ids) for r in (full, one_left, empty)] == [0, 1, 256]


def test_results_are_of_use_after_inference_mode(m: MBLM) -> None:
    with torch.inference_mode():
        (result,) = together(m, [b"\1"], max_bytes=3, log_probs=True)
    for tensor in (result.prompt, result.ids, result.log_probs):
        assert not tensor.is_inference()


# -- Seeds -----------------------------------------------------------------------------------------


def test_one_seed_is_that_of_every_prompt(m: MBLM) -> None:
    first, second = together(m, [b"\1", b"\1"], max_bytes=12, seeds=7, **WARM)
    assert first.ids.tolist() == second.ids.tolist() == alone(m, b"\1", 7, max_bytes=12, **WARM)


def test_seeds_that_are_drawn_follow_from_torchs_and_the_prompts_number(m: MBLM) -> None:
    prompts = some_prompts(3, 3, 3, 3)
    wishes = {"max_bytes": [2, 12, 3, 8], **WARM}
    torch.manual_seed(5)
    wide = together(m, prompts, **wishes)
    torch.manual_seed(5)
    narrow = together(m, prompts, max_rows=1, **wishes)
    assert [r.seed for r in wide] == [wide[0].seed + n for n in range(4)]
    assert [(r.seed, r.ids.tolist()) for r in wide] == [(r.seed, r.ids.tolist()) for r in narrow]
    again = together(m, prompts, seeds=[r.seed for r in wide], **wishes)
    assert [r.ids.tolist() for r in again] == [r.ids.tolist() for r in wide]
    assert together(m, prompts, **wishes)[0].seed != wide[0].seed


def test_a_prompt_without_a_seed_does_not_touch_the_others(m: MBLM) -> None:
    prompts = some_prompts(3, 4, 5)
    torch.manual_seed(5)
    results = together(m, prompts, max_bytes=9, seeds=[42, None, None], **WARM)
    torch.manual_seed(5)
    drawn = together(m, prompts, max_bytes=9, max_rows=1, **WARM)
    assert results[0].ids.tolist() == alone(m, prompts[0], 42, max_bytes=9, **WARM)
    for index in (1, 2):
        assert results[index].seed == drawn[index].seed
        assert results[index].ids.tolist() == drawn[index].ids.tolist()


def test_the_order_of_prompts_changes_nothing(m: MBLM) -> None:
    pairs = list(zip(some_prompts(3, 0, 40, 5, 9), range(5), strict=True))
    results = []
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 1, 3]):
        prompts, seeds = zip(*(pairs[n] for n in order), strict=True)
        found = together(m, prompts, seeds=seeds, max_rows=2, max_bytes=12, **WARM)
        results.append({r.seed: r.ids.tolist() for r in found})
    assert results[0] == results[1]


@needs_native
def test_copies_of_a_prompt_have_the_same_bits(m: MBLM) -> None:
    results = together(
        m, [b"\1\2\3"] * 40, max_rows=16, max_bytes=25, log_probs=True, temperature=0
    )
    for result in results:
        assert torch.equal(result.ids, results[0].ids)
        assert torch.equal(result.log_probs, results[0].log_probs)


def test_torchs_generator_gives_one_number(m: MBLM) -> None:
    torch.manual_seed(5)
    together(m, some_prompts(3, 4), max_bytes=5, **WARM)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    torch.randint(2**62, ())
    assert torch.equal(torch.get_rng_state(), after)


# -- Callbacks -------------------------------------------------------------------------------------


@every_way
def test_a_callback_that_raises_ends_its_row_alone(m: MBLM) -> None:
    prompts = some_prompts(2, 3, 4, 5)
    got: dict[int, bytes] = {}

    def on_bytes(index: int, new: bytes) -> None:
        got[index] = got.get(index, b"") + new
        if index in (1, 2):
            raise BrokenPipeError(f"of {index}")

    with patch.object(batch, "_SECONDS", 0), pytest.raises(BrokenPipeError, match="of 1") as caught:
        together(m, prompts, max_bytes=30, seeds=range(4), max_rows=2, on_bytes=on_bytes, **WARM)
    results = caught.value.generations
    assert [r.finish_reason for r in results] == ["length", "error", "error", "length"]
    for index in (0, 3):
        assert results[index].ids.tolist() == alone(m, prompts[index], index, max_bytes=30, **WARM)
    for index in (1, 2):
        assert results[index].data == got[index] and 0 < len(got[index]) < 30
        assert isinstance(results[index].error, BrokenPipeError)


@every_way
def test_results_are_told_as_they_come(m: MBLM) -> None:
    told: list[tuple[int, Generation]] = []
    prompts = iter([b"\1", [19], b"\2", b"\3"])
    with patch.object(batch, "_SECONDS", 0), pytest.raises(ValueError, match="prompts") as caught:
        together(
            m,
            prompts,
            max_bytes=[9, 1, 3, 1],
            max_rows=2,
            on_result=lambda index, result: told.append((index, result)),
        )
    assert [index for index, _ in told] == [1, 2, 3, 0]
    assert [result for _, result in sorted(told)] == caught.value.generations


def test_results_that_nobody_takes_end_all(m: MBLM) -> None:
    def on_result(index: int, result: Generation) -> None:
        raise OSError("the disk is full")

    with patch.object(batch, "_SECONDS", 0), pytest.raises(OSError, match="full") as caught:
        together(m, some_prompts(2, 3, 4), max_bytes=[2, 9, 9], max_rows=2, on_result=on_result)
    assert [r.finish_reason for r in caught.value.generations] == ["length", "error"]
    assert [len(r.ids) for r in caught.value.generations] == [2, 2]


def test_a_callback_may_generate(m: MBLM) -> None:
    inner: list[int] = []

    def on_bytes(index: int, new: bytes) -> None:
        inner.extend(together(m, [new], max_bytes=1)[0].ids.tolist())

    results = together(m, some_prompts(2, 3), max_bytes=5, on_bytes=on_bytes)
    assert inner and [len(r.ids) for r in results] == [5, 5]


def test_a_processor_that_raises_ends_its_row_alone(m: MBLM) -> None:
    def at_the_third(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if len(ids) == 5:
            raise LookupError("the third")
        return logits

    prompts = some_prompts(2, 3)
    with pytest.raises(LookupError, match="the third") as caught:
        together(m, prompts, max_bytes=8, seeds=0, logits_processor=[at_the_third, None], **WARM)
    failed, other = caught.value.generations
    assert failed.error is caught.value and failed.finish_reason == "error"
    assert failed.ids.tolist() == alone(m, prompts[0], 0, max_bytes=8, **WARM)[:3]
    assert other.ids.tolist() == alone(m, prompts[1], 0, max_bytes=8, **WARM)


# -- Interrupts ------------------------------------------------------------------------------------


class Fails(Follows):
    """A constraint whose guide fails at one of the calls; at "make" there is none."""

    def __init__(self, call: str, failure: Any = None) -> None:
        super().__init__(words(5))
        self.call, self.failure = call, failure

    def compile(self, num_tokens: int) -> Any:
        def make() -> Follower:
            guide = Follower(self.automaton)
            if self.call == "make":
                self.fail()
            setattr(guide, self.call, self.fail)
            return guide

        return make

    def fail(self, *_: Any) -> Any:
        if self.failure is None:
            raise RuntimeError(f"{self.call} fails")
        return self.failure


@every_way
@pytest.mark.parametrize("call", ["make", "allowed", "take", "is_complete", "accepts"])
def test_a_guide_that_raises_ends_its_row_alone(m: MBLM, call: str) -> None:
    constraints = [Follows(words(5)), Fails(call), None, Fails(call)]
    with pytest.raises(RuntimeError, match=f"{call} fails") as raised:
        together(m, some_prompts(4, 5, 6, 7), constraint=constraints, max_bytes=5, max_rows=3)
    results = raised.value.generations  # type: ignore[attr-defined]
    reasons = ["matched", "error", "length", "error"]
    assert [result.finish_reason for result in results] == reasons
    count = {"make": 0, "allowed": 0, "take": 1, "is_complete": 1, "accepts": 5}[call]
    assert [len(result.ids) for result in results] == [5, count, 5, count]


@every_way
def test_a_guide_that_allows_no_tokens_ends_its_row_alone(m: MBLM) -> None:
    constraints = [Follows(words(5)), Fails("allowed", torch.ones(3, dtype=torch.bool))]
    with pytest.raises(ValueError, match=r"guide to allow \(19,\) bool, got \(3,\)") as raised:
        together(m, some_prompts(4, 5), constraint=constraints, max_bytes=5)
    results = raised.value.generations  # type: ignore[attr-defined]
    assert [result.finish_reason for result in results] == ["matched", "error"]


@every_way
@pytest.mark.parametrize("call", range(1, 8))
def test_an_interrupt_keeps_what_was_chosen(m: MBLM, call: int) -> None:
    """Raised within a call, or after it, when nobody has seen what it did."""
    prompts = some_prompts(2, 0, 9)
    cache = batch.cache_for(m, "float32")
    real, calls = cache.run, [0]

    def run(*arguments: Any) -> list[Ran]:
        ran = real(*arguments)
        calls[0] += 1
        if calls[0] == call:
            raise KeyboardInterrupt
        return ran

    with (
        patch.object(cache, "run", run),
        patch.object(batch, "cache_for", lambda *_: cache),
        patch.object(batch, "_SECONDS", 0),
        pytest.raises(KeyboardInterrupt) as caught,
    ):
        together(
            m, prompts, max_bytes=[3, 30, 30], max_rows=2, seeds=range(3), log_probs=True, **WARM
        )
    results = caught.value.generations
    assert sum(len(r.ids) for r in results) >= call
    assert len(results) == (2 if call < 4 else 3)
    for index, result in enumerate(results):
        whole = alone(m, prompts[index], index, max_bytes=30, **WARM)
        assert result.ids.tolist() == whole[: len(result.ids)]
        assert len(result.log_probs) == len(result.ids)
        is_over = result.finish_reason == "length"
        assert len(result.ids) == 3 if is_over else isinstance(result.error, KeyboardInterrupt)


def test_an_interrupt_by_a_callback_ends_all(m: MBLM) -> None:
    def on_bytes(index: int, new: bytes) -> None:
        raise KeyboardInterrupt

    with patch.object(batch, "_SECONDS", 0), pytest.raises(KeyboardInterrupt) as caught:
        together(m, some_prompts(2, 3, 4), max_bytes=9, max_rows=2, on_bytes=on_bytes)
    assert [len(r.ids) for r in caught.value.generations] == [1, 1]


# -- Memory ----------------------------------------------------------------------------------------


class Short(TorchCache):
    """Memory for so many bytes in all rows."""

    def __init__(self, m: MBLM, room: int) -> None:
        super().__init__(m)
        self.room = room
        self.rows: set[int] = set()
        self.most = 0

    def add(self, count: int = 1) -> list[int]:
        rows = super().add(count)
        self.rows |= set(rows)
        return rows

    def drop(self, rows: Sequence[int]) -> None:
        super().drop(rows)
        self.rows -= set(rows)

    def used(self) -> int:
        return sum(self.lengths(sorted(self.rows)))

    def feed(self, rows: Sequence[int], ids: Sequence[torch.Tensor]) -> None:
        if self.used() + sum(map(len, ids)) > self.room:
            raise MemoryError("no memory for prompts")
        super().feed(rows, ids)

    def run(self, rows: Sequence[int], seconds: float = 0.02, drafts: Any = None) -> list[Ran]:
        self.most = max(self.most, len(rows))
        done: dict[int, Ran] = {}
        for row in rows:
            if self.used() < self.room:
                (done[row],) = super().run([row], 0)
            else:
                nothing = torch.empty(0, dtype=torch.long)
                done[row] = Ran(nothing, None, "memory")
        return [done[row] for row in rows]


@pytest.mark.parametrize("room", [20, 23, 31, 47, 90, 300])
def test_a_row_that_lacks_memory_waits_until_another_is_over(m: MBLM, room: int) -> None:
    prompts = some_prompts(4, 9, 2, 9, 0, 1, 9)
    wishes = {"max_bytes": [9, 5, 9, 11, 20, 9, 3], **WARM}
    given: dict[int, bytes] = {}

    def on_bytes(index: int, new: bytes) -> None:
        given[index] = given.get(index, b"") + new

    short = Short(m, room)
    with patch.object(batch, "cache_for", lambda *_: short):
        results = together(m, prompts, seeds=range(7), on_bytes=on_bytes, **wishes)
    assert not short.rows
    assert short.most == {20: 3, 300: 7}.get(room, short.most)
    plenty = together(m, prompts, seeds=range(7), **wishes)
    assert [r.ids.tolist() for r in results] == [r.ids.tolist() for r in plenty]
    assert [given[index] for index in range(7)] == [r.data for r in results]


@pytest.mark.parametrize("room", [8, 12])
def test_no_memory_for_a_row_alone(m: MBLM, room: int) -> None:
    """For its prompt, or for the bytes after it."""
    prompts = some_prompts(4, 9, 2)
    with (
        patch.object(batch, "cache_for", lambda *_: Short(m, room)),
        pytest.raises(MemoryError, match="no memory for") as caught,
    ):
        together(m, prompts, max_bytes=4)
    results = caught.value.generations
    assert [r.finish_reason for r in results] == ["length", "memory", "length"]
    assert len(results[1].ids) == max(0, room - 9)


# -- Bad input -------------------------------------------------------------------------------------


class Undecodable:
    """A constraint that raises an error which takes more than a message."""

    def compile(self, num_tokens: int) -> Any:
        return b"\xff".decode()


@pytest.mark.parametrize(
    ("prompts", "wishes", "message"),
    [
        (b"one", {}, "prompts: expected a list of prompts, got bytes"),
        ("one", {}, "prompts: expected a list of prompts, got str"),
        (torch.tensor([1, 2]), {}, "prompts: expected a list of prompts, got Tensor"),
        (None, {}, "prompts: expected a list of prompts, got NoneType"),
        ([b"\1", 1.5], {}, r"prompts\[1\]: prompt: expected"),
        ([b"\1", [1, 19]], {}, r"prompts\[1\]: prompt: .*19"),
        ([b"\1"], {"max_rows": 0}, "max_rows: expected a number >= 1, got 0"),
        ([b"\1"], {"max_rows": 1.5}, "max_rows"),
        ([b"\1"], {"on_bytes": 3}, "on_bytes: expected a function, got int"),
        ([b"\1"], {"on_result": 3}, "on_result: expected a function, got int"),
        ([b"\1"], {"temperature": -1}, r"prompts\[0\]: temperature: expected"),
        ([b"\1", b""], {"temperature": [1, -1]}, r"prompts\[1\]: temperature: expected"),
        ([b"\1", b""], {"temperature": [1]}, "temperature: expected one value or a list of 2"),
        ([b"\1"], {"seeds": [1, 2]}, "seeds: expected one value or a list of 1"),
        ([b"\1"], {"seeds": "x"}, r"prompts\[0\]: seeds: expected"),
        ([b"\1"], {"stop": ["x", [b"x"]]}, "stop: expected one value or a list of 1"),
        ([b"\1"], {"constraint": Undecodable()}, r"prompts\[0\]: .*invalid start byte"),
        ([b"\1", b""], {"stop": [[b"x"]]}, "stop: expected one value or a list of 2"),
        ([b"\1"], {"stop": [[b""]]}, r"prompts\[0\]: stop: expected"),
        ([b"\1"], {"weights": "int3"}, "weights"),
        ([b"\1"], {"max_bytes": -1}, r"prompts\[0\]: max_bytes: expected"),
        ([b"\1" * 250], {"max_bytes": 7}, r"prompts\[0\]: max_bytes: 7 bytes after a prompt"),
        ([b"", b"\1" * 257], {}, r"prompts\[1\]: prompt: 257 bytes exceed the context of 256"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    prompts: Any, wishes: dict[str, Any], message: str
) -> None:
    m = KINDS["a context of 256"]()
    with (
        patch.object(batch.Batch, "run", side_effect=AssertionError("it runs")),
        pytest.raises((TypeError, ValueError), match=message),
    ):
        together(m, prompts, **wishes)


def test_an_interrupt_before_anything_runs_has_no_results(m: MBLM) -> None:
    with (
        patch.object(batch, "cache_for", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt) as caught,
    ):
        together(m, [b"\1"])
    assert caught.value.generations == []


def test_a_bad_prompt_of_an_iterator_harms_no_other(m: MBLM) -> None:
    with pytest.raises(ValueError, match=r"prompts\[1\]: prompt: .*19") as caught:
        together(m, iter([b"\1", [19], b"\2"]), max_bytes=4, max_rows=1, seeds=0)
    first, bad, last = caught.value.generations
    assert bad.finish_reason == "error" and isinstance(bad.error, ValueError) and not len(bad.ids)
    assert first.ids.tolist() == alone(m, b"\1", 0, max_bytes=4)
    assert last.ids.tolist() == alone(m, b"\2", 0, max_bytes=4)


def test_an_iterator_that_raises_harms_no_prompt_before(m: MBLM) -> None:
    def prompts() -> Iterator[bytes]:
        yield b"\1"
        yield b"\2"
        raise OSError("the file is gone")

    with pytest.raises(OSError, match="the file is gone") as caught:
        together(m, prompts(), max_bytes=4, seeds=[3, 4, 5])
    first, second = caught.value.generations
    assert first.ids.tolist() == alone(m, b"\1", 3, max_bytes=4)
    assert second.ids.tolist() == alone(m, b"\2", 4, max_bytes=4)


def test_a_list_that_is_over_before_an_iterator_is_said(m: MBLM) -> None:
    with pytest.raises(ValueError, match=r"seeds: none is left for prompts\[1\]") as caught:
        together(m, iter([b"\1", b"\2"]), max_bytes=4, seeds=[3])
    assert [r.finish_reason for r in caught.value.generations] == ["length"]
