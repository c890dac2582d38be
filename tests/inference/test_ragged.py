"""Sequences of different lengths side by side: each as if it were alone."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mblm import MBLM
from mblm.inference.session import Session
from tests.decoding import CLOSE, in_pytorch, wide
from tests.hierarchies import hierarchies
from tests.models import model, transformer


def prompts(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 66, (length,), generator=generator) for length in lengths]


@settings(max_examples=20, deadline=None)
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
