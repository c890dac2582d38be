"""Runs on a GPU against PyTorch on the same device: the same bytes, whatever comes.

They run where there is a GPU, and where the kernels are compiled to be emulated on the CPU, which a
slow test of tests/packaging/test_cuda_sources.py does.
"""

import io
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from mblm import MBLM
from mblm.inference.sampling import Sampler
from mblm.inference.session import Session
from mblm.ops import _native
from mblm.ops.packing import round_weight
from mblm.utils.stream import ByteStreamer
from tests.inference.test_native_run import in_pytorch
from tests.models import mamba, model, transformer

KIND = torch.ops.mblm.device_kind() if _native.is_loaded() else ""
IS_EMULATED = KIND == "cpu"
CAN_RUN = IS_EMULATED or (KIND == "cuda" and torch.cuda.is_available())
pytestmark = [
    pytest.mark.skipif(not CAN_RUN, reason="neither a GPU nor kernels compiled to be emulated"),
    *([] if IS_EMULATED else [pytest.mark.gpu]),
]
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(IS_EMULATED, reason="a GPU's streams and graphs")]

CLOSE = {"atol": 1e-4, "rtol": 1e-3}
STAGES: dict[str, Any] = {
    "transformer": lambda: transformer(attn_head_dims=6, attn_num_heads=2),
    "rope": lambda: transformer(
        attn_head_dims=5, attn_use_rot_embs=False, pos_emb_type="rope", attn_num_heads=1
    ),
    "mamba1": lambda: mamba("mamba1", d_state=5),
    "mamba2": lambda: mamba("mamba2", d_state=5, d_conv=1),
}
VOCABULARY = 19
PROMPT = bytes([3])
SAMPLING: dict[str, dict[str, Any]] = {
    "likeliest": {},
    "top_k": {"filter_thres": 0.5, "temperature": 0.8},
    "top_p": {"top_p": 0.8},
}


def build(*names: str, seq_lens: list[int], width: int = 12, device: str = KIND) -> MBLM:
    torch.manual_seed(0)
    return model(
        *[STAGES[name]() for name in names],
        seq_lens=seq_lens,
        hidden_dims=[width] * len(names),
        num_layers=[2, *[1] * (len(names) - 1)],
        num_tokens=VOCABULARY,
    ).to(device)


def numbers(seed: int = 1) -> torch.Generator:
    return torch.Generator(KIND).manual_seed(seed)


def is_native(session: Session) -> bool:
    run = session._cache.device_run
    return run is not None and run.runs(session._cache)


@torch.inference_mode()
def check_equal(got: Session, want: Session) -> None:
    assert got.length == want.length
    torch.testing.assert_close(got.logits(), want.logits(), **CLOSE)


@pytest.mark.parametrize(
    ("upper", "local", "sampling"),
    [
        ("transformer", "mamba1", "likeliest"),
        ("mamba1", "mamba2", "top_k"),
        ("mamba2", "rope", "top_p"),
        ("rope", "transformer", "top_k"),
    ],
)
def test_every_stage_above_every_other(upper: str, local: str, sampling: str) -> None:
    m = build(upper, local, seq_lens=[5, 4])
    prompt = torch.randint(0, VOCABULARY - 1, (3, 6))
    native, plain = Session(m, 3), Session(m, 3)
    native.feed(prompt)
    with torch.inference_mode():
        assert is_native(native)
    got = native.generate(13, **SAMPLING[sampling], generator=numbers())
    with in_pytorch():
        plain.feed(prompt)
        want = plain.generate(13, **SAMPLING[sampling], generator=numbers())
    assert torch.equal(got, want)
    check_equal(native, plain)


@pytest.mark.parametrize("fed", [0, 1, 3, 4, 11, 12, 23, 24])
def test_three_stages_from_any_length(fed: int) -> None:
    m = build("mamba2", "transformer", "mamba1", seq_lens=[6, 3, 4])
    prompt = torch.randint(0, VOCABULARY - 1, (1, fed))
    native, plain = Session(m), Session(m)
    got, want = [], []
    for count in [2, 1, 19]:
        got.append(native.feed(prompt).generate(count, generator=numbers(), filter_thres=0.3))
        with in_pytorch():
            want.append(plain.feed(prompt).generate(count, generator=numbers(), filter_thres=0.3))
        prompt = prompt[:, :0]
    assert torch.equal(torch.cat(got, dim=1), torch.cat(want, dim=1))
    check_equal(native, plain)


@pytest.mark.parametrize("seq_lens", [[2, 1], [1, 40], [3, 1, 2]])
def test_patches_of_any_length(seq_lens: list[int]) -> None:
    """One byte; more than are queued at once."""
    names = ["transformer", "rope", "mamba1"][: len(seq_lens)]
    m = build(*names, seq_lens=seq_lens)
    native, plain = Session(m).feed(PROMPT), Session(m).feed(PROMPT)
    count = m.context_size - 1
    got = native.generate(count)
    with in_pytorch():
        want = plain.generate(count)
    assert torch.equal(got, want)


