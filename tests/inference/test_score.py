"""Scores: what a session says byte by byte, however texts are cut, batched and begun."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mblm import MBLM, MBLMReturnType, Score
from mblm.inference.score import score
from mblm.model.tiled_pass import TiledPass
from tests.hierarchies import hierarchies
from tests.models import LSTMBlock, encoder, mamba, model, transformer

V = 19
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def session_says(net: MBLM, ids: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """The log-probabilities of bytes, one by one."""
    session = net.session().feed(given)
    found = []
    for token in ids:
        found.append(session.logits().log_softmax(-1)[0, token])
        session.feed(token[None])
    return torch.stack(found) if found else torch.empty(0)


def some_ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, V, (count,), generator=torch.Generator().manual_seed(seed))


def endless() -> MBLM:
    return model(mamba(), transformer(), seq_lens=[3, 4])


def limited() -> MBLM:
    return model(transformer(), seq_lens=[3, 4])


# -- One text --------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(net=hierarchies(), data=st.data())
def test_a_score_is_what_a_session_says(net: MBLM, data: st.DataObject) -> None:
    """For every kind of stage, at every offset in the patches, whatever is given."""
    count = data.draw(st.integers(0, min(net.context_size, 40)), label="bytes")
    ids = some_ids(count, seed=count)
    before = data.draw(st.integers(0, count), label="given")
    batch = data.draw(st.sampled_from([1, 7, 1 << 16]), label="batch_bytes")
    scored = net.score(ids[before:], ids[:before], batch_bytes=batch)
    expected = session_says(net, ids[before:], ids[:before])
    torch.testing.assert_close(scored.log_probs, expected, **TOLERANCE)


@pytest.mark.parametrize("blocks", [("mamba1", "mamba1"), ("mamba2", "transformer"), ("mamba2",)])
@pytest.mark.parametrize("batch_bytes", [1, 5, 16, 100])
@pytest.mark.parametrize("before", [0, 1, 4, 17])
def test_a_mamba_takes_texts_of_any_length_as_one_sequence(
    blocks: tuple[str, ...], batch_bytes: int, before: int
) -> None:
    """Its context is 12 bytes; where it takes more in than a batch, pieces follow each other."""
    kinds = [transformer() if kind == "transformer" else mamba(kind) for kind in blocks]
    net = model(*kinds, seq_lens=[3, 4][: len(kinds)], num_layers=[2] * len(kinds))
    ids = some_ids(61)
    scored = net.score(ids[before:], ids[:before], batch_bytes=batch_bytes)
    expected = session_says(net, ids[before:], ids[:before])
    torch.testing.assert_close(scored.log_probs, expected, **TOLERANCE)


def test_the_first_byte_is_predicted_as_generate_does_and_not_as_the_loss_does() -> None:
    net, ids = limited(), some_ids(9)[None]
    log_probs = net.score(ids).log_probs
    assert log_probs[0] == pytest.approx(float(session_says(net, ids[0, :1], ids[0, :0])), rel=1e-5)

    with torch.no_grad():
        loss = 9 * net(ids, return_type=MBLMReturnType.LOSS)
        logits = net(ids, return_type=MBLMReturnType.LOGITS)
    later = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
    assert float(log_probs[1:].sum()) == pytest.approx(-float(later), rel=1e-5)
    of_first = float(loss - later)  # by the local start token alone
    assert abs(of_first + float(log_probs[0])) > 1e-3


def test_a_score_adds_up_to_the_probability_of_what_is_generated() -> None:
    net = endless()
    generation = net.generate_batch(
        [b"\x01\x02"], max_bytes=20, filter_thres=0.0, log_probs=True, enable_progress=False
    )[0]
    scored = net.score(generation.ids, given=b"\x01\x02")
    torch.testing.assert_close(scored.log_probs, generation.log_probs, **TOLERANCE)


def test_what_greedy_decoding_generates_is_greedy() -> None:
    net = endless()
    ids = net.generate(torch.tensor([3, 1]), num_tokens_to_generate=20, enable_progress=False)
    scored = net.score(ids[2:], given=ids[:2])
    assert scored.is_greedy and scored.is_likeliest.all() and len(scored) == 20
    other = ids[2:].clone()
    other[7] = (other[7] + 1) % V
    scored = net.score(other, given=ids[:2])
    assert not scored.is_greedy and scored.is_likeliest[:7].all() and not scored.is_likeliest[7]


def test_bits_are_those_of_a_uniform_model() -> None:
    net = limited()
    torch.nn.init.zeros_(net.to_logits.weight)
    torch.nn.init.zeros_(net.to_logits.bias)
    scored = net.score(some_ids(50))
    assert scored.bits_per_byte == pytest.approx(math.log2(V))
    assert scored.bits == pytest.approx(50 * math.log2(V))
    assert repr(scored) == "Score(50 bytes, 4.2479 bits per byte)"


# -- Windows ---------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(data=st.data(), is_limited=st.booleans())
def test_each_byte_is_scored_once_with_enough_before_it(
    data: st.DataObject, is_limited: bool
) -> None:
    net = limited() if is_limited else endless()
    length = data.draw(st.integers(1, 12), label="length")
    stride = data.draw(st.integers(1, length), label="stride")
    count = data.draw(st.integers(0, 40), label="bytes")
    before = data.draw(st.integers(0, 20), label="given")
    batch = data.draw(st.sampled_from([1, 30, 1 << 16]), label="batch_bytes")
    ids = some_ids(before + count, seed=count)
    scored = net.score(ids[before:], ids[:before], length=length, stride=stride, batch_bytes=batch)
    expected = []
    at = before
    while at < len(ids):  # the rule, written out
        end = min(max(at + stride, length), len(ids))
        begin = max(end - length, 0)
        assert at - begin >= min(at, length - stride)
        expected.append(session_says(net, ids[at:end], ids[begin:at]))
        at = end
    torch.testing.assert_close(
        scored.log_probs, torch.cat([torch.empty(0), *expected]), **TOLERANCE
    )


def test_by_default_a_byte_has_half_a_context_before_it() -> None:
    net, ids = limited(), some_ids(40)
    log_probs = net.score(ids).log_probs
    assert torch.equal(log_probs, net.score(ids, length=12, stride=6).log_probs)
    torch.testing.assert_close(log_probs[:12], net.score(ids[:12]).log_probs, **TOLERANCE)


def test_attention_without_a_limit_has_windows_unless_a_length_says_otherwise() -> None:
    net, ids = model(transformer(pos_emb_type=None), seq_lens=[3, 4]), some_ids(40)
    assert net.max_length is None
    assert torch.equal(net.score(ids).log_probs, net.score(ids, length=12, stride=6).log_probs)
    whole = net.score(ids, length=10**30).log_probs
    torch.testing.assert_close(whole, session_says(net, ids, ids[:0]), **TOLERANCE)


def test_of_what_is_given_a_window_sees_the_end() -> None:
    net, ids = limited(), some_ids(50)
    scored = net.score(ids[48:], given=ids[:48])
    assert torch.equal(scored.log_probs, net.score(ids[48:], given=ids[38:48]).log_probs)


# -- Many texts ------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(data=st.data(), is_limited=st.booleans())
def test_each_text_of_a_list_is_scored_as_if_alone(data: st.DataObject, is_limited: bool) -> None:
    net = limited() if is_limited else endless()
    counts = data.draw(st.lists(st.integers(0, 45), max_size=8), label="bytes")
    batch = data.draw(st.sampled_from([1, 24, 50, 1 << 16]), label="batch_bytes")
    texts = [some_ids(count, seed) for seed, count in enumerate(counts)]
    given = [some_ids(count % 7, seed) for seed, count in enumerate(counts)]
    together = net.score(texts, given, batch_bytes=batch)
    assert isinstance(together, list) and len(together) == len(texts)
    for one, text, before in zip(together, texts, given, strict=True):
        alone = net.score(text, before)
        torch.testing.assert_close(one.log_probs, alone.log_probs, **TOLERANCE)


def test_a_batch_takes_in_no_more_bytes_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    net = limited()
    shapes = []
    attend = net.attend_global

    def watch(ids: torch.Tensor, tiles: TiledPass) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return attend(ids, tiles)

    monkeypatch.setattr(net, "attend_global", watch)
    net.score([some_ids(5)] * 10 + [some_ids(11)] * 3, batch_bytes=24)
    assert shapes == [(4, 4), (4, 4), (2, 4), (2, 12), (1, 12)]


def test_the_stages_below_see_only_patches_that_are_scored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = model(transformer(), seq_lens=[8, 4])
    rows = []
    local = net.stage_models[-1]
    local.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    net.score(some_ids(6), given=some_ids(20))
    assert max(rows) == 3  # of seven


def test_texts_as_people_have_them() -> None:
    net, data = model(transformer(), seq_lens=[8, 4], num_tokens=257), b"The cat"
    expected = net.score(data, given=data)
    forms: list[Any] = ["The cat", list(data), tuple(data), torch.tensor([list(data)])]
    for form in forms:
        one, (listed,) = net.score(form, given=form), net.score([form], given=form)
        assert isinstance(one, Score) and torch.equal(one.log_probs, expected.log_probs)
        assert torch.equal(listed.log_probs, expected.log_probs)


# -- Bad input -------------------------------------------------------------------------------------


def test_of_no_bytes() -> None:
    net = limited()
    for nothing in (b"", "", torch.empty(0, dtype=torch.long)):
        scored = net.score(nothing, given=[1, 2])
        assert (len(scored), str(scored.bits), scored.is_greedy) == (0, "0.0", True)
        assert math.isnan(scored.bits_per_byte)
    assert net.score([]) == []
    assert [len(s) for s in net.score([b"", b"\x01"])] == [0, 1]


@pytest.mark.parametrize(
    "data, arguments, message",
    [
        ([19], {}, r"data: token id 19 at position \(0,\) is outside \[0, 19\)"),
        ([[1], [2, 30]], {}, r"data\[1\]: token id 30"),
        ([1], {"given": [-1]}, "given: token id -1"),
        ([[1], [2]], {"given": [[3], [33]]}, r"given\[1\]: token id 33"),
        ([[1], [2]], {"given": [b"\x01"]}, "given: expected a list of 2, one for each text, got"),
        ([1], {"given": [b"\x01"]}, "given: expected one text, got a list of 1"),
        ([[1, 2.5]], {}, r"data\[0\]\[1\]: expected an integer, got 2.5"),
        (None, {}, "data: expected bytes, text or token ids, got NoneType"),
        ([1], {"length": 0}, "length: expected a number from 1 to 12, the model's context, got 0"),
        ([1], {"length": 13}, "length: expected a number from 1 to 12"),
        ([1], {"stride": 0}, "stride: expected a number from 1 to 12, the length of a window"),
        ([1], {"length": 5, "stride": 6}, "stride: expected a number from 1 to 5"),
        ([1], {"batch_bytes": 0}, "batch_bytes: expected a number >= 1, got 0"),
    ],
    ids=str,
)
def test_bad_input_is_refused(data: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        limited().score(data, **arguments)


def test_what_is_no_decoder_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model: expected an mblm\.MBLM, got MBLMEncoder"):
        score(encoder(seq_lens=[3, 4]), b"\x01")


# -- Models of all sorts ---------------------------------------------------------------------------


def test_hooks_are_called_and_the_mode_is_left() -> None:
    net, ids = endless(), some_ids(61)
    expected = net.score(ids, batch_bytes=16).log_probs
    for stage in net.stage_models:
        stage.register_forward_hook(lambda _, inputs, output: output * 2)
    hooked = net.train().score(ids, batch_bytes=16).log_probs
    assert net.training and not torch.allclose(hooked, expected)
    torch.testing.assert_close(hooked, session_says(net, ids, ids[:0]), **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    net, ids = endless(), some_ids(40)
    expected = net.score(ids).log_probs
    found = net.to(dtype).score(ids).log_probs
    assert found.dtype == torch.float32
    tolerance = 0.2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_scores_are_of_use_outside_of_inference_mode() -> None:
    net = limited()
    with torch.inference_mode():
        scored = net.score(some_ids(20))
    weights = torch.ones(20, requires_grad=True)
    (weights * scored.log_probs).sum().backward()
    assert torch.equal(weights.grad, scored.log_probs)


def test_a_stage_of_the_user_that_is_recurrent_has_no_windows() -> None:
    net = model(LSTMBlock(with_hook=True), transformer(), seq_lens=[3, 4])
    ids = some_ids(40)
    assert not torch.equal(net.score(ids).log_probs, net.score(ids, length=40).log_probs)
    net.stage_models[0].is_recurrent = True
    expected = session_says(net, ids, ids[:0])
    torch.testing.assert_close(net.score(ids, batch_bytes=9).log_probs, expected, **TOLERANCE)
