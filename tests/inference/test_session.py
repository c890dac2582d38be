"""Incremental decoding gives the logits of the full forward pass, however the bytes come in."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mblm import MBLM, MBLMReturnType, Session
from tests.hierarchies import hierarchies
from tests.models import LSTMBlock, mamba, model, transformer

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def full_logits(model: MBLM, ids: torch.Tensor) -> torch.Tensor:
    """Logits of every next byte, from the empty input on: ``(B, 1 + L, V)``."""
    with torch.no_grad():
        first = model(ids[:, :0], return_type=MBLMReturnType.LOGITS)
        if ids.shape[1] == 0:
            return first
        return torch.cat((first, model(ids, return_type=MBLMReturnType.LOGITS)), dim=1)


def draw_ids(model: MBLM, data: st.DataObject, batch_size: int) -> torch.Tensor:
    length = data.draw(st.integers(0, model.context_size), label="length")
    return torch.randint(0, model.num_tokens - 1, (batch_size, length))


@given(model=hierarchies(), data=st.data())
@settings(max_examples=30, deadline=None)
def test_logits_equal_the_full_forward_after_any_feeds(model: MBLM, data: st.DataObject) -> None:
    batch_size = data.draw(st.integers(1, 3), label="batch")
    ids = draw_ids(model, data, batch_size)
    expected = full_logits(model, ids)
    session = Session(model, batch_size)
    while session.length < ids.shape[1]:
        torch.testing.assert_close(session.logits(), expected[:, session.length], **CLOSE)
        count = data.draw(st.integers(1, ids.shape[1] - session.length), label="feed")
        session.feed(ids[:, session.length : session.length + count])
    torch.testing.assert_close(session.logits(), expected[:, -1], **CLOSE)


@given(model=hierarchies())
@settings(max_examples=30, deadline=None)
def test_logits_equal_the_full_forward_byte_by_byte(model: MBLM) -> None:
    """Every length, and with it every length modulo every patch size."""
    ids = torch.randint(0, model.num_tokens - 1, (2, min(model.context_size, 100)))
    expected = full_logits(model, ids)
    session = Session(model, 2)
    for length in range(ids.shape[1] + 1):
        torch.testing.assert_close(session.logits(), expected[:, length], **CLOSE)
        if length < ids.shape[1]:
            session.feed(ids[:, length : length + 1])


@given(model=hierarchies(), data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_fork_and_a_saved_session_go_on_alike(
    model: MBLM, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    ids = draw_ids(model, data, 2)
    cut = data.draw(st.integers(0, ids.shape[1]), label="cut")
    session = Session(model, 2).feed(ids[:, :cut])
    expected = session.logits().clone()
    file = tmp_path_factory.mktemp("session") / "s.safetensors"
    session.save(file)
    twins = [session.fork(), Session.load(file, model)]
    session.feed(ids[:, cut:])  # must not be seen by the others
    for twin in twins:
        assert twin.length == cut
        torch.testing.assert_close(twin.logits(), expected, **CLOSE)
        twin.feed(ids[:, cut:])
        torch.testing.assert_close(twin.logits(), session.logits(), **CLOSE)


@pytest.mark.parametrize("with_hook", [False, True], ids=["replayed", "with hook"])
def test_a_custom_block_generates_what_its_full_forward_predicts(with_hook: bool) -> None:
    lstm = LSTMBlock(with_hook=with_hook)
    m = model(lstm, transformer(), lstm, seq_lens=[3, 4, 5])
    out = m.generate(torch.tensor([1, 2, 3]), enable_progress=False)
    assert len(out) == 60
    with torch.no_grad():
        greedy = m(out[None], return_type=MBLMReturnType.LOGITS)[0].argmax(-1)
    assert out[3:].tolist() == greedy[2:-1].tolist()


def test_prefill_is_cut_into_bounded_chunks() -> None:
    """No stage ever sees more positions at once than a chunk, whatever the prompt's length."""
    m = model(mamba("mamba1"), transformer(), seq_lens=[5000, 4], hidden_dims=[4, 8])
    ids = torch.randint(0, 18, (1, 17_003))
    widest = []
    for stage in m.stage_models:
        stage.register_forward_pre_hook(lambda _, x: widest.append(x[0].shape[1]))
    hook = m.stage_models[0].forward_with_state
    m.stage_models[0].forward_with_state = lambda x, s: (widest.append(x.shape[1]), hook(x, s))[1]
    session = Session(m).feed(ids)
    assert max(widest) <= 1024
    expected = full_logits(m, ids)[:, -1]
    torch.testing.assert_close(session.logits(), expected, **CLOSE)


