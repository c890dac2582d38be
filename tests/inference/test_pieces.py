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
