"""Sessions as users hold them: gradient and training modes, batches, bad input."""

import contextlib
import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mblm import MBLM, MBLMReturnType, Session
from tests.decoding import in_pytorch
from tests.models import LSTMBlock, mamba, model, transformer

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
on_every_engine = pytest.mark.parametrize("engine", [contextlib.nullcontext, in_pytorch])


@pytest.fixture
def m() -> MBLM:
    return model(mamba("mamba1"), transformer(), seq_lens=[6, 4])


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_any_gradient_mode(m: MBLM, mode: Any) -> None:
    ids = torch.randint(0, 18, (2, 13))
    expected = m(ids, return_type=MBLMReturnType.LOGITS)[:, -1].detach()
    with mode():
        session = m.session(2).feed(ids[:, :7])
    session.feed(ids[:, 7:9])
    with mode():
        session.feed(ids[:, 9:])
        logits = session.logits()
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert not logits.requires_grad


def test_a_model_in_training_mode_without_dropout(m: MBLM) -> None:
    ids = torch.randint(0, 18, (1, 13))
    expected = m.session().feed(ids).logits()
    m.train()
    torch.testing.assert_close(m.session().feed(ids).logits(), expected)
    m(ids).backward()
    assert m.training


def test_dropout_is_as_the_models_mode_says() -> None:
    m = model(transformer(ff_dropout=0.5, attn_dropout=0.5), seq_lens=[20])
    ids = torch.randint(0, 18, (1, 13))
    assert torch.equal(m.session().feed(ids).logits(), m.session().feed(ids).logits())
    m.train()
    assert not torch.equal(m.session().feed(ids).logits(), m.session().feed(ids).logits())


@on_every_engine
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_logits_are_the_callers(m: MBLM, mode: Any, engine: Any) -> None:
    """Writing to them does not reach the session, and they may be part of a loss."""
    with engine():
        session = m.session().feed(torch.tensor([1, 2, 3]))
    with mode():
        expected, logits = session.logits(), session.logits()
        ids = session.fork().generate(2)
    logits.zero_()
    assert torch.equal(session.logits(), expected)
    weight = torch.ones(19, requires_grad=True)
    (expected * weight).sum().backward()
    assert torch.equal(weight.grad, expected[0])
    m(ids).backward()


def test_a_model_is_trained_after_it_generated_beyond_its_positions() -> None:
    """What grows then, and what is moved then, is no inference tensor."""
    m = model(transformer(pos_emb_type="rope"), mamba(), seq_lens=[3, 4]).train()
    m.generate(num_tokens_to_generate=60, enable_progress=False)
    m(torch.randint(0, 18, (1, 60))).backward()
    with torch.inference_mode():
        m.cpu().float()
    m(torch.randint(0, 18, (1, 60))).backward()
    m.load_state_dict(m.state_dict())


def use_session(m: MBLM, file: Path) -> list[torch.Tensor]:
    """Every way into a session, and what came out."""
    ids = torch.arange(10, device="cpu")
    stop = [b"\x01"]
    out = m.generate(None, num_tokens_to_generate=5, stop=stop, enable_progress=False)
    session = m.session(2).feed([ids, ids[:3]])
    ragged = [session.generate(2), session.logits(), session.generate(0)]
    session = m.session().feed(b"").feed(b"\x01\x02")
    drawn = session.generate(3, top_p=0.5, generator=torch.Generator().manual_seed(1))
    session.save(file)
    torch.manual_seed(3)
    (one,) = m.generate_batch([b"\x01"], max_bytes=3, top_p=0.9, enable_progress=False)
    log_probs = m.score(b"\x01\x02\x03").log_probs
    return [out, *ragged, drawn, Session.load(file, m).logits(), one.ids, log_probs]


