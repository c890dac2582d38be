"""The compiled cache: bits that do not depend on neighbors, threads or cuts; rows in threads."""

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mblm import MBLM
from mblm.inference.automaton import Automaton
from mblm.inference.cache import Row
from mblm.inference.native_cache import NATIVE_POSITIONS, NativeCache
from mblm.inference.plan import Plan
from mblm.inference.torch_cache import TorchCache
from mblm.inference.weights import weights_of
from mblm.ops import _native
from tests.inference.caches import build, fed, ids_of, run_out, seeded

pytestmark = pytest.mark.skipif(not _native.is_loaded(), reason="compiled code is tested")

WEIGHTS = ["float32", "bfloat16", "int8"]
KINDS = [
    ("transformer",),
    ("mamba1", "mamba2"),
    ("fixed", "mamba1"),
    ("mamba2", "transformer", "transformer"),
    ("lstm with a state", "transformer"),
    ("transformer", "lstm", "mamba1"),
]


def small(*kinds: str, **fields: Any) -> MBLM:
    return build(*kinds, seq_lens=(12, 4, 3)[: len(kinds)], **fields)


def worth_threads(*kinds: str) -> MBLM:
    """A model of which two rows are worth more than one thread."""
    return small(*kinds, hidden_dims=[8] * (len(kinds) - 1) + [128])


def alone(m: MBLM, weights: str, ids: torch.Tensor, plan: Plan | None) -> list[torch.Tensor]:
    """What a row that has no others beside it is given, and its logits."""
    cache = NativeCache(m, weights)
    row = cache.add()
    for part in ids.split(20):  # no more, for which PyTorch would be quicker
        cache.feed(row, [part])
    chosen = []
    if plan is not None:
        cache.begin(row, [plan])
        chosen = [run_out(cache, row)[0].ids]
    return [*chosen, cache.logits(row)[0]]


@pytest.mark.parametrize("kinds", KINDS, ids=" above ".join)
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_a_row_has_the_bits_that_it_has_alone(kinds: tuple[str, ...], data: st.DataObject) -> None:
    """Whatever runs beside it, in how many threads, and however its bytes were cut."""
    m = worth_threads(*kinds)
    weights = data.draw(st.sampled_from(WEIGHTS), label="weights")
    cache = NativeCache(m, weights)
    rows: dict[Row, torch.Tensor] = dict(zip(cache.add(3), [ids_of(0)] * 3, strict=True))
    torch.set_num_threads(data.draw(st.integers(1, 3), label="threads"))
    try:
        for step in range(data.draw(st.integers(1, 5), label="steps")):
            some = data.draw(st.lists(st.sampled_from(list(rows)), unique=True), label="rows")
            what = data.draw(st.sampled_from(["feed", "run", "copy", "save", "drop"]), label="what")
            if what == "feed":
                parts = [ids_of(data.draw(st.integers(0, 9)), step) for _ in some]
                cache.feed(some, parts)
                rows |= {r: torch.cat((rows[r], p)) for r, p in zip(some, parts, strict=True)}
            elif what == "run":
                plans = [Plan(5, draws=seeded(step, 1), top_k=12) for _ in some]
                cache.begin(some, plans)
                for row, ran in zip(some, run_out(cache, some), strict=True):
                    plan = Plan(5, draws=seeded(step, 1), top_k=12)
                    assert ran.ids.tolist() == alone(m, weights, rows[row], plan)[0].tolist()
                    rows[row] = torch.cat((rows[row], ran.ids))
            elif what == "copy":
                rows |= dict(zip(cache.copy(some), (rows[row] for row in some), strict=True))
            elif what == "save":
                for row in some:
                    other = data.draw(st.sampled_from(list(rows)))
                    cache.set_state(other, cache.state(row))
                    rows[other] = rows[row]
            else:
                cache.drop(some[:1])
                rows = {row: ids for row, ids in rows.items() if row not in some[:1]}
                rows |= {row: ids_of(0) for row in cache.add()}
        for row, logits in zip(rows, cache.logits(list(rows)), strict=True):
            (expected,) = alone(m, weights, rows[row], None)
            assert torch.equal(logits, expected)
    finally:
        torch.set_num_threads(1)