def test_a_stage_alone_grows() -> None:
    m = build("rope", seq_lens=[3])
    native, plain = Session(m, 2), Session(m, 2)
    prompt = torch.randint(0, VOCABULARY - 1, (2, 50))
    native.feed(prompt)
    got = [native.generate(5), native.generate(35)]
    with in_pytorch():
        want = plain.feed(prompt).generate(40)
    assert torch.equal(torch.cat(got, dim=1), want)
    check_equal(native, plain)


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
@pytest.mark.parametrize("stage", STAGES)
@torch.inference_mode()
def test_weights_are_rounded_and_nothing_else(stage: str, weights: str) -> None:
    m, rounded = (build(stage, stage, seq_lens=[5, 4]) for _ in range(2))
    for part in rounded.modules():
        if isinstance(part, torch.nn.Linear):
            weight, scale = round_weight(part.weight.data, weights)
            part.weight.data = weight.float() * (scale[:, None] if weights == "int8" else 1)
    session = Session(m, 2, weights=weights)
    ids = session.generate(11)
    hidden = session._cache.stages[-1].output
    with in_pytorch():
        plain = Session(rounded, 2).feed(ids)
        torch.testing.assert_close(rounded.to_logits(hidden), plain.logits(), **CLOSE)


@pytest.mark.parametrize("names", [["mamba2", "transformer"], ["transformer", "mamba1", "mamba2"]])
def test_an_end_leaves_what_a_shorter_run_does(names: list[str]) -> None:
    """At every byte: in the middle of what is queued, at its beginning, at a patch's end."""
    m = build(*names, seq_lens=[5, 2, 3][-len(names) :])
    sampling = {"filter_thres": 0.0}
    everything = Session(m).feed(PROMPT).generate(13, **sampling, generator=numbers())[0].tolist()
    for last, ending in enumerate(everything):
        if ending in everything[:last]:
            continue
        ends = torch.zeros(VOCABULARY, dtype=torch.bool)
        ends[ending] = True
        session, generator = Session(m).feed(PROMPT), numbers()
        sampler = Sampler(**sampling, generator=generator)
        with torch.inference_mode():
            run = session.sample(13, sampler, ends)
            got = list(islice(run, last + 1))
            run.close()
        assert [int(token) for token in got] == everything[: last + 1]
        assert session.length == 1 + last
        other, other_generator = Session(m).feed(PROMPT), numbers()
        other.generate(last + 1, **sampling, generator=other_generator)
        assert torch.equal(generator.get_state(), other_generator.get_state())
        session.feed(bytes([ending]))
        check_equal(session, other)
        # Both go on alike.
        assert torch.equal(session.generate(6), other.generate(6))


def test_an_end_that_is_none_is_gone_past() -> None:
    """As that of a stop string of which only the last byte was seen."""
    m = build("mamba1", "transformer", seq_lens=[5, 3])
    sampler = {"filter_thres": 0.0}
    want = Session(m).feed(PROMPT).generate(13, **sampler, generator=numbers())[0].tolist()
    ends = torch.zeros(VOCABULARY, dtype=torch.bool)
    ends[want[1::3]] = True
    session = Session(m).feed(PROMPT)
    with torch.inference_mode():
        got = [
            int(token)
            for token in session.sample(13, Sampler(**sampler, generator=numbers()), ends)
        ]
    assert got == want


def test_who_goes_away_leaves_a_session_of_what_was_taken_in() -> None:
    m = build("mamba2", "transformer", seq_lens=[5, 3])
    everything = Session(m).feed(PROMPT).generate(14)
    for taken in range(8):
        session = Session(m).feed(PROMPT)
        with torch.inference_mode():
            run = session.sample(14, Sampler())
            list(islice(run, taken))
            run.close()
        other = Session(m).feed(PROMPT).feed(everything[:, : session.length - 1])
        check_equal(session, other)


def test_forks_and_files(tmp_path: Path) -> None:
    m = build("transformer", "mamba2", "transformer", seq_lens=[5, 2, 3])
    session = Session(m, 2).feed(torch.randint(0, VOCABULARY - 1, (2, 4)))
    session.generate(7)
    twin = session.fork()
    session.save(tmp_path / "s")
    want = session.generate(10)
    assert torch.equal(twin.generate(10), want)
    loaded = Session.load(tmp_path / "s", m)
    assert torch.equal(loaded.generate(10), want)
    check_equal(twin, session)
    check_equal(loaded, session)


