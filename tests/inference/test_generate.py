"""`MBLM.generate`: how it ends, what it streams and draws, and what it refuses beforehand."""

import errno
import io
import math
import sys
import time
from typing import Any

import pytest
import torch

from mblm import MBLM, MBLMReturnType
from tests import fresh
from tests.models import LSTMBlock, mamba, model, transformer

# How a reader may leave.
GONE = [
    BrokenPipeError(),
    ConnectionResetError(),
    ConnectionAbortedError(),
    OSError(errno.EPIPE, ""),
]
PROMPT = torch.tensor([3, 1, 4, 1, 5])


@pytest.fixture
def m() -> MBLM:
    """A context of 30 bytes, which fixed positions limit."""
    return model(transformer(), transformer(), seq_lens=[6, 5])


class Recorder:
    """Stands for a `ByteStreamer`; knows what was written when."""

    def __init__(
        self,
        fails_after: int | None = None,
        error: BaseException | None = None,
        fails_at_flush: BaseException | None = None,
    ) -> None:
        self.written: list[int] = []
        self.flushed = 0
        self.fails_after, self.error = fails_after, error
        self.fails_at_flush = fails_at_flush

    def write(self, value: int) -> None:
        if self.error is not None and len(self.written) == self.fails_after:
            raise self.error
        self.written.append(value)

    def flush(self) -> None:
        if self.fails_at_flush is not None:
            raise self.fails_at_flush
        self.flushed += 1


def generate(m: MBLM, prime: Any = PROMPT, **arguments: Any) -> list[int]:
    out = m.generate(prime, enable_progress=False, **arguments)
    assert out.ndim == 1 and out.dtype == torch.long
    return out.tolist()


def sampled(m: MBLM, **arguments: Any) -> list[int]:
    """Bytes that depend on the seed, after the prompt."""
    return generate(m, **{"seed": 1, "filter_thres": 0.0, "temperature": 3.0, **arguments})[5:]


def by_hand(
    m: MBLM, prime: torch.Tensor, count: int, thres: float, temperature: float
) -> list[int]:
    """The loop of the contract: the whole model over the whole sequence for every byte."""
    ids = prime[None]
    for _ in range(count):
        with torch.no_grad():
            logits = m(ids, return_type=MBLMReturnType.LOGITS)[:, -1]
        values, indices = logits.topk(max(int((1 - thres) * logits.shape[1]), 1))
        kept = torch.full_like(logits, -math.inf).scatter(1, indices, values)
        noise = torch.zeros(1, logits.shape[1]).uniform_()
        noise = -((-(noise.clamp(min=1e-20).log())).clamp(min=1e-20).log())
        ids = torch.cat((ids, (kept / temperature + noise).argmax(-1, keepdim=True)), dim=1)
    return ids[0].tolist()


@pytest.mark.parametrize("prompt_length", [0, 1, 4, 5, 6, 29])
@pytest.mark.parametrize("thres", [1.0, 0.5])
def test_equals_the_loop_over_the_whole_model(m: MBLM, prompt_length: int, thres: float) -> None:
    prime = torch.randint(0, 18, (prompt_length,))
    count = 30 - prompt_length
    torch.manual_seed(11)
    expected = by_hand(m, prime, count, thres, 0.8)
    state = torch.get_rng_state()
    torch.manual_seed(11)
    assert generate(m, prime, filter_thres=thres, temperature=0.8) == expected
    assert torch.equal(torch.get_rng_state(), state), "as many random numbers are drawn"


class TestLength:
    def test_default_is_the_context(self, m: MBLM) -> None:
        assert len(generate(m)) == len(generate(m, None)) == 30

    def test_default_is_the_context_where_nothing_limits_it(self) -> None:
        m = model(mamba("mamba1"), transformer(), seq_lens=[2, 3])
        assert len(generate(m)) == 6
        over = torch.arange(10)
        assert generate(m, over) == over.tolist()
        assert len(generate(m, over, num_tokens_to_generate=7)) == 17

    @pytest.mark.parametrize("count", [0, 1, 25])
    def test_is_as_asked(self, m: MBLM, count: int) -> None:
        out = generate(m, num_tokens_to_generate=count)
        assert len(out) == 5 + count and out[:5] == PROMPT.tolist()

    def test_a_prompt_that_fills_the_context(self, m: MBLM) -> None:
        full = torch.randint(0, 18, (30,))
        assert generate(m, full) == full.tolist()
        with pytest.raises(ValueError, match="1 bytes after a prompt of 30 exceed the context"):
            generate(m, full, num_tokens_to_generate=1)

    def test_a_model_of_one_byte(self) -> None:
        m = model(transformer(), seq_lens=[1])
        assert len(generate(m, None)) == 1