@pytest.mark.parametrize("upper", [mamba("mamba1"), mamba("mamba2"), LSTMBlock(with_hook=True)])
@pytest.mark.parametrize("weights", ["float32", "int8"])
@on_every_engine
def test_other_default_dtypes_and_devices_change_nothing(
    upper: Any, weights: str, engine: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(Session.__init__, "__kwdefaults__", {"weights": weights})
    m = model(upper, transformer(pos_emb_type="rope"), seq_lens=[3, 4])
    with engine():
        expected = use_session(m, tmp_path / "s")
        try:
            torch.set_default_dtype(torch.float64)
            of_dtype = use_session(m, tmp_path / "s")
        finally:
            torch.set_default_dtype(torch.float32)
        with torch.device("meta"):
            of_device = use_session(m, tmp_path / "s")
    for got in (of_dtype, of_device):
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def test_a_session_that_moves_to_another_cache_lets_go_of_the_one_before(m: MBLM) -> None:
    session = m.session(2).feed([b"\1\2", b"\3"])
    before = weakref.ref(session._cache)
    m.double()
    session.feed([b"\4", b""])
    gc.collect()
    assert before() is None and session.lengths == [3, 1]


def test_what_is_fed_may_change_afterwards(m: MBLM) -> None:
    ids = torch.randint(0, 18, (1, 13))
    expected = m.session().feed(ids).logits()
    buffer = ids[:, :9].clone()
    session = m.session().feed(buffer)
    buffer.fill_(3)
    torch.testing.assert_close(session.feed(ids[:, 9:]).logits(), expected, **CLOSE)


class TestGenerate:
    def test_batch_size_that_is_no_number(self, m: MBLM) -> None:
        assert m.session(np.int64(2)).batch_size == 2
        for batch_size in (True, "2", None, 0, 1 << 25, 10**30):
            with pytest.raises((TypeError, ValueError), match="batch_size: expected"):
                m.session(batch_size)


def test_what_is_no_model_that_decodes(m: MBLM, tmp_path: Path) -> None:
    m.session().save(tmp_path / "session")
    for wrong in (torch.nn.Sequential(m), "model", None):
        for begin in (Session, lambda it: Session.load(tmp_path / "session", it)):
            with pytest.raises(TypeError, match=r"model: expected an mblm\.MBLM, got"):
                begin(wrong)


def test_a_model_without_values(m: MBLM) -> None:
    session = m.session().feed(b"\x01\x02\x03")
    m.to("meta")
    for decode in (m.session, session.logits, lambda: session.generate(2)):
        with pytest.raises(ValueError, match="model: it is on the device meta"):
            decode()
    assert session.length == 3


@pytest.mark.parametrize("stage", [0, 1])
def test_a_stage_of_another_kind_cannot_go_on(m: MBLM, stage: int) -> None:
    session = m.session().feed(b"\x01\x02\x03")
    m.stage_models[stage] = torch.nn.Identity()
    for decode in (session.logits, lambda: session.generate(2), lambda: session.feed(b"\x04")):
        with pytest.raises(ValueError, match=r"the model is another .* start a new session"):
            decode()
    assert session.length == 3


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_is_a_fork(m: MBLM, copied: Any) -> None:
    session = m.session().feed(b"\x01\x02\x03")
    other = copied({"session": session})["session"] if copied is copy.deepcopy else copied(session)
    logits = session.logits()
    session.feed(b"\x04")
    assert other.length == 3 and torch.equal(other.logits(), logits)
    assert torch.equal(other.feed(b"\x04").logits(), session.logits())


def test_a_session_is_not_pickled(m: MBLM) -> None:
    with pytest.raises(TypeError, match="a session cannot be pickled"):
        pickle.dumps(m.session())


def test_a_session_that_is_gone_keeps_no_rows(m: MBLM) -> None:
    session = m.session(2)
    fork = session.fork()
    cache, rows = fork._cache, fork._rows
    assert cache is session._cache and cache.lengths(rows) == [0, 0]
    del fork
    gc.collect()
    with pytest.raises(ValueError, match="row"):
        cache.lengths(rows)
    assert session.feed([b"\x01", b""]).lengths == [1, 0]


def test_a_call_while_another_thread_is_in_one_is_refused(m: MBLM) -> None:
    """The calls of a run would otherwise take bytes from one another."""
    session = m.session().feed(b"\x01")
    refused: list[str] = []

    def call_elsewhere(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        assert session.logits().shape == (1, m.num_tokens)  # of this thread
        calls = session.logits, session.fork, lambda: session.generate(1)
        for call in (*calls, lambda: session.feed(b"\x01")):
            with ThreadPoolExecutor(1) as other, pytest.raises(ValueError) as error:
                other.submit(call).result()
            refused.append(str(error.value))
        return logits

    session.generate(1, logits_processor=call_elsewhere)
    assert session.length == 2 and len(refused) == 4
    assert all("in another thread's call" in words for words in refused)
