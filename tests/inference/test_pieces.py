"""Bytes that come in pieces: the same bits however they are cut, alone or side by side."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mblm import MBLMReturnType
from mblm.inference.session import Session
from mblm.ops.packing import WEIGHT_TYPES
from tests.decoding import CLOSE, STAGES, wide
from tests.models import LSTMBlock, mamba, model, transformer

PIECES = st.lists(st.integers(1, 24), min_size=1, max_size=5)  # each taken in by compiled code


def same_state(one: Session, other: Session) -> bool:
    """Whether every bit of two sessions is the same."""
    pairs = zip(one._rows, other._rows, strict=True)
    states = [(one._cache.state(row), other._cache.state(twin)) for row, twin in pairs]
    return all(
        state.keys() == twin.keys() and all(map(_same, state.values(), twin.values()))
        for state, twin in states
    )


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@settings(max_examples=20, deadline=None)
@given(
    pieces=PIECES,
    names=st.lists(st.sampled_from(sorted(STAGES)), min_size=1, max_size=3),
    weights=st.sampled_from(WEIGHT_TYPES),
    batch=st.integers(1, 3),
)
def test_bytes_fed_in_any_pieces_leave_the_same_bits(
    pieces: list[int], names: list[str], weights: str, batch: int
) -> None:
    """Pieces end anywhere in patches of every stage."""
    torch.manual_seed(0)
    m = wide(*names, seq_lens=[130, 3, 2][: len(names)])
    ids = torch.randint(0, 66, (batch, sum(pieces)))
    session, one_by_one = (Session(m, batch, weights=weights) for _ in range(2))
    for piece in ids.split(pieces, dim=1):
        session.feed(piece)
    for byte in ids.split(1, dim=1):
        one_by_one.feed(byte)
    assert torch.equal(session.logits(), one_by_one.logits())
    assert same_state(session, one_by_one)


@pytest.mark.parametrize("stage", STAGES)
def test_pieces_of_any_length_give_the_logits_of_the_forward_pass(stage: str) -> None:
    """Long ones are PyTorch's, short ones those of compiled code."""
    torch.manual_seed(0)
    m = wide(stage, seq_lens=[130])
    ids = torch.randint(0, 66, (1, 129))
    expected = m(ids, return_type=MBLMReturnType.LOGITS)[:, -1]
    for piece in (1, 64, 65, 66, 129):
        session = Session(m)
        for part in ids.split(piece, dim=1):
            session.feed(part)
        torch.testing.assert_close(session.logits(), expected, **CLOSE)


@pytest.mark.parametrize("with_hook", [False, True])
@pytest.mark.parametrize("upper_is_custom", [False, True])
@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_beside_a_custom_block(with_hook: bool, upper_is_custom: bool, weights: str) -> None:
    torch.manual_seed(0)
    custom = LSTMBlock(with_hook=with_hook)
    blocks = (custom, mamba("mamba2")) if upper_is_custom else (transformer(), custom)
    m = model(*blocks, seq_lens=[9, 4])
    ids = torch.randint(0, 18, (2, 27))
    session = Session(m, 2, weights=weights)
    for piece in ids.split([3, 9, 4, 11], dim=1):
        session.feed(piece)
    expected = m(ids, return_type=MBLMReturnType.LOGITS)[:, -1]
    tolerance = {"atol": 0.05, "rtol": 0.05} if weights != "float32" else CLOSE
    torch.testing.assert_close(session.logits(), expected, **tolerance)
