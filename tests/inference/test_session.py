"""Incremental decoding gives the logits of the full forward pass, however the bytes come in."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from mblm import MBLM, MBLMReturnType, Session
from tests.hierarchies import hierarchies
from tests.models import mamba, model, transformer

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def full_logits(model: MBLM, ids: torch.Tensor) -> torch.Tensor:
    """Logits of every next byte, from the empty input on: ``(B, 1 + L, V)``."""
    with torch.no_grad():
        first = model(ids[:, :0], return_type=MBLMReturnType.LOGITS)
        if ids.shape[1] == 0:
            return first
        return torch.cat((first, model(ids, return_type=MBLMReturnType.LOGITS)), dim=1)


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
