"""Several positions at once in compiled code have the bits of one after the other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mblm import MBLMReturnType
from mblm.inference.advance import prefill_natively
from mblm.inference.session import Session
from mblm.inference.stage_cache import NATIVE_POSITIONS, StageCache, allocate_cache
from mblm.ops.packing import WEIGHT_TYPES
from tests.inference.test_native_run import CLOSE, STAGES, in_pytorch, wide
from tests.models import LSTMBlock, mamba, model, transformer
from tests.native import needs_native

pytestmark = needs_native

# Three sequences of the longest piece are few enough for compiled code.
PIECES = st.lists(st.integers(1, NATIVE_POSITIONS // 3), min_size=1, max_size=5)


def leaves(state: Any) -> list[torch.Tensor]:
    """The tensors of a snapshot."""
    if isinstance(state, torch.Tensor):
        return [state]
    return [leaf for part in state for leaf in leaves(part)] if isinstance(state, list) else []


def same_bits(one: Any, other: Any) -> bool:
    return all(map(torch.equal, leaves(one), leaves(other)))


def steps(cache: StageCache, x: torch.Tensor) -> torch.Tensor:
    return torch.stack([cache.step(position) for position in x.unbind(dim=1)], dim=1)


@pytest.mark.parametrize("stage", STAGES)
@settings(max_examples=15, deadline=None)
@given(
    pieces=PIECES,
    rows=st.integers(1, 3),
    weights=st.sampled_from(WEIGHT_TYPES),
    threads=st.integers(1, 3),
    width=st.sampled_from([40, 360]),
)
@torch.inference_mode()
def test_a_piece_has_the_bits_of_its_steps(
    stage: str, pieces: list[int], rows: int, weights: str, threads: int, width: int
) -> None:
    torch.manual_seed(0)
    m = wide(stage, width=width)
    x = torch.randn(rows, sum(pieces), width)
    one, other = (allocate_cache(m.stage_models[0], rows, None, weights) for _ in range(2))
    expected = steps(one, x)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    got = torch.cat([other.prefill(piece) for piece in x.split(pieces, dim=1)], dim=1)
    torch.set_num_threads(before)
    assert torch.equal(got, expected)
    assert same_bits(one.snapshot(), other.snapshot())


@pytest.mark.parametrize("stage", STAGES)
@torch.inference_mode()
def test_a_long_sequence_has_them_too(stage: str) -> None:
    """Attention looks at blocks of positions and of keys; some end within a piece."""
    torch.manual_seed(0)
    m = wide(stage)
    x = torch.randn(1, 150, 40)
    one, other = (allocate_cache(m.stage_models[0], 1, None, "float32") for _ in range(2))
    got = torch.cat([other.prefill(piece) for piece in x.split(NATIVE_POSITIONS, dim=1)], dim=1)
    assert torch.equal(got, steps(one, x))
    torch.testing.assert_close(got, m.stage_models[0](x), **CLOSE)


@pytest.mark.parametrize("weights", WEIGHT_TYPES)
@pytest.mark.parametrize("stage", STAGES)
@torch.inference_mode()
def test_sequences_of_different_lengths_go_together(stage: str, weights: str) -> None:
    torch.manual_seed(0)
    m = wide(stage)
    first = allocate_cache(m.stage_models[0], 1, None, weights)
    longer = allocate_cache(m.stage_models[0], 2, None, weights)
    longer.native = first.native
    x = torch.randn(3, 7, 40)
    caches = [first, longer]
    first.prefill(x[:1, :2])
    longer.prefill(x[1:, :5])
    starts = [cache.snapshot() for cache in caches]
    got = prefill_natively(caches, x)
    ends = [cache.snapshot() for cache in caches]
    for cache, start in zip(caches, starts, strict=True):
        cache.restore(start)
    alone = torch.cat([first.prefill(x[:1]), longer.prefill(x[1:])])
    assert torch.equal(got, alone)
    assert same_bits(ends, [cache.snapshot() for cache in caches])


@torch.inference_mode()
def test_inputs_in_any_layout() -> None:
    m = wide("transformer")
    x = torch.randn(40, 6, 2).permute(2, 1, 0)
    one, other = (allocate_cache(m.stage_models[0], 2, None, "float32") for _ in range(2))
    before = x.clone()
    assert torch.equal(one.prefill(x), other.prefill(x.contiguous()))
    assert torch.equal(x, before)


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
    m = wide(*names, batch=batch, seq_lens=[50, 3, 2][: len(names)])
    ids = torch.randint(0, 66, (batch, sum(pieces)))
    session, one_by_one = (Session(m, batch, weights=weights) for _ in range(2))
    for piece in ids.split(pieces, dim=1):
        session.feed(piece)
    for byte in ids.split(1, dim=1):
        one_by_one.feed(byte)
    assert torch.equal(session.logits(), one_by_one.logits())
    assert same_bits(session._cache.snapshot(), one_by_one._cache.snapshot())


@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_a_session_goes_on_after_a_piece(weights: str, tmp_path: Path) -> None:
    """Forked, saved and loaded in the middle of a patch of each of three stages."""
    torch.manual_seed(0)
    m = wide("mamba2", "transformer", "mamba1", seq_lens=[9, 3, 2])
    ids = torch.randint(0, 66, (2, 23))
    session = Session(m, 2, weights=weights).feed(ids[:, :9])
    session.save(tmp_path / "s")
    others = [session.fork(), Session.load(tmp_path / "s", m)]
    expected = session.feed(ids[:, 9:]).logits()
    for other in others:
        assert torch.equal(other.feed(ids[:, 9:]).logits(), expected)
        assert torch.equal(other.generate(20), session.fork().generate(20))


def test_a_sampled_run_goes_on_after_a_piece_and_a_piece_after_a_run() -> None:
    torch.manual_seed(0)
    m = wide("transformer", "mamba2", seq_lens=[9, 4])
    session = Session(m).feed(b"\x01\x02\x03\x04\x05\x06")
    ids = session.generate(7)[0]
    session.feed(b"\x07\x08\x09")
    whole = torch.cat((torch.arange(1, 7), ids, torch.arange(7, 10)))[None]
    expected = m(whole, return_type=MBLMReturnType.LOGITS)[:, -1]
    torch.testing.assert_close(session.logits(), expected, **CLOSE)


@pytest.mark.parametrize("lengths", [(5, 5, 5), (1, 6, 6), (0, 3, 11)])
def test_sequences_fed_together_have_the_bits_of_each_alone(lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    m = wide("mamba1", "transformer", seq_lens=[9, 4])
    beginnings = [torch.randint(0, 66, (count,)) for count in (2, 7, 4)]
    rows = [torch.randint(0, 66, (count,)) for count in lengths]
    together = Session(m, 3).feed(beginnings).feed(rows)
    for index, (beginning, row) in enumerate(zip(beginnings, rows, strict=True)):
        alone = Session(m).feed(beginning).feed(row)
        assert torch.equal(together.logits()[index], alone.logits()[0])


@pytest.mark.parametrize("stage", STAGES)
@torch.inference_mode()
def test_what_is_too_long_is_pytorchs(stage: str) -> None:
    torch.manual_seed(0)
    m = wide(stage, seq_lens=[2 * NATIVE_POSITIONS + 5])
    ids = torch.randint(0, 66, (1, 2 * NATIVE_POSITIONS + 3))
    expected = m(ids, return_type=MBLMReturnType.LOGITS)[:, -1]
    for piece in (NATIVE_POSITIONS, NATIVE_POSITIONS + 1, ids.shape[1]):
        session = Session(m)
        natives = []
        for part in ids.split(piece, dim=1):
            cache = session._cache.stages[0].cache  # type: ignore[union-attr]
            natives.append(cache.prefills_natively(torch.empty(1, part.shape[1], 40)))
            session.feed(part)
        assert natives[0] == (piece == NATIVE_POSITIONS)
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


def test_gradients_and_autocast_are_pytorchs() -> None:
    torch.manual_seed(0)
    stage = wide("transformer").stage_models[0]
    cache = allocate_cache(stage, 1, None, "float32")
    x = torch.randn(1, 3, 40)
    with torch.enable_grad():
        assert not cache.prefills_natively(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert not cache.prefills_natively(x)
    with torch.no_grad():
        assert cache.prefills_natively(x) and not cache.prefills_natively(x.double())
    with torch.no_grad(), in_pytorch():
        assert not cache.prefills_natively(x)
