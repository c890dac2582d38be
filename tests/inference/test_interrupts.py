"""Ctrl-C in the middle of decoding: no byte is lost, and no session is left wrong."""

import itertools
import random
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest
import torch

from mblm import MBLM, Session
from mblm.inference import continuation
from mblm.inference import session as session_module
from tests.models import LSTMBlock, mamba, model, transformer

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs timers")

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
SAMPLING = {"filter_thres": 0.5, "temperature": 0.9}
COUNT = 60
# Of each of the ten cases: 500 in all where there is time for it.
TIMES = [3, pytest.param(50, marks=pytest.mark.slow)]
PAIRS = [
    pytest.param([transformer(), transformer()], id="transformers"),
    pytest.param([transformer(), mamba("mamba1")], id="mamba1"),
    pytest.param([mamba("mamba2"), transformer()], id="mamba2"),
    pytest.param([LSTMBlock(with_hook=True), transformer()], id="hosted above"),
    pytest.param([transformer(), LSTMBlock()], id="hosted local"),
]


@contextmanager
def interrupted(seconds: float) -> Iterator[None]:
    """Raise KeyboardInterrupt after so long, where the block takes longer."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def raised_at(number: int, module: ModuleType) -> Iterator[None]:
    """Raise KeyboardInterrupt before the number-th line of a module that the block goes through."""
    counted = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal counted
        if frame.f_code.co_filename != module.__file__:
            return None
        counted += event == "line"
        if event == "line" and counted == number:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    watching = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(watching)


@contextmanager
def raised_after(number: int) -> Iterator[None]:
    """Raise KeyboardInterrupt where Python looks for signals: as the number-th call that a session
    makes of a function in C returns, or that it goes through of one in Python begins."""
    counted = 0

    def count(frame: FrameType, event: str, _: object) -> None:
        nonlocal counted
        if event in ("call", "c_return") and frame.f_code.co_filename == session_module.__file__:
            counted += 1
            if counted == number:
                sys.setprofile(None)
                raise KeyboardInterrupt

    watching = sys.getprofile()
    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(watching)


def timed(function: Any) -> tuple[Any, float]:
    begin = time.perf_counter()
    return function(), time.perf_counter() - begin


def moments(seconds: float, times: int) -> list[float]:
    chance = random.Random(3)
    return [max(1e-6, chance.uniform(0, 1.1 * seconds)) for _ in range(times)]


def generator_after(m: MBLM, rows: int, count: int) -> torch.Generator:
    generator = torch.Generator().manual_seed(1)
    torch.empty(count, rows, m.num_tokens).uniform_(generator=generator)
    return generator


def prompts(*lengths: int) -> list[torch.Tensor]:
    numbers = torch.Generator().manual_seed(5)
    return [torch.randint(0, 18, (length,), generator=numbers) for length in lengths]


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("lengths", [(7,), (2, 9)], ids=["one row", "ragged rows"])
@pytest.mark.parametrize("blocks", PAIRS)
def test_generate_keeps_what_it_has_chosen(
    blocks: list[Any], lengths: tuple[int, ...], times: int, tmp_path: Path
) -> None:
    m = model(*blocks, seq_lens=[60, 4])
    fed = prompts(*lengths)
    session = Session(m, len(fed)).feed(fed)

    def generate(session: Session, count: int, generator: torch.Generator) -> Any:
        return session.generate(count, generator=generator, **SAMPLING)

    numbers = torch.Generator().manual_seed(1)
    whole, seconds = timed(lambda: generate(session.fork(), COUNT, numbers))
    for moment in moments(seconds, times):
        fork, numbers = session.fork(), torch.Generator().manual_seed(1)
        ids = None
        try:
            with interrupted(moment):
                generate(fork, COUNT, numbers)
        except KeyboardInterrupt as error:
            ids = getattr(error, "ids", None)
        chosen = [length - begun for length, begun in zip(fork.lengths, lengths, strict=True)]
        given = [row[:n] for row, n in zip(whole, chosen, strict=True)]
        assert ids is None or all(map(torch.equal, ids, given))
        expected = generator_after(m, len(fed), max(chosen))
        assert torch.equal(numbers.get_state(), expected.get_state())
        again = Session(m, len(fed)).feed(fed).feed(given)
        torch.testing.assert_close(fork.logits(), again.logits(), **CLOSE)
        fork.save(tmp_path / "s")
        assert torch.equal(Session.load(tmp_path / "s", m).logits(), fork.logits())
        if len(set(chosen)) == 1:
            rest = generate(fork, COUNT - chosen[0], numbers)
            assert torch.equal(rest, whole[:, chosen[0] :])


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("lengths", [(90,), (90, 3, 20)], ids=["one row", "ragged rows"])
@pytest.mark.parametrize("blocks", PAIRS)
def test_feed_takes_in_all_or_nothing(
    blocks: list[Any], lengths: tuple[int, ...], times: int
) -> None:
    m = model(*blocks, seq_lens=[60, 4])
    fed = prompts(*lengths)
    before = Session(m, len(fed)).feed([b"\x01\x02\x03"] * len(fed))
    after, seconds = timed(lambda: before.fork().feed(fed))
    for moment in moments(seconds, times):
        session = before.fork()
        with suppress(KeyboardInterrupt), interrupted(moment):
            session.feed(fed)
        assert session.lengths in (before.lengths, after.lengths)
        same = before if session.lengths == before.lengths else after
        assert torch.equal(session.logits(), same.logits())
        got, want = session.feed([b"\x04"] * len(fed)), same.fork().feed([b"\x04"] * len(fed))
        assert torch.equal(got.logits(), want.logits())
        assert torch.equal(before.logits(), before.fork().logits())


@pytest.mark.parametrize("wishes", [{}, {"logits_processor": lambda ids, logits: logits}])
def test_an_interrupt_before_any_line_tells_each_byte_once(wishes: dict[str, Any]) -> None:
    session = Session(model(transformer(), seq_lens=[60]), 2).feed(prompts(2, 9))
    whole = session.fork().generate(4, seed=1, **wishes)
    line, done = 0, False
    while not done:
        line += 1
        fork = session.fork()
        try:
            with raised_at(line, continuation):
                fork.generate(4, seed=1, **wishes)
                done = True
        except KeyboardInterrupt as error:
            counts = [n - begun for n, begun in zip(fork.lengths, session.lengths, strict=True)]
            told = error.ids  # type: ignore[attr-defined]
            assert list(map(len, told)) == counts
            assert all(map(torch.equal, told, [r[:n] for r, n in zip(whole, counts, strict=True)]))


@pytest.mark.parametrize("call", [Session.logits, lambda session: session.generate(2)])
def test_an_interrupt_at_any_moment_loses_no_byte_and_no_session(call: Any) -> None:
    session = Session(model(transformer(), seq_lens=[60])).feed(prompts(2)[0])
    for number in itertools.count(1):
        fork = session.fork()
        try:
            with raised_after(number):
                call(fork)
            break
        except KeyboardInterrupt as error:
            told = getattr(error, "ids", [()])  # of none there is nothing to tell
            assert len(told[0]) == fork.length - session.length
            with ThreadPoolExecutor(1) as other:
                other.submit(fork.logits).result()
    assert number > 5


def test_an_interruption_before_the_first_byte_has_the_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While weights are packed, which takes as long as a large model is large."""
    m, prime = model(transformer(), seq_lens=[60]), torch.tensor([3, 1, 4])
    session = m.session(2)

    def interrupt(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("mblm.inference.continuation.cache_for", interrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        m.generate(prime, num_tokens_to_generate=3)
    assert torch.equal(caught.value.ids, prime)  # type: ignore[attr-defined]
    monkeypatch.setattr(session._cache, "begin", interrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        session.generate(3)
    assert [len(ids) for ids in caught.value.ids] == [0, 0]  # type: ignore[attr-defined]
