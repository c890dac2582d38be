"""Sequences of different lengths side by side: each as if it were alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mblm import MBLM
from mblm.inference.session import Session
from tests.decoding import CLOSE, STAGES, in_pytorch, wide
from tests.models import LSTMBlock, hierarchies, model, transformer
from tests.native import needs_native


def prompts(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 66, (length,), generator=generator) for length in lengths]


def alone(m: MBLM, prompt: torch.Tensor, count: int, **options: Any) -> tuple[Any, Any]:
    """What a session of this sequence alone generates, and the logits after it."""
    session = Session(m, **options).feed(prompt)
    return session.generate(count)[0], session.logits()[0]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("seq_lens", [[20], [5, 4], [3, 2, 4]], ids=lambda s: f"{len(s)} stages")
def test_each_is_as_if_alone(stage: str, seq_lens: list[int]) -> None:
    torch.manual_seed(0)
    m = wide(*[stage] * len(seq_lens), seq_lens=seq_lens)
    fed = prompts(0, 1, 3, 4, 5, 9, 4)
    session = Session(m, len(fed)).feed(fed)
    ids = session.generate(11)
    assert session.lengths == [len(prompt) + 11 for prompt in fed] and session.length == 20
    for row, prompt in enumerate(fed):
        want, logits = alone(m, prompt, 11)
        assert torch.equal(ids[row], want)
        torch.testing.assert_close(session.logits()[row], logits, **CLOSE)


@needs_native
@pytest.mark.parametrize("stage", STAGES)
@torch.inference_mode()
def test_the_company_changes_no_bit(stage: str) -> None:
    """Compiled code sums a row in the same order, whatever other rows there are."""
    torch.manual_seed(0)
    m = wide(stage, stage)
    fed = prompts(1, 3, 6, 2)
    session = Session(m, 4).feed(fed)
    session.generate(9)
    for row, prompt in enumerate(fed):
        assert torch.equal(session.logits()[row], alone(m, prompt, 9)[1])


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_rounded_weights(weights: str) -> None:
    torch.manual_seed(0)
    m = wide("mamba2", "transformer")
    fed = prompts(2, 5)
    ids = Session(m, 2, weights=weights).feed(fed).generate(12)
    for row, prompt in enumerate(fed):
        assert torch.equal(ids[row], alone(m, prompt, 12, weights=weights)[0])


@settings(max_examples=40, deadline=None)
@given(m=hierarchies(), data=st.data(), native=st.booleans())
def test_any_schedule(m: MBLM, data: st.DataObject, native: bool) -> None:
    """Feeding, generating, forking in any order and by any lengths."""
    limit = m.max_length if m.max_length is not None else 40
    batch = data.draw(st.integers(1, 4))
    numbers = torch.Generator().manual_seed(7)

    def follow() -> None:
        session = Session(m, batch)
        twins = [Session(m) for _ in range(batch)]
        for _ in range(data.draw(st.integers(1, 5))):
            room = limit - session.length
            if data.draw(st.booleans()):
                counts = [data.draw(st.integers(0, min(9, room))) for _ in twins]
                parts = [torch.randint(0, 18, (n,), generator=numbers) for n in counts]
                session.feed(parts)
                for twin, part in zip(twins, parts, strict=True):
                    twin.feed(part)
            else:
                count = data.draw(st.integers(0, min(9, room)))
                ids = session.generate(count)
                # Equal bytes go on, so that a choice within rounding is no difference later.
                for twin, row in zip(twins, ids, strict=True):
                    twin.feed(row)
            session = session.fork()
            for row, twin in enumerate(twins):
                torch.testing.assert_close(session.logits()[row], twin.logits()[0], **CLOSE)

    if native:
        follow()
    else:
        with in_pytorch():
            follow()


@pytest.mark.parametrize("filters", [{"filter_thres": 0.5}, {"top_p": 0.8}], ids=str)
def test_the_numbers_of_a_byte_do_not_depend_on_the_lengths(filters: dict[str, float]) -> None:
    """The n-th bytes of all sequences are drawn with the n-th numbers ``(B, V)``."""
    torch.manual_seed(0)
    m = wide("transformer", "mamba1", seq_lens=[60, 4])
    fed = prompts(3, 3, 3)
    generators = [torch.Generator().manual_seed(4) for _ in range(2)]
    equal = Session(m, 3).feed(torch.stack(fed))
    want = equal.generate(70, generator=generators[0], **filters)
    ragged = Session(m, 3).feed([fed[0], fed[1][:1], fed[2]]).feed([b"", fed[1][1:], b""])
    got = ragged.generate(70, generator=generators[1], **filters)
    assert torch.equal(got, want)
    assert torch.equal(*(torch.rand(1, generator=g) for g in generators))


def test_a_batch_that_was_equal_at_first() -> None:
    torch.manual_seed(0)
    m = wide("mamba2", "transformer", "mamba1")
    first, more = prompts(7, 5)
    session = Session(m, 2).feed(torch.stack([first, first.flip(0)])).feed([more, b""])
    want = [alone(m, torch.cat((first, more)), 8)[0], alone(m, first.flip(0), 8)[0]]
    assert torch.equal(session.generate(8), torch.stack(want))


class TestCustomStages:
    """A state that only its stage model understands."""

    @pytest.fixture
    def m(self) -> MBLM:
        torch.manual_seed(0)
        block = LSTMBlock(with_hook=True)
        return model(transformer(), block, seq_lens=[8, 4], num_tokens=120)

    def test_from_the_beginning(self, m: MBLM) -> None:
        fed = prompts(2, 6)
        ids = Session(m, 2).feed(fed).generate(9)
        for row, prompt in enumerate(fed):
            assert torch.equal(ids[row], alone(m, prompt, 9)[0])

    def test_after_a_beginning_in_common(self, m: MBLM) -> None:
        first, more = prompts(3, 5)
        session = Session(m, 2).feed(torch.stack([first, first])).feed([more, b"a"])
        for row, rest in enumerate((more, torch.tensor([97]))):
            want = alone(m, torch.cat((first, rest)), 9)[0]
            assert torch.equal(session.fork().generate(9)[row], want)


def test_a_file_keeps_the_lengths(tmp_path: Path) -> None:
    torch.manual_seed(0)
    m = wide("mamba1", "transformer")
    session = Session(m, 3, weights="int8").feed(prompts(1, 0, 6))
    session.save(tmp_path / "s")
    loaded = Session.load(tmp_path / "s", m)
    assert loaded.lengths == [1, 0, 6]
    assert torch.equal(loaded.generate(7), session.generate(7))


class TestRefuses:
    @pytest.fixture
    def session(self) -> Session:
        return Session(
            model(transformer(), transformer(), seq_lens=[5, 4], num_tokens=120), 2
        ).feed([b"abc", b""])

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            ([b"a"], "ids: expected a list of 2, the session's batch, got 1"),
            ([b"a", b"\xff"], r"ids\[1\]: .*255"),
            ([b"a", torch.zeros(2, 1).long()], r"ids\[1\]: expected shape \(L,\), got \(2, 1\)"),
        ],
    )
    def test_bad_rows_before_anything_is_fed(
        self, session: Session, ids: list[Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            session.feed(ids)
        assert session.lengths == [3, 0]

    def test_what_is_no_integer(self, session: Session) -> None:
        with pytest.raises(TypeError, match=r"ids\[0\]"):
            session.feed([torch.zeros(1), b""])

    def test_more_than_the_context_for_the_longest(self) -> None:
        m = model(transformer(), transformer(), seq_lens=[5, 4], num_tokens=120)
        session = Session(m, 2).feed([b"abc", b""])
        with pytest.raises(ValueError, match="18 bytes after 3 exceed the context of 20"):
            session.generate(18)
        session.generate(17)
        session.feed([b"", b"a"])
        with pytest.raises(ValueError, match="20 bytes and 1 more"):
            session.feed([b"a", b"a"])
        assert session.lengths == [20, 18]