class TestEnd:
    def test_id_is_kept_and_streamed(self, m: MBLM) -> None:
        everything = sampled(m)
        end = everything[7]
        first = everything.index(end)
        stream = Recorder()
        assert sampled(m, end_of_gen_token_id=end, stream=stream) == everything[: first + 1]
        assert stream.written == everything[: first + 1] and stream.flushed == 1

    @pytest.mark.parametrize("length", [1, 2, 5, 9])
    def test_after_a_stop_string_which_is_kept(self, m: MBLM, length: int) -> None:
        everything = sampled(m)
        stop = bytes(everything[9 : 9 + length])
        ends = next(
            end for end in range(length, 26) if bytes(everything[end - length : end]) == stop
        )
        assert sampled(m, stop=[stop]) == everything[:ends]


class TestSeed:
    def test_means_what_manual_seed_means(self, m: MBLM) -> None:
        torch.manual_seed(3)
        expected = sampled(m, seed=None)
        before = torch.get_rng_state()
        assert sampled(m, seed=3) == expected
        assert sampled(m, seed=None, generator=torch.Generator().manual_seed(3)) == expected
        assert torch.equal(torch.get_rng_state(), before), "the default generator is not touched"
        assert sampled(m, seed=4) != expected

    def test_a_generator_goes_on(self, m: MBLM) -> None:
        generator = torch.Generator().manual_seed(3)
        assert sampled(m, seed=None, generator=generator) != sampled(
            m, seed=None, generator=generator
        )


