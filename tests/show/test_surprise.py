"""What is shown of a text: what a score and a session say of each byte, and where it stands."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mblm import MBLM
from mblm.show.glyphs import WIDE, glyph_sizes
from mblm.show.surprise import measure
from tests.models import mamba, model, transformer

TEXT = b"The cat sat on the mat, and the dog sat on the cat."


def endless() -> MBLM:
    return model(mamba(), transformer(), seq_lens=[3, 4], num_tokens=257)


def limited() -> MBLM:
    return model(transformer(), seq_lens=[3, 4], num_tokens=257)


def test_bits_are_those_of_a_score() -> None:
    net = limited()
    surprise, score = measure(net, TEXT), net.score(TEXT)
    np.testing.assert_allclose(surprise.bits, score.log_probs / -math.log(2), rtol=1e-5)
    assert surprise.bits_per_byte == pytest.approx(score.bits_per_byte)
    assert str(surprise) == f"51 bytes, {score.bits_per_byte:.4f} bits per byte"


def test_alternatives_are_what_a_session_finds_likeliest() -> None:
    net = endless()
    surprise, session = measure(net, TEXT), net.session()
    for at, byte in enumerate(TEXT):
        likeliest = session.logits()[0].softmax(-1).topk(4)
        assert surprise.alternatives[at].tolist() == likeliest.indices.tolist()
        np.testing.assert_allclose(surprise.probabilities[at], likeliest.values, rtol=1e-3)
        session.feed(bytes([byte]))


def test_places_are_those_in_the_windows_that_the_model_sees() -> None:
    """Windows of 12 bytes, of which 6 are scored but of the first; the last one ends the text."""
    expected = [*range(12), *range(6, 12), *range(6, 12), *range(9, 12)]
    assert measure(limited(), TEXT[:27]).places.tolist() == expected
    assert measure(endless(), TEXT[:27]).places.tolist() == list(range(27))


def test_means_by_place_in_a_patch() -> None:
    net = endless()
    surprise = measure(net, TEXT)
    assert surprise.patches == [4]
    expected = [surprise.bits[place::4].mean() for place in range(4)]
    np.testing.assert_allclose(surprise.bits_by_place(4), expected, rtol=1e-6)
    np.testing.assert_allclose(
        surprise.bits_by_place(4, most=2),
        [surprise.bits[np.arange(51) % 4 // 2 == half].mean() for half in (0, 1)],
        rtol=1e-6,
    )
    few = measure(net, TEXT[:3]).bits_by_place(4)
    assert np.isnan(few).tolist() == [False, False, False, True]


def test_padding_does_not_count() -> None:
    net = model(transformer(), seq_lens=[3, 4], num_tokens=256, pad_token_id=ord("t"))
    surprise = measure(net, TEXT)
    counted = [bits for bits, byte in zip(surprise.bits, TEXT, strict=True) if byte != ord("t")]
    assert surprise.bits_per_byte == pytest.approx(np.mean(counted))


def test_few_ids_have_few_alternatives_and_bytes_outside_are_refused() -> None:
    net = model(transformer(), seq_lens=[3, 4], num_tokens=3)
    surprise = measure(net, b"\x00\x01\x02")
    assert surprise.alternatives.shape == (3, 3)
    np.testing.assert_allclose(surprise.probabilities.sum(1), 1, rtol=1e-5)
    with pytest.raises(ValueError, match=r"data: token id 3 at position \(1,\)"):
        measure(net, b"\x00\x03")


def test_no_bytes() -> None:
    surprise = measure(limited(), b"")
    assert math.isnan(surprise.bits_per_byte) and str(surprise) == "0 bytes"


def test_progress_adds_up() -> None:
    told: list[int] = []
    measure(limited(), TEXT, on_progress=told.append)
    assert sum(told) == len(TEXT)


@given(st.one_of(st.binary(max_size=40), st.text(max_size=20).map(lambda text: text.encode())))
def test_characters_are_shown_where_they_can_be_seen(data: bytes) -> None:
    sizes, at = glyph_sizes(data), 0
    while at < len(data):
        count = sizes[at] % WIDE
        if count:
            character = data[at : at + count].decode()
            assert len(character) == 1 and (character.isprintable() or character in "\t\n")
            assert not any(sizes[at + 1 : at + count])
        else:  # invalid, a control character, or such as turns text around
            assert not (32 <= data[at] < 127 or data[at] in b"\t\n")
        at += count or 1


def test_how_characters_are_shown() -> None:
    assert list(glyph_sizes("aß日\u202e\r\n".encode())) == [
        *(1, 2, 0, 3 + WIDE, 0, 0),
        *(0, 0, 0, 0, 1),
    ]
    assert list(glyph_sizes(b"\xc3(\xff")) == [0, 1, 0]


def test_alternatives_of_a_model_in_bfloat16() -> None:
    surprise = measure(limited().to(torch.bfloat16), TEXT)
    assert ((surprise.alternatives >= 0) & (surprise.alternatives < 257)).all()
