"""Many prompts in one call: each as if alone, whatever else runs."""

from collections.abc import Iterator, Sequence
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
from mblm.inference.generation import Generation
from tests.decoding import CLOSE, in_pytorch
from tests.decoding import alone as after
from tests.inference.caches import after as joined
from tests.inference.caches import build, whole_logits
from tests.inference.test_continuation import Follows, InTheEngine, words
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


@pytest.fixture(params=["native", "torch"])
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each engine."""
    if request.param == "native":
        yield
    else:
        with in_pytorch():
            yield


every_way = pytest.mark.usefixtures("way")


@pytest.fixture
def m() -> MBLM:
    torch.manual_seed(0)
    return KINDS["mamba over a transformer"]()


def alone(m: MBLM, prompt: bytes, seed: int, **wishes: Any) -> list[int]:
    """What `generate` gives after a prompt."""
    return after(m, prompt, wishes.pop("max_bytes"), seed=seed, **wishes)


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
    with in_pytorch():
        check_any_schedule(data)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(data=st.data(), native=st.booleans())
def test_hundreds_of_schedules(data: st.DataObject, native: bool) -> None:
    if native:
        check_any_schedule(data, data.draw(st.sampled_from(["float32", "bfloat16", "int8"])))
    else:
        with in_pytorch():
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

    def noted(index: int, result: Generation) -> None:
        done.append(index)

    results = together(m, prompts(), max_bytes=4, max_rows=3, on_result=noted)
    assert read == list(range(9))
    assert [result.prompt.tolist() for result in results] == [[index] for index in range(9)]


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
    torch.manual_seed(5)
    first, *others = together(m, prompts, seeds=[42, None, None, None], **wishes)
    assert first.ids.tolist() == alone(m, prompts[0], 42, max_bytes=2, **WARM)
    assert [r.ids.tolist() for r in others] == [r.ids.tolist() for r in wide[1:]]


def test_torchs_generator_gives_one_number(m: MBLM) -> None:
    torch.manual_seed(5)
    together(m, some_prompts(3, 4), max_bytes=5, **WARM)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    torch.randint(2**62, ())
    assert torch.equal(torch.get_rng_state(), after)