class TestStream:
    def test_gets_every_byte_and_a_flush(self, m: MBLM) -> None:
        stream = Recorder()
        out = generate(m, stream=stream)
        assert stream.written == out[5:] and stream.flushed == 1

    def test_gets_a_byte_before_the_next_where_that_takes_longer_than_20_ms(self, m: MBLM) -> None:
        stream, lengths = Recorder(), []

        def count(*_: Any) -> None:
            lengths.append(len(stream.written))
            time.sleep(0.021)

        m.to_logits.register_forward_pre_hook(count)
        generate(m, stream=stream, num_tokens_to_generate=6)
        assert lengths == [0, 1, 2, 3, 4, 5]

    @pytest.mark.parametrize("after", [0, 3])
    @pytest.mark.parametrize("error", GONE, ids=repr)
    def test_whose_reader_is_gone_ends_it(self, m: MBLM, after: int, error: OSError) -> None:
        stream = Recorder(after, error)
        out = generate(m, stream=stream)
        assert out == generate(m)[: len(out)] and out[5 : 5 + after] == stream.written

    @pytest.mark.parametrize("error", GONE, ids=repr)
    def test_whose_reader_is_gone_at_the_flush_ends_it(self, m: MBLM, error: OSError) -> None:
        assert len(generate(m, stream=Recorder(fails_at_flush=error))) == 30

    @pytest.mark.parametrize(
        "error", [OSError("disk full"), ValueError("closed"), KeyboardInterrupt()], ids=repr
    )
    def test_that_fails_does_not_lose_what_was_generated(
        self, m: MBLM, error: BaseException
    ) -> None:
        whole = generate(m)
        for recorder in (Recorder(3, error), Recorder(fails_at_flush=error)):
            with pytest.raises(type(error)) as caught:
                generate(m, stream=recorder)
            ids = caught.value.ids  # type: ignore[attr-defined]
            assert ids.tolist() == whole[: len(ids)] and len(ids) > 5 + len(recorder.written) - 1
            m(ids[None]).backward()


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [({}, True), ({"enable_progress": False}, False), ({"stream": Recorder()}, False)],
)
def test_progress_is_shown_unless_off_or_streaming(
    m: MBLM, arguments: dict[str, Any], shown: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    m.generate(PROMPT, num_tokens_to_generate=3, **arguments)
    captured = capsys.readouterr()
    assert ("3" in captured.err) == shown
    assert captured.out == ""


class TestPrompt:
    def test_is_not_written_to(self, m: MBLM) -> None:
        prime = PROMPT.clone()
        out = m.generate(prime, enable_progress=False)
        out[0] = 9
        assert torch.equal(prime, PROMPT)


class TestModes:
    def test_a_model_can_be_trained_on_what_it_generated(self, m: MBLM) -> None:
        out = m.train().generate(PROMPT, enable_progress=False)
        m(out[None]).backward()
        fed = m.session().feed(PROMPT).generate(7)
        m(fed).backward()
        assert m.to_logits.weight.grad is not None


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "error", "words"),
        [
            ({"prime": 3}, TypeError, "prime: expected bytes, text or token ids, got int"),
            ({"prime": b"abc"}, ValueError, "prime: token id 97 .* outside"),
            ({"prime": torch.zeros(31).long()}, ValueError, "prime: 31 bytes exceed .* 30 bytes"),
            ({"num_tokens_to_generate": 26}, ValueError, "26 bytes after a prompt of 5 exceed"),
            ({"num_tokens_to_generate": -1}, ValueError, "num_tokens_to_generate: .* >= 0, got -1"),
            ({"end_of_gen_token_id": "a"}, TypeError, "end_of_gen_token_id"),
            ({"temperature": "hot"}, TypeError, "temperature"),
            ({"colour": 1}, TypeError, "unexpected keyword argument 'colour'"),
            ({"max_bytes": 1}, TypeError, r"generate\(\) got an unexpected.*'max_bytes'"),
            ({"stream": sys.__stdout__}, TypeError, "stream: expected a ByteStreamer, got TextIO"),
            ({"stream": io.BytesIO()}, TypeError, "stream: .* wrap a file or a terminal"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
    )
    def test_is_named_before_anything_runs(
        self, m: MBLM, arguments: dict[str, Any], error: type[Exception], words: str
    ) -> None:
        for stage in m.stage_models:
            stage.forward = stage.forward_with_state = None  # whoever runs it, fails otherwise
        stream = Recorder()
        before = torch.get_rng_state()
        with pytest.raises(error, match=words):
            m.generate(**{"prime": PROMPT, "stream": stream, **arguments})
        assert stream.written == [] and torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_weights(self, m: MBLM, value: float) -> None:
        with torch.no_grad():
            m.stage_models[1].norm.g[2] = value
        with pytest.raises(ValueError, match=r"stage_models\.1\.norm\.g \(8,\) holds 1 NaN"):
            generate(m)


def test_a_custom_block_is_replayed_once_per_byte() -> None:
    m = model(LSTMBlock(), seq_lens=[12])
    calls: list[int] = []
    m.stage_models[0].register_forward_pre_hook(lambda _, x: calls.append(x[0].shape[1]))
    generate(m)
    assert calls == [1, 6, 7, 8, 9, 10, 11, 12]  # the start token, the prompt, then each byte


class TestCompiled:
    """Decoding is left to Python where `torch.compile` meets it."""

    def test_generate(self, m: MBLM) -> None:
        def generated_and_doubled(prime: torch.Tensor) -> torch.Tensor:
            ids = m.generate(prime + 1, num_tokens_to_generate=3, seed=1, enable_progress=False)
            return ids * 2

        compiled = torch.compile(generated_and_doubled, backend="eager")
        assert torch.equal(compiled(PROMPT), generated_and_doubled(PROMPT))

    def test_session(self, m: MBLM) -> None:
        def decode(ids: torch.Tensor) -> torch.Tensor:
            session = m.session()
            session.feed(ids + 1)
            fork = session.fork()
            return torch.cat([session.logits(), fork.generate(2, filter_thres=1.0)], dim=1)

        compiled = torch.compile(decode, backend="eager")
        assert torch.equal(compiled(PROMPT), decode(PROMPT))

    def test_the_compiler_is_not_imported_for_it(self) -> None:
        program = (
            "import sys; from tests.models import *; "
            "model(transformer(), seq_lens=[3, 4]).generate(num_tokens_to_generate=2); "
            "assert 'torch._dynamo' not in sys.modules"
        )
        fresh.output_of(program)
