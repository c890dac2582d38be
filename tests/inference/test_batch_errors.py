"""What goes wrong with some of many prompts in one call, and harms no other."""

from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch

from mblm import MBLM
from mblm.inference import batch
from mblm.inference.cache import Ran
from mblm.inference.generation import Generation
from mblm.inference.torch_cache import TorchCache

# Contexts without an end, and one of 256 bytes that positions limit.
from tests.inference.test_batch import (
    KINDS,
    WARM,
    alone,
    every_way,
    some_prompts,
    together,
    way,  # noqa: F401  a fixture
)
from tests.inference.test_continuation import Follower, Follows, words


@pytest.fixture
def m() -> MBLM:
    torch.manual_seed(0)
    return KINDS["mamba over a transformer"]()


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

    def __init__(self, call: str) -> None:
        super().__init__(words(5))
        self.call = call

    def compile(self, num_tokens: int) -> Any:
        def make() -> Follower:
            guide = Follower(self.automaton)
            if self.call == "make":
                self.fail()
            setattr(guide, self.call, self.fail)
            return guide

        return make

    def fail(self, *_: Any) -> Any:
        raise RuntimeError(f"{self.call} fails")


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


@every_way
def test_an_interrupt_where_a_row_is_let_go_keeps_what_has_ended(m: MBLM) -> None:
    cache = batch.cache_for(m, "float32")
    with (
        patch.object(cache, "drop", side_effect=KeyboardInterrupt),
        patch.object(batch, "cache_for", lambda *_: cache),
        pytest.raises(KeyboardInterrupt) as caught,
    ):
        together(m, some_prompts(2, 5), max_bytes=3, max_rows=1, seeds=0)
    (result,) = caught.value.generations
    assert (result.finish_reason, result.error) == ("length", None) and len(result.ids) == 3


# -- Memory ----------------------------------------------------------------------------------------


class Short(TorchCache):
    """Memory for so many bytes in all rows."""

    def __init__(self, m: MBLM, room: int, error: Exception) -> None:
        super().__init__(m)
        self.room, self.error = room, error
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
            raise self.error
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


LACKS_MEMORY = MemoryError("no memory for prompts")


@pytest.mark.parametrize(
    "room, error",
    [
        *((room, LACKS_MEMORY) for room in (20, 23, 31, 47, 90, 300)),
        (23, torch.OutOfMemoryError("no memory for prompts")),
        (23, RuntimeError("DefaultCPUAllocator: can't allocate memory")),
    ],
)
def test_a_row_that_lacks_memory_waits_until_another_is_over(
    m: MBLM, room: int, error: Exception
) -> None:
    prompts = some_prompts(4, 9, 2, 9, 0, 1, 9)
    wishes = {"max_bytes": [9, 5, 9, 11, 20, 9, 3], **WARM}
    given: dict[int, bytes] = {}

    def on_bytes(index: int, new: bytes) -> None:
        given[index] = given.get(index, b"") + new

    short = Short(m, room, error)
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
        patch.object(batch, "cache_for", lambda *_: Short(m, room, LACKS_MEMORY)),
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
        (torch.tensor([1, 2]), {}, "prompts: expected a list of prompts, got Tensor"),
        ([b"\1", 1.5], {}, r"prompts\[1\]: expected"),
        ([b"\1", [1, 19]], {}, r"prompts\[1\]: token id 19"),
        ([b"\1"], {"max_rows": 0}, "max_rows: expected a number >= 1, got 0"),
        ([b"\1"], {"on_bytes": 3}, "on_bytes: expected a function, got int"),
        ([b"\1", b""], {"temperature": [1, -1]}, r"prompts\[1\]: temperature: expected"),
        ([b"\1"], {"seeds": [1, 2]}, "seeds: expected one value or a list of 1"),
        ([b"\1"], {"stop": ["x", [b"x"]]}, "stop: expected one value or a list of 1"),
        ([b"\1"], {"constraint": [Undecodable()]}, r"prompts\[0\]: .*invalid start byte"),
        ([b"\1"], {"weights": "int3"}, "weights"),
        (iter([b"\1"]), {"max_bytes": -1}, "^max_bytes: expected"),
        ([], {"colour": 1}, "unexpected keyword argument 'colour'"),
        ([], {"seed": 1}, r"generate_batch\(\) got an unexpected .* 'seed'"),
        ([], {"generator": torch.Generator()}, "unexpected keyword argument 'generator'"),
        ([b"\1" * 250], {"max_bytes": 7}, r"prompts\[0\]: max_bytes: 7 bytes after a prompt"),
        ([b"", b"\1" * 257], {}, r"prompts\[1\]: 257 bytes exceed the context of 256"),
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
    with pytest.raises(ValueError, match=r"prompts\[1\]: token id 19") as caught:
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