def test_rows_of_a_hosted_stage_have_the_bits_that_they_have_alone() -> None:
    """PyTorch's products of two rows have other last bits than those of one."""
    m = worth_threads("lstm", "mamba1")
    cache = NativeCache(m)
    parts = ids_of(14), ids_of(14, seed=1)
    rows = fed(cache, *parts)
    for logits, ids in zip(cache.logits(rows), parts, strict=True):
        assert torch.equal(logits, alone(m, "float32", ids, None)[0])


def test_a_state_goes_from_engine_to_engine() -> None:
    m: Any = small("mamba1", "transformer")
    native, reference = NativeCache(m), TorchCache(m)
    (one,) = fed(native, ids_of(14))
    (two,) = reference.add()
    reference.set_state(two, native.state(one))
    (three,) = native.add()
    native.set_state(three, reference.state(two))
    for cache, row in ((native, one), (reference, two), (native, three)):
        cache.feed([row], [ids_of(5, seed=1)])
    expected = native.logits([one])
    torch.testing.assert_close(reference.logits([two]), expected, atol=3e-5, rtol=1e-4)
    torch.testing.assert_close(native.logits([three]), expected, atol=3e-5, rtol=1e-4)


def test_threads_run_rows_of_their_own() -> None:
    m = small("transformer", "mamba2")
    cache = NativeCache(m)
    rows = fed(cache, *[ids_of(length) for length in (3, 9, 17)])
    results: dict[int, list[int]] = {}

    def run(index: int) -> None:
        cache.begin([rows[index]], [Plan(40, draws=seeded(index, 1), top_k=9)])
        results[index] = run_out(cache, [rows[index]])[0].ids.tolist()

    workers = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for index, length in enumerate((3, 9, 17)):
        plan = Plan(40, draws=seeded(index, 1), top_k=9)
        expected = alone(m, "float32", ids_of(length), plan)[0].tolist()
        assert results[index] == expected


class _Waiting(nn.Module):
    """A stage that lets a test do something while it is stepped."""

    def __init__(self) -> None:
        super().__init__()
        self.meanwhile: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.meanwhile is not None:
            self.meanwhile()
        return x


def waiting_cache() -> tuple[NativeCache, _Waiting]:
    m = small("transformer", "mamba2")
    stage = _Waiting()
    m.stage_models[0] = stage
    return NativeCache(m), stage


def test_a_hosted_stage_that_fails_changes_nothing() -> None:
    cache, stage = waiting_cache()
    (row,) = fed(cache, ids_of(6))
    before = cache.logits([row])

    def fail() -> None:
        raise RuntimeError("in the stage")

    stage.meanwhile = fail
    with pytest.raises(RuntimeError, match="in the stage"):
        cache.feed([row], [ids_of(9)])
    assert cache.lengths([row]) == [6] and torch.equal(cache.logits([row]), before)
    cache.begin([row], [Plan(9)])
    with pytest.raises(RuntimeError, match="in the stage"):
        cache.run([row], seconds=10)
    chosen = cache.last([row])[0].ids
    assert len(chosen) == 3  # up to the patch that the stage was to take in
    assert cache.lengths([row]) == [9]
    stage.meanwhile = None
    rest = run_out(cache, [row])[0].ids
    (whole,) = fed(cache, ids_of(6))
    cache.begin([whole], [Plan(9)])
    assert torch.cat((chosen, rest)).tolist() == run_out(cache, [whole])[0].ids.tolist()


