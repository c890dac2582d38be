"""Stages that Python steps: how each is called, and what of a state is stacked, kept and saved."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.distributed.utils import _apply_to_tensors

from mblm.inference.hosted import HostedStage
from tests.models import LSTM, LSTMWithHook, mamba, transformer

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
DIM = 8


class StackingLSTM(LSTMWithHook):
    """A user's stage whose states can be stacked."""

    stacked = 0

    def stack_states(self, states: Any) -> Any:
        self.stacked += 1
        return tuple(torch.cat(parts, dim=1) for parts in zip(*states, strict=True))

    def split_state(self, state: Any) -> list[Any]:
        return list(zip(*(part.split(1, dim=1) for part in state), strict=True))


STAGES: dict[str, Any] = {
    "transformer": lambda: transformer().to_model(DIM, 2),
    "transformer without rotary": lambda: transformer(attn_use_rot_embs=False).to_model(DIM, 1),
    "mamba1": lambda: mamba("mamba1").to_model(DIM, 2),
    "mamba2": lambda: mamba("mamba2").to_model(DIM, 2),
    "lstm with a state": lambda: LSTMWithHook(DIM, 2),
    "lstm whose states stack": lambda: StackingLSTM(DIM, 2),
    "lstm": lambda: LSTM(DIM, 2),
}
any_stage = pytest.mark.parametrize("make", STAGES.values(), ids=STAGES)