def test_a_stream_gets_the_bytes() -> None:
    m = build("mamba1", "transformer", seq_lens=[5, 3])
    file = io.BytesIO()
    with ByteStreamer(file) as stream:
        out = m.generate(torch.tensor([3]), stream=stream, num_tokens_to_generate=11)
    assert list(file.getvalue()) == out[1:].tolist()


class TestRefuses:
    """The compiled run trusts nothing that it is given."""

    @pytest.fixture
    def bound(self) -> Any:
        session = Session(build("mamba1", "transformer", seq_lens=[5, 3])).feed(PROMPT)
        session.generate(5)
        return session._cache.device_run._bound  # type: ignore[union-attr]

    @pytest.mark.parametrize("slot", [-1, 32])
    def test_a_slot_that_is_not_there(self, bound: Any, slot: int) -> None:
        with pytest.raises(ValueError, match=r"slot must be in \[0, 32\), got"):
            bound._compiled.step_and_sample(slot)

    def test_a_stage_that_is_not_there(self, bound: Any) -> None:
        with pytest.raises(ValueError, match="stage must be above the local one, got 1"):
            bound._compiled.take_patch(1)
        with pytest.raises(ValueError, match="stage must be below another, got 0"):
            bound._compiled.begin_anew(0)

    def test_tensors_that_do_not_fit(self, bound: Any) -> None:
        native = Session(bound.model)._cache.device_run._native.compiled  # type: ignore[union-attr]
        tensors = [bound.flags, bound.settings, bound.ends, bound.next]
        with pytest.raises(ValueError, match="tensors must hold more than 4"):
            torch.ops.mblm.device_run(native, tensors, [2, 4], [64, 3])
        with pytest.raises(ValueError, match=r"settings must have shape \[3\], got \[2\]"):
            torch.ops.mblm.device_run(
                native, [bound.flags, bound.settings[:2], bound.ends], [2, 4], [64, 3]
            )
        with pytest.raises(TypeError, match="flags must be Int, got Long"):
            torch.ops.mblm.device_run(native, [bound.flags.long()], [2, 4], [64, 3])


class TestGpu:
    """What only a GPU can get wrong."""

    pytestmark = on_gpu

    @pytest.mark.parametrize("batch", [1, 3, 64])
    @pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
    def test_graphs_give_the_bits_of_single_launches(self, weights: str, batch: int) -> None:
        m = build("mamba2", "transformer", seq_lens=[30, 8], width=96)
        prompt = torch.randint(0, VOCABULARY - 1, (batch, 9))

        def generate(graphs: bool, dependent: bool) -> torch.Tensor:
            session = Session(m, batch, weights=weights).feed(prompt)
            session._cache.device_run.graphs = graphs  # type: ignore[union-attr]
            torch.ops.mblm.set_dependent_launches(dependent)
            try:
                return session.generate(100, filter_thres=0.0, generator=numbers())
            finally:
                torch.ops.mblm.set_dependent_launches(True)

        want = generate(graphs=False, dependent=False)
        assert torch.equal(generate(graphs=True, dependent=False), want)
        assert torch.equal(generate(graphs=False, dependent=True), want)
        for _ in range(3):
            assert torch.equal(generate(graphs=True, dependent=True), want)

    def test_generation_equals_the_cpus(self) -> None:
        m = build("mamba2", "transformer", seq_lens=[30, 8], width=96)
        on_cpu = build("mamba2", "transformer", seq_lens=[30, 8], width=96, device="cpu")
        prompt = torch.randint(0, VOCABULARY - 1, (2, 5))
        got, want = Session(m, 2).feed(prompt), Session(on_cpu, 2).feed(prompt)
        assert torch.equal(got.generate(100).cpu(), want.generate(100))
        with torch.inference_mode():
            torch.testing.assert_close(got.logits().cpu(), want.logits(), **CLOSE)

    def test_sessions_on_several_streams(self) -> None:
        m = build("mamba2", "transformer", seq_lens=[30, 8])
        want = [Session(m).feed(bytes([n])).generate(60) for n in range(3)]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in range(3)]
        got = []
        for n, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got.append(Session(m).feed(bytes([n])).generate(60))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

    def test_bytes_come_a_patch_late_at_most(self) -> None:
        """When a byte is seen, no more than the patch after it has been asked for."""
        m = build("mamba2", "transformer", seq_lens=[30, 8])
        session = Session(m).feed(PROMPT)
        with torch.inference_mode():
            run = session.sample(200, Sampler())
            for count, _ in enumerate(run, 1):
                if count == 100:
                    break
            run.close()
        assert session.length <= 1 + 100 + 2 * 8

    def test_a_fork_goes_on_beside_its_origin(self) -> None:
        m = build("mamba1", "transformer", seq_lens=[30, 8])
        session = Session(m).feed(PROMPT)
        session.generate(33)
        twin = session.fork()
        assert torch.equal(twin.generate(60), session.generate(60))
