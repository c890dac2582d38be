"""`MBLM.stream`: chunks as they come, whole characters, closed at any time, in an event loop."""

import asyncio
import contextlib
import functools
import gc
import io
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mblm import MBLM
from mblm.inference.continuation import Continuation
from mblm.inference.stream import Stream
from mblm.utils.stream import ByteStreamer
from tests.decoding import alone, in_pytorch
from tests.inference.test_continuation import Follows, words
from tests.models import mamba, model, transformer

V = 300  # of which 256 and more are no bytes
WISHES: dict[str, Any] = {"temperature": 2.0, "filter_thres": 0.0, "seed": 5, "max_bytes": 40}


@pytest.fixture(scope="module")
def m() -> MBLM:
    torch.manual_seed(0)
    return model(mamba(), transformer(), seq_lens=[40, 4], num_tokens=V, pad_token_id=256)


@pytest.fixture
def byte_by_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run ends after each byte."""
    run = functools.partialmethod(Continuation.run, seconds=0.0)
    monkeypatch.setattr(Continuation, "run", run)


def spells(data: bytes) -> dict[str, Any]:
    """Wishes by which these bytes are generated after an empty prompt."""

    def processor(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.arange(V) == data[len(ids)], 0.0, -torch.inf)

    return {"logits_processor": processor, "max_bytes": len(data)}


def written(data: bytes) -> str:
    """What a `ByteStreamer` makes of bytes."""
    with ByteStreamer(text := io.StringIO(), decode_utf8=True) as streamer:
        for byte in data:
            streamer.write(byte)
    return text.getvalue()


def generated(m: MBLM, prompt: Any = b"abc") -> list[int]:
    wishes = dict(WISHES)
    return alone(m, prompt, wishes.pop("max_bytes"), **wishes)


@pytest.mark.parametrize("engine", [contextlib.nullcontext, in_pytorch])
def test_is_what_generate_gives(m: MBLM, engine: Any, byte_by_byte: None) -> None:
    with engine():
        ids = generated(m)
        stream = m.stream("abc", log_probs=True, **WISHES)
        chunks = list(stream)
    data = bytes(token for token in ids if token < 256)
    assert b"".join(chunks) == data and {len(chunk) for chunk in chunks} == {1}
    result = stream.result
    assert result.ids.tolist() == ids and result.data == data
    assert result.prompt.tolist() == [97, 98, 99] and result.seed == 5
    assert result.finish_reason == "length" and result.error is None
    assert result.log_probs is not None and result.log_probs.shape == (40,)
    assert list(stream) == []


def test_nothing_is_computed_before_it_is_read(m: MBLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("mblm.inference.continuation.cache_for", None)
        stream = m.stream("abc", **WISHES)
        with pytest.raises(RuntimeError, match="the stream goes on"):
            _ = stream.result
    assert len(b"".join(stream)) > 0


TEXTS = [
    "né €uro 🙂🙃 x".encode(),
    b"a\xff\xc3(\xe2\x82b\xf0\x9f\x99",  # no UTF-8, and an incomplete end
    # The examples of the Unicode Standard, section 3.9, of what is replaced by how many U+FFFD.
    b"\xed\xa0\x80|\xf0\x80\x80A|\xe2\x80A|\xe1\x80\xe2\xf0\x91\x92\xf1\xbfA",
    b"\x80\x80",
    b"\xf0\x9f",
    "\x00\r\n\u2028\ufeff".encode(),
]


def test_a_prompt_may_change_once_it_was_given(m: MBLM) -> None:
    def writes(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        ids[:3] = 0
        return logits

    prompt = torch.tensor(list(b"abc"))
    stream = m.stream(prompt, logits_processor=writes, **WISHES)
    prompt.zero_()
    list(stream)
    assert stream.result.ids.tolist() == generated(m)
    assert stream.result.prompt.tolist() == [97, 98, 99]


class TestText:
    @pytest.mark.parametrize("data", TEXTS, ids=repr)
    def test_is_of_whole_characters(
        self, m: MBLM, data: bytes, request: pytest.FixtureRequest
    ) -> None:
        assert "".join(m.stream(b"", text=True, **spells(data))) == written(data)
        request.getfixturevalue("byte_by_byte")
        chunks = list(m.stream(b"", text=True, **spells(data)))
        assert "".join(chunks) == written(data) == data.decode(errors="replace")
        if (text := data.decode(errors="ignore")).encode() == data:
            assert chunks == list(text), "each character when its last byte has come"

    def test_after_half_a_character_in_the_prompt(self, m: MBLM) -> None:
        """The prompt is not given again, nor is a part of it."""
        processor = spells(b"\xc3\xa9!")["logits_processor"]
        text = "".join(m.stream(b"\xc3", text=True, logits_processor=processor, max_bytes=2))
        assert text == "\ufffd!"

    def test_keeps_a_stop_string(self, m: MBLM, byte_by_byte: None) -> None:
        stream = m.stream(b"", text=True, stop=["€"], **spells("5 € and more".encode()))
        assert "".join(stream) == "5 €" and stream.result.finish_reason == "stop"


class TestClosing:
    def test_ends_it_and_keeps_what_came(self, m: MBLM, byte_by_byte: None) -> None:
        stream = m.stream("abc", **WISHES)
        first = [next(stream), next(stream)]
        stream.close()
        assert list(stream) == []
        assert stream.result.finish_reason == "closed"
        assert stream.result.data == b"".join(first)
        stream.close()

    def test_by_leaving_its_context(self, m: MBLM, byte_by_byte: None) -> None:
        with m.stream("abc", **WISHES) as stream:
            for _ in stream:
                break
        with pytest.raises(ZeroDivisionError), m.stream("abc", **WISHES) as failed:
            1 / len(next(failed)[1:])
        assert stream.result.finish_reason == failed.result.finish_reason == "closed"

    def test_after_its_end_changes_nothing(self, m: MBLM) -> None:
        with m.stream("abc", **WISHES) as stream:
            list(stream)
        assert stream.result.finish_reason == "length"

    def test_lets_go_of_the_row(self, m: MBLM, byte_by_byte: None) -> None:
        stream = m.stream("abc", **WISHES)
        next(stream)
        assert stream._continuation is not None
        cache = weakref.ref(stream._continuation._cache)
        stream.close()
        gc.collect()
        assert cache() is None

    def test_from_another_thread_while_it_runs(self, m: MBLM) -> None:
        began, goes_on = threading.Event(), threading.Event()

        def waits(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            began.set()
            assert goes_on.wait(60)
            return logits

        endless = {**WISHES, "max_bytes": 10**6}
        stream = m.stream("abc", logits_processor=waits, **endless)
        chunks: list[Any] = []
        thread = threading.Thread(target=lambda: chunks.extend(stream))
        thread.start()
        assert began.wait(60)
        stream.close()
        goes_on.set()
        assert stream.result.finish_reason == "closed" and len(stream.result.ids) > 0
        thread.join()
        assert chunks == []


class Even(Follows):
    """Words of even ids, of a larger vocabulary."""

    def compile(self, num_tokens: int) -> Any:
        automaton = words(4)
        automaton.classes = (torch.arange(V) % 2).int()
        return Follows(automaton).compile(num_tokens)


class TestErrors:
    def test_are_raised_once_and_kept(self, m: MBLM, byte_by_byte: None) -> None:
        want = generated(m)

        def fails(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            if len(ids) == 3 + 5:
                raise RuntimeError("broken")
            return logits

        stream = m.stream("abc", logits_processor=fails, **WISHES)
        chunks: list[Any] = []
        with pytest.raises(RuntimeError, match="broken") as caught:
            chunks.extend(stream)
        assert list(stream) == []
        result = stream.result
        assert result.finish_reason == "error" and result.error is caught.value
        assert result.ids.tolist() == want[:5]

    def test_of_a_guide_that_is_asked_at_the_end_end_it(self, m: MBLM) -> None:
        class Fails(Even):
            def compile(self, num_tokens: int) -> Any:
                guide = super().compile(num_tokens)()
                guide.accepts = lambda: 1 / 0
                return lambda: guide

        stream = m.stream(b"", constraint=Fails(words(4)), max_bytes=3)
        with pytest.raises(ZeroDivisionError):
            list(stream)
        assert stream.result.finish_reason == "error" and len(stream.result.ids) == 3

    def test_of_weights_come_with_the_first_chunk(self) -> None:
        m = model(transformer(), seq_lens=[9])
        with torch.no_grad():
            m.to_logits.bias[3] = torch.nan
        stream = m.stream(b"")
        with pytest.raises(ValueError, match=r"to_logits\.bias"):
            next(stream)
        assert stream.result.finish_reason == "error"

    @pytest.mark.parametrize(
        ("arguments", "error", "words"),
        [
            ({"prompt": 3}, TypeError, "prompt: expected bytes, text or token ids, got int"),
            ({"prompt": [400]}, ValueError, "prompt: token id 400"),
            ({"max_bytes": -1}, ValueError, "max_bytes"),
            ({"num_tokens": 3}, TypeError, "unexpected .*'num_tokens'"),
        ],
        ids=str,
    )
    def test_of_bad_input_come_at_once(
        self, m: MBLM, arguments: dict[str, Any], error: type[Exception], words: str
    ) -> None:
        with pytest.raises(error, match=words):
            m.stream(**{"prompt": b"", **arguments})


def test_a_constraint_says_whether_it_is_matched(m: MBLM) -> None:
    stream = m.stream(b"", constraint=Even(words(4)), max_bytes=9)
    list(stream)
    assert stream.result.finish_reason == "matched" and stream.result.is_matched
    cut = m.stream(b"", constraint=Even(words(4)), max_bytes=3)
    list(cut)
    assert cut.result.finish_reason == "length" and cut.result.is_matched is False


class TestAsync:
    def test_gives_the_same(self, m: MBLM, byte_by_byte: None) -> None:
        async def read() -> list[Any]:
            return [chunk async for chunk in m.stream("abc", **WISHES)]

        assert asyncio.run(read()) == list(m.stream("abc", **WISHES))

    def test_several_at_once(self, m: MBLM) -> None:
        async def read(seed: int) -> bytes:
            stream = m.stream("abc", **{**WISHES, "seed": seed})
            return b"".join([chunk async for chunk in stream])  # type: ignore[arg-type]

        async def read_all() -> list[bytes]:
            return await asyncio.gather(*map(read, range(5)))

        want = [b"".join(m.stream("abc", **{**WISHES, "seed": seed})) for seed in range(5)]
        assert asyncio.run(read_all()) == want

    def test_leaves_the_event_loop_free(self, m: MBLM) -> None:
        """What is generated waits for what another task does."""
        may_go_on = threading.Event()

        def waits(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            assert may_go_on.wait(60), "the event loop is blocked"
            return logits

        async def read() -> int:
            asyncio.get_running_loop().call_later(0.01, may_go_on.set)
            stream = m.stream("abc", logits_processor=waits, **WISHES)
            return len([chunk async for chunk in stream])

        assert asyncio.run(read()) > 0

    def test_a_wait_that_is_cancelled_loses_nothing(self, m: MBLM, byte_by_byte: None) -> None:
        began, goes_on = threading.Event(), threading.Event()

        def waits(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            began.set()
            assert len(ids) != 3 + 4 or goes_on.wait(60)
            return logits

        async def read() -> bytes:
            stream = m.stream("abc", logits_processor=waits, **WISHES)
            data = b""
            with pytest.raises(asyncio.TimeoutError):
                while True:
                    data += await asyncio.wait_for(anext(stream), 0.2)  # type: ignore[operator]
            goes_on.set()
            async for chunk in stream:
                data += chunk  # type: ignore[operator]
            assert stream.result.finish_reason == "length"
            return data

        assert asyncio.run(read()) == b"".join(m.stream("abc", **WISHES))

    def test_closes(self, m: MBLM, byte_by_byte: None) -> None:
        async def read() -> list[Stream]:
            async with m.stream("abc", **WISHES) as left:
                async for _ in left:
                    break
            async with contextlib.aclosing(m.stream("abc", **WISHES)) as closed:
                await anext(closed)
            return [left, closed]

        for stream in asyncio.run(read()):
            assert stream.result.finish_reason == "closed" and len(stream.result.ids) >= 1

    def test_raises(self, m: MBLM) -> None:
        def fails(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            raise StopIteration  # which must not end it, nor does a future take it

        async def read() -> None:
            async for _ in m.stream("abc", logits_processor=fails, **WISHES):
                pass

        with pytest.raises(RuntimeError, match="StopIteration"):
            asyncio.run(read())
        with pytest.raises(RuntimeError, match="StopIteration"):
            list(m.stream("abc", logits_processor=fails, **WISHES))


def test_is_an_iterator(m: MBLM) -> None:
    stream = m.stream("abc", **WISHES)
    assert isinstance(stream, Iterator) and iter(stream) is stream and stream.__aiter__() is stream