def whole(stage: nn.Module, start: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What a stage gives after the start token, for one row ``x (S, D)``."""
    out: torch.Tensor = stage(torch.cat((start, x))[None])[0, 1:]
    return out


@any_stage
@torch.inference_mode()
def test_rows_at_different_positions(make: Any) -> None:
    """Each is as if alone, whoever is beside it, and the states before stay as they are."""
    stage, start = make().eval(), torch.randn(1, DIM)
    host = HostedStage(stage, start)
    torch.testing.assert_close(host.start_output, stage(start[None])[0], **CLOSE)
    x = torch.randn(4, 30, DIM)
    positions, states = [0] * 4, [host.start] * 4
    for rows, count in (([0], 3), ([0, 1, 2], 1), ([3, 1], 20), ([0, 1, 2, 3], 2), ([0, 1], 1)):
        new = torch.stack([x[row, positions[row] : positions[row] + count] for row in rows])
        for _ in range(2):  # the same again from the same states
            y, after = host.advance([states[row] for row in rows], new)
        for index, row in enumerate(rows):
            states[row], positions[row] = after[index], positions[row] + count
            want = whole(stage, start, x[row, : positions[row]])[-count:]
            torch.testing.assert_close(y[index], want, **CLOSE)


@torch.inference_mode()
def test_nothing_is_stacked_as_long_as_the_same_rows_come_in_order() -> None:
    stage = StackingLSTM(DIM, 1)
    host = HostedStage(stage, torch.randn(1, DIM))
    states = [host.start] * 3
    for _ in range(5):
        _, states = host.advance(states, torch.randn(3, 1, DIM))
    assert stage.stacked == 1
    host.advance(states[:2], torch.randn(2, 1, DIM))
    host.advance(states[::-1], torch.randn(3, 1, DIM))
    assert stage.stacked == 3


class TestHooks:
    """A stage with hooks is called; what they give is what counts."""

    @any_stage
    @torch.inference_mode()
    def test_from_the_beginning(self, make: Any) -> None:
        stage, start, x = make().eval(), torch.randn(1, DIM), torch.randn(2, 5, DIM)
        seen: list[Any] = []
        stage.register_forward_hook(lambda _, args, out: seen.append(type(out)) or 2 * out)
        host = HostedStage(stage, start)
        y, states = host.advance([host.start] * 2, x[:, :3])
        y, _ = host.advance(states, x[:, 3:])
        assert set(seen) == {torch.Tensor}, "activations, and no states"
        for row in range(2):
            torch.testing.assert_close(y[row], whole(stage, start, x[row])[3:], **CLOSE)

    @pytest.mark.parametrize("kind", ["transformer", "mamba1", "mamba2"])
    @torch.inference_mode()
    def test_that_make_anew_what_holds_tensors(self, kind: str) -> None:
        """As PyTorch's FullyShardedDataParallel does with arguments, to cast them."""
        stage, start, x = STAGES[kind]().eval(), torch.randn(1, DIM), torch.randn(1, 5, DIM)
        handle = stage.register_forward_pre_hook(
            lambda _, *given: _apply_to_tensors(torch.clone, given), with_kwargs=True
        )
        host = HostedStage(stage, start)
        y, states = host.advance([host.start], x[:, :3])
        y = torch.cat((y, host.advance(states, x[:, 3:])[0]), dim=1)
        handle.remove()
        host = HostedStage(stage, start)
        torch.testing.assert_close(y, host.advance([host.start], x)[0], **CLOSE)

    @pytest.mark.parametrize("kind", ["transformer", "mamba1", "mamba2", "lstm"])
    @torch.inference_mode()
    def test_that_come_and_go(self, kind: str) -> None:
        stage, x = STAGES[kind]().eval(), torch.randn(1, 3, DIM)
        host = HostedStage(stage, torch.randn(1, DIM))
        (want, _), calls = host.advance([host.start], x), []
        handle = stage.register_forward_hook(lambda *_: calls.append(1))
        torch.testing.assert_close(host.advance([host.start], x)[0], want)
        assert calls
        handle.remove()
        count = len(calls)
        host.advance([host.start], x)
        assert len(calls) == count

    @torch.inference_mode()
    def test_that_a_stage_with_a_state_of_the_users_would_not_call(self) -> None:
        stage = LSTMWithHook(DIM, 1)
        host = HostedStage(stage, torch.randn(1, DIM))
        handle = stage.register_forward_hook(lambda *_: None)
        with pytest.raises(RuntimeError, match="a hook was added to a LSTMWithHook after decoding"):
            host.advance([host.start], torch.randn(1, 1, DIM))
        handle.remove()
        host.advance([host.start], torch.randn(1, 1, DIM))


class Doubled(type(STAGES["transformer"]())):  # type: ignore[misc]
    """A user's stage that adds to a built-in one."""

    def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        return 2 * super().forward(x, **options)


class TestWhatIsNotAsBuilt:
    """It is called as the module that it is, on all inputs so far."""

    def check(self, stage: nn.Module) -> None:
        start, x = torch.randn(1, DIM), torch.randn(2, 5, DIM)
        host = HostedStage(stage.eval(), start)
        _, states = host.advance([host.start] * 2, x[:, :3])
        y, _ = host.advance(states, x[:, 3:])
        for row in range(2):
            torch.testing.assert_close(y[row], whole(stage, start, x[row])[3:], **CLOSE)

    @torch.inference_mode()
    def test_a_subclass(self) -> None:
        self.check(
            Doubled(model_dim=DIM, num_layers=1, attn_head_dim=4, attn_num_heads=2, ff_mult=2)
        )

    @pytest.mark.parametrize("kind", ["transformer", "mamba1", "mamba2", "lstm with a state"])
    @torch.inference_mode()
    def test_a_forward_of_the_instance(self, kind: str) -> None:
        stage = STAGES[kind]()
        original = stage.forward
        stage.forward = lambda x: 2 * original(x)
        self.check(stage)

    @torch.inference_mode()
    def test_a_layer_of_another_kind(self) -> None:
        class Attention(nn.Module):
            def __init__(self, own: nn.Module) -> None:
                super().__init__()
                self.own = own

            def forward(self, x: torch.Tensor, rotary: Any, mask: Any = None) -> torch.Tensor:
                return 2 * self.own(x, rotary, mask)

        stage = STAGES["transformer"]()
        stage.layers[0][0] = Attention(stage.layers[0][0])
        self.check(stage)

    @torch.inference_mode()
    def test_rotary_positions_of_another_kind(self) -> None:
        class Rotary(nn.Module):
            def __init__(self, own: nn.Module) -> None:
                super().__init__()
                self.own = own

            def forward(self, first: int, count: int) -> Any:
                cos, sin = self.own(first, count)
                return 2 * cos, sin

        stage = STAGES["transformer"]()
        stage.rotary_emb = Rotary(stage.rotary_emb)
        self.check(stage)

    def test_what_is_in_a_wrapper_of_the_compilers_is_called(self) -> None:
        wrapper = nn.Identity()
        wrapper._orig_mod = STAGES["mamba1"]()
        assert HostedStage(wrapper, torch.randn(1, DIM)).stage is wrapper._orig_mod

    @pytest.mark.slow  # imports the compiler
    @pytest.mark.parametrize("kind", ["transformer", "mamba2", "lstm with a state"])
    @torch.inference_mode()
    def test_a_compiled_one_is_taken_out_of_its_wrapper(self, kind: str) -> None:
        stage = STAGES[kind]().eval()
        called: list[int] = []

        def backend(graph: Any, _: Any) -> Any:
            called.append(1)
            return graph

        host = HostedStage(torch.compile(stage, backend=backend), torch.randn(1, DIM))
        host.advance([host.start], torch.randn(1, 3, DIM))
        stage.compile(backend=backend)
        host.advance([host.start], torch.randn(1, 3, DIM))
        assert host.stage is stage and not called, "nothing is compiled for every length"


class Pair(NamedTuple):
    h: torch.Tensor
    rest: list[Any]


class Nested(LSTMWithHook):
    """Its state is a nest of every kind of thing that a nest may hold."""

    def forward_with_state(self, x: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        given = None if state is None else (state.h, state.rest[0][0])
        y, (h, c) = self.lstm(x, given)
        return y, Pair(h, [(c, None)])


class TestSaved:
    @any_stage
    @torch.inference_mode()
    def test_a_row_out_of_many_comes_back(self, make: Any) -> None:
        stage, start, x = make().eval(), torch.randn(1, DIM), torch.randn(3, 6, DIM)
        host = HostedStage(stage, start)
        _, states = host.advance([host.start] * 3, x[:, :4])
        saved = host.saved(states[1])
        loaded = host.loaded(saved, 5)
        for value in saved.values():
            if isinstance(value, torch.Tensor):
                value.zero_()  # the caller's own
        y, _ = host.advance([states[0], loaded], x[:2, 4:])
        torch.testing.assert_close(y[1], whole(stage, start, x[1])[4:], **CLOSE)

    @torch.inference_mode()
    def test_a_nest(self) -> None:
        stage = Nested(DIM, 1)
        host = HostedStage(stage, torch.randn(1, DIM))
        _, (state,) = host.advance([host.start], torch.randn(1, 4, DIM))
        loaded = host.loaded(host.saved(state), 5)
        assert type(loaded.whole) is Pair and type(loaded.whole.rest) is list
        x = torch.randn(1, 1, DIM)
        assert torch.equal(*(host.advance([s], x)[0] for s in (state, loaded)))

    @pytest.mark.parametrize(
        ("kind", "given", "words"),
        [
            ("lstm", {"state": torch.zeros(4, DIM)}, r"state: expected shape \(5, 8\), got \(4"),
            ("lstm", {"state": None}, "state: expected a tensor, got NoneType"),
            ("lstm", {}, "expected state, got nothing"),
            ("lstm with a state", {"h": torch.zeros(1)}, "expected state, got h"),
            ("lstm with a state", {"state": torch.zeros(3)}, "the stage cannot continue it"),
            ("lstm with a state", {"state": (torch.zeros(2, 1, 8), 3)}, "expected tensors, tuples"),
            ("mamba2", {"ssm": torch.zeros(1)}, "expected ssm, window, got ssm"),
        ],
    )
    @torch.inference_mode()
    def test_what_does_not_fit_is_refused(self, kind: str, given: Any, words: str) -> None:
        host = HostedStage(STAGES[kind]().eval(), torch.randn(1, DIM))
        with pytest.raises(ValueError, match=words):
            host.loaded(given, 5)