def test_generate_takes_in_what_it_generates() -> None:
    m = model(mamba("mamba1"), transformer(), seq_lens=[8, 3])
    prompts = torch.randint(0, 18, (3, 5))
    session = m.session(batch_size=3).feed(prompts)
    ids = session.generate(7)
    assert ids.shape == (3, 7) and session.length == 12
    for row in range(3):
        alone = m.generate(prompts[row], num_tokens_to_generate=7, enable_progress=False)
        assert alone[5:].tolist() == ids[row].tolist()


@pytest.mark.parametrize("count", [1, 2, 4, 9, 12])
@pytest.mark.parametrize(
    "go_on",
    [
        pytest.param(lambda s, _: s.logits(), id="logits"),
        pytest.param(lambda s, _: s.feed(b"\x05\x06").logits(), id="feed"),
        pytest.param(lambda s, _: s.feed([b"\x05"]).logits(), id="feed a list"),
        pytest.param(lambda s, _: s.fork().logits(), id="fork"),
        pytest.param(lambda s, _: (s.fork().feed(b"\x01"), s.logits())[1], id="forked from"),
        pytest.param(lambda s, _: s.generate(7), id="generate"),
        pytest.param(lambda s, _: (s.generate(0), s.generate(3))[1], id="generate nothing"),
        pytest.param(lambda s, path: (s.save(path), s.logits())[1], id="saved"),
        pytest.param(
            lambda s, path: (s.save(path), Session.load(path, s._model).logits())[1], id="loaded"
        ),
    ],
)
def test_the_last_byte_that_was_generated_is_taken_in_however_it_goes_on(
    count: int, go_on: Callable[[Session, Path], torch.Tensor], tmp_path: Path
) -> None:
    """Compiled code takes it in with what comes next."""
    m = model(mamba(), transformer(), seq_lens=[9, 4])
    generated = Session(m).feed(b"\x01\x02\x03")
    ids = generated.generate(count)
    fed = Session(m).feed(b"\x01\x02\x03").feed(ids)
    assert generated.lengths == fed.lengths == [3 + count]
    got = go_on(generated, tmp_path / "session")
    torch.testing.assert_close(got, go_on(fed, tmp_path / "session"), **CLOSE)
    assert generated.lengths == fed.lengths


class TestBadInput:
    @pytest.fixture
    def session(self) -> Session:
        return model(transformer(), seq_lens=[6]).session().feed(torch.tensor([1]))

    @pytest.mark.parametrize(
        ("ids", "error", "words"),
        [
            (torch.tensor([19]), ValueError, r"token id 19 at position \(0,\) .* num_tokens = 19"),
            ([1.0], TypeError, r"ids\[0\]: expected an integer, got 1.0"),
            (torch.zeros(2, 1).long(), ValueError, r"expected shape \(L,\)"),
            (torch.zeros(6).long(), ValueError, r"context of 6 bytes"),
        ],
        ids=["id too high", "a list", "batch", "too long"],
    )
    def test_is_refused_and_leaves_the_session_as_it_was(
        self, session: Session, ids: torch.Tensor, error: type[Exception], words: str
    ) -> None:
        before = session.logits().clone()
        with pytest.raises(error, match=words):
            session.feed(ids)
        assert session.length == 1
        assert torch.equal(session.logits(), before)

    def test_nothing_to_feed_is_fine(self, session: Session) -> None:
        assert session.feed(torch.empty(0, dtype=torch.long)).feed(b"").length == 1
