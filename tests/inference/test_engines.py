"""Compiled decoding against PyTorch's: the same logits and bytes, whatever comes."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mblm import MBLM
from mblm.inference.session import Session
from mblm.ops.packing import round_weight
from tests.decoding import CLOSE, STAGES, in_pytorch, wide
from tests.hierarchies import hierarchies
from tests.models import model, transformer
from tests.native import needs_native


@needs_native
@pytest.mark.parametrize("stage", STAGES)
@torch.inference_mode()
def test_more_threads_or_rows_change_no_bit(stage: str) -> None:
    torch.manual_seed(0)
    m = wide(stage, stage, width=360)
    results = []
    before = torch.get_num_threads()
    for threads, rows in [(1, 1), (2, 1), (3, 8), (1, 3)]:
        torch.set_num_threads(threads)
        session = Session(m, rows).feed(torch.full((rows, 1), 5))
        session.generate(17)  # the likeliest bytes
        results.append(session.logits())
    torch.set_num_threads(before)
    for logits in results[1:]:
        assert torch.equal(logits, results[0].expand_as(logits))


@needs_native
@pytest.mark.parametrize("ends", [0, 10], ids=["to the end", "to an id"])
@pytest.mark.parametrize("count", [1, 31, 33, 70])
@pytest.mark.parametrize("stages", [["mamba1"], ["mamba2", "transformer"]])
@torch.inference_mode()
def test_no_more_numbers_are_drawn_than_bytes(stages: list[str], count: int, ends: int) -> None:
    torch.manual_seed(0)
    m = wide(*stages, seq_lens=[100, 4][-len(stages) :])
    drawn = []

    def draw() -> list[Any]:
        numbers = torch.Generator().manual_seed(1)
        stop = [bytes([token]) for token in range(ends)]
        ids = Session(m).generate(count, filter_thres=0.3, generator=numbers, stop=stop)
        drawn.append(numbers.get_state())
        return [row.tolist() for row in ids]

    got = draw()
    with in_pytorch():
        want = draw()
    assert got == want
    assert torch.equal(drawn[0], drawn[1])


@st.composite
def schedules(draw: st.DrawFn) -> list[tuple[str, int]]:
    """What a user may do with a session, in any order, each with a number."""
    kinds = st.sampled_from(["feed", "generate", "sample", "fork", "file", "restart"])
    return draw(st.lists(st.tuples(kinds, st.integers(0, 9)), min_size=1, max_size=8))


@needs_native
@settings(max_examples=30, deadline=None)
@given(m=hierarchies(), schedule=schedules(), batch=st.integers(1, 3), top_p=st.booleans())
def test_any_schedule(
    m: MBLM, schedule: list[tuple[str, int]], batch: int, top_p: bool, tmp_path_factory: Any
) -> None:
    file: Path = tmp_path_factory.mktemp("sessions") / "s"
    limit = m.max_length if m.max_length is not None else 40
    sampling = {"top_p": 0.7} if top_p else {"filter_thres": 0.6}

    def follow() -> list[torch.Tensor]:
        session, seen = Session(m, batch), []
        numbers = torch.Generator().manual_seed(7)
        for kind, number in schedule:
            count = min(number, limit - session.length)
            if kind == "feed":
                session.feed(torch.randint(0, 18, (batch, count), generator=numbers))
            elif kind == "generate":
                # The likeliest, for a draw may be within rounding of another.
                seen.append(session.generate(count))
            elif kind == "sample":
                seen.append(session.fork().generate(count, **sampling, generator=numbers))
            elif kind == "fork":
                other, session = session, session.fork()
                other.feed(torch.randint(0, 18, (batch, count), generator=numbers))
            elif kind == "file":
                session.save(file)
                session = Session.load(file, m)
            else:
                session = Session(m, batch)
            seen.append(session.logits())
        return seen

    got = follow()
    with in_pytorch():
        want = follow()
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@needs_native
class TestWeights:
    """Rounded weights: a session equals PyTorch's with a model of those weights."""

    @pytest.mark.parametrize("weights", ["bfloat16", "int8"])
    @pytest.mark.parametrize("stage", STAGES)
    @torch.inference_mode()
    def test_are_rounded_and_nothing_else(self, stage: str, weights: str) -> None:
        torch.manual_seed(0)
        m = wide(stage, stage)
        rounded = wide(stage, stage)
        rounded.load_state_dict(m.state_dict())
        for part in rounded.modules():
            if isinstance(part, torch.nn.Linear):
                weight, scale = round_weight(part.weight.data, weights)
                scale = scale[:, None] if weights == "int8" else 1
                part.weight.data = weight.float() * scale
        session = Session(m, 2, weights=weights)
        ids = session.generate(17)
        with in_pytorch():
            close = Session(rounded, 2).feed(ids).logits()
        # int8 weights are multiplied with numbers of 16 bits.
        tolerance = {"atol": 2e-4, "rtol": 1e-3} if weights == "int8" else CLOSE
        torch.testing.assert_close(session.logits(), close, **tolerance)

    @pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
    @torch.inference_mode()
    def test_give_the_logits_that_are_sampled_from(self, weights: str) -> None:
        session = Session(wide("mamba1", "transformer"), weights=weights)
        for byte in range(19):
            session.feed(bytes([byte]))
            expected = session.logits().argmax(-1)
            assert torch.equal(session.fork().generate(1, filter_thres=1.0)[:, 0], expected)

    @torch.inference_mode()
    def test_lose_nothing_that_bfloat16_parameters_have(self) -> None:
        torch.manual_seed(0)
        m = wide("mamba2", "transformer").bfloat16().float()
        session, exact = Session(m, weights="bfloat16"), Session(m)
        for of in (session, exact):
            of.feed(b"\x01\x02\x03\x04\x05")
        torch.testing.assert_close(session.logits(), exact.logits(), **CLOSE)

    def test_int8_is_within_half_a_step(self) -> None:
        given = torch.randn(5, 33)
        weight, scale = round_weight(given, "int8")
        assert weight.dtype == torch.int8
        error = (weight * scale[:, None] - given).abs()
        assert (error <= scale[:, None] * 0.5001).all()

    def test_a_row_of_zeros(self) -> None:
        given = torch.randn(2, 3)
        given[0] = 0
        weight, scale = round_weight(given, "int8")
        assert (weight[0] == 0).all() and scale.isfinite().all()

    def test_are_chosen_where_generation_starts(self) -> None:
        m = wide("transformer", "transformer")
        for weights in ["float32", "bfloat16", "int8"]:
            of_session = m.session(weights=weights).feed(b"!").generate(8)[0]
            of_model = m.generate(torch.tensor([33]), num_tokens_to_generate=8, weights=weights)
            assert torch.equal(of_session, of_model[1:])