def test_weights_that_another_thread_changes_stay_for_a_run_that_has_begun() -> None:
    m = small("transformer", "mamba2")
    cache = NativeCache(m, "bfloat16")
    row, other = fed(cache, ids_of(4), ids_of(4))
    (same,) = cache.copy([row])
    for one in (row, same):
        cache.begin([one], [Plan(1 << 30)])
    ran = []
    runner = threading.Thread(target=lambda: ran.extend(cache.run([row], seconds=0.3)))
    runner.start()
    while runner.is_alive():
        with torch.no_grad():
            m.to_logits.weight.mul_(1)  # written to, and the same
        cache.logits([other])
    ids = ran[0].ids
    chosen = cache.run([same], seconds=0)[0].ids
    while len(chosen) < len(ids):
        chosen = torch.cat((chosen, cache.run([same])[0].ids))
    assert torch.equal(chosen[: len(ids)], ids)


def test_a_thread_that_is_late_with_older_weights_changes_nothing() -> None:
    m = small("transformer", "mamba2")
    cache = NativeCache(m, "bfloat16")
    rows, older = fed(cache, ids_of(4)), weights_of(m, "bfloat16")
    assert older is not None
    with torch.no_grad():
        m.to_logits.weight.mul_(2)
    (row,) = cache.copy(rows)
    now = cache.logits([row])
    cache._engine.logits(cache, older.hierarchy, cache.copy(rows))
    assert torch.equal(cache.logits(rows), now)


def test_what_a_long_piece_comes_after_stays_with_who_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = NativeCache(small("transformer", "mamba2"))
    rows = fed(cache, ids_of(5))
    told = []
    feed_long = cache.feed_long
    monkeypatch.setattr(cache, "feed_long", lambda *given: told.append(given) or feed_long(*given))
    cache.feed(rows, [ids_of(999)])
    ((before, ids),) = told
    assert len(ids) == 999
    assert before.length == 5
    assert torch.equal(before.tensors["tail"], ids_of(5))


@pytest.mark.parametrize("look", ["logits", "state"])
def test_who_looks_at_a_row_changes_no_bits_of_what_it_is_fed(look: str) -> None:
    cache = NativeCache(build("mamba2"), "bfloat16")
    rows = cache.copy(fed(cache, ids_of(3))) + cache.copy(fed(cache, ids_of(3)))
    getattr(cache, look)(rows[0] if look == "state" else rows[:1])
    for count in (NATIVE_POSITIONS, NATIVE_POSITIONS + 1):
        cache.feed(rows, [ids_of(count)] * 2)
        one, other = cache.logits(rows)
        assert torch.equal(one, other)
        cache.feed(rows, [ids_of(1)] * 2)
        getattr(cache, look)(rows[0] if look == "state" else rows[:1])


def test_what_is_no_model_for_it() -> None:
    with pytest.raises(ValueError, match="local stage"):
        NativeCache(build("transformer", "lstm"))


def test_tables_of_another_vocabulary_are_refused_though_they_were_replaced() -> None:
    """Compiled code has a copy of its own, and reads nothing behind it."""
    short, long = (Automaton.of_strings([b"a"], count) for count in (100, 257))
    cache, other = (NativeCache(small("mamba1", num_tokens=count)) for count in (100, 257))
    cache.begin(cache.add(), [Plan(1, stop=short)])
    short.classes = long.classes
    row = other.add()
    with pytest.raises(ValueError, match="a class for each of 257 tokens"):
        other.begin(row, [Plan(1, stop=short)])
    assert other.lengths(row) == [0]


def test_a_state_is_checked_by_the_weights_though_the_model_says_other_sizes() -> None:
    """A patch that is due is read from the tail, and nothing before it."""
    m = small("transformer", "mamba1")
    cache = NativeCache(m)
    (row,) = fed(cache, ids_of(7))
    state = cache.state(row)
    m.patch_sizes = [1, 1]
    with pytest.raises(ValueError, match="length 7, taken 7 and a tail of 1 bytes do not fit"):
        cache.set_state(row, {**state, "tail": state["tail"][-1:]})
    assert cache.lengths([row]) == [7]