@needs_native
class TestStandsAside:
    """Where compiled code would compute something else, PyTorch runs."""

    @pytest.fixture
    def m(self) -> MBLM:
        return wide("mamba1", "transformer", seq_lens=[9, 4])

    @staticmethod
    def is_pytorchs(m: MBLM, session: Session | None = None) -> None:
        """What comes next in a session that was fed three bytes."""
        session = session or Session(m).feed(b"\x01\x02\x03")
        with in_pytorch():
            plain = Session(m).feed(b"\x01\x02\x03")
        torch.testing.assert_close(session.logits(), plain.logits(), **CLOSE)
        assert torch.equal(session.generate(12), plain.generate(12))
        torch.testing.assert_close(session.logits(), plain.logits(), **CLOSE)

    def test_for_a_hook(self, m: MBLM) -> None:
        part = m.stage_models[0].layers[0].mixer.in_proj
        part.register_forward_hook(lambda _, x, y: y + 0.3)
        self.is_pytorchs(m)

    def test_not_under_autocast(self, m: MBLM) -> None:
        """Which says what PyTorch's products may be computed in."""
        exact = Session(m).feed(b"\x01\x02\x03")
        with torch.autocast("cpu", torch.bfloat16):
            session = Session(m).feed(b"\x01\x02\x03")
            assert torch.equal(session.logits(), exact.logits())
            with in_pytorch():
                rounded = Session(m).feed(b"\x01\x02\x03").logits()
            assert not torch.equal(rounded.float(), exact.logits())

    @pytest.mark.parametrize("stage", [0, 1])
    def test_for_a_hook_that_comes_late(self, m: MBLM, stage: int) -> None:
        session = Session(m).feed(b"\x01\x02\x03")
        fork = session.fork()
        calls: list[int] = []
        m.stage_models[stage].register_forward_hook(lambda *_: calls.append(1))
        self.is_pytorchs(m, session)
        self.is_pytorchs(m, fork)
        assert calls


@pytest.mark.parametrize("temperature", [0, 1e-46, 1e-38])
@pytest.mark.parametrize("native", [True, False])
def test_however_low_the_temperature_is_the_likeliest_is_taken(
    temperature: float, native: bool
) -> None:
    m = model(transformer(), seq_lens=[4, 4], num_tokens=60)
    with torch.no_grad():
        m.to_logits.bias += 100.0  # which divided by the last of these is infinite
    likeliest = Session(m).generate(8)
    with nullcontext() if native else in_pytorch():
        ids = Session(m).generate(8, temperature=temperature, filter_thres=0, top_p=0.9)
    assert torch.equal(ids, likeliest)


@pytest.mark.parametrize("p", [1e-30, 1e-46])
@pytest.mark.parametrize("native", [True, False])
def test_however_small_top_p_is_the_likeliest_is_kept(p: float, native: bool) -> None:
    m = model(transformer(), seq_lens=[4, 4], num_tokens=60)
    likeliest = Session(m).generate(8)
    with nullcontext() if native else in_pytorch():
        ids = Session(m).generate(8, top_p=p, filter_thres=0)
    assert torch.equal(ids, likeliest)
