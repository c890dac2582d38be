"""What stage models offer to decoding: states that continue, stack, split, and are named."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from tests.models import LSTMWithHook, mamba, transformer

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
BUILT_IN: dict[str, Any] = {
    "transformer": lambda: transformer().to_model(8, 2),
    "transformer without rotary": lambda: transformer(attn_use_rot_embs=False).to_model(8, 1),
    "mamba1": lambda: mamba("mamba1").to_model(8, 2),
    "mamba2": lambda: mamba("mamba2").to_model(8, 2),
}
STAGES = {**BUILT_IN, "lstm with hook": lambda: LSTMWithHook(8, 2)}


@pytest.fixture
def stage(request: pytest.FixtureRequest) -> nn.Module:
    return request.param().eval()


any_stage = pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES, indirect=True)
built_in = pytest.mark.parametrize("stage", BUILT_IN.values(), ids=BUILT_IN, indirect=True)


@any_stage
@torch.inference_mode()
@pytest.mark.parametrize("cuts", [[12], [1] * 12, [5, 1, 1, 5], [1, 11], [11, 1]], ids=str)
def test_in_pieces_it_is_the_forward_pass(stage: Any, cuts: list[int]) -> None:
    x, state, outputs = torch.randn(3, 12, 8), None, []
    for part in x.split(cuts, dim=1):
        y, state = stage.forward_with_state(part, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), stage(x), **CLOSE)


@any_stage
@torch.inference_mode()
def test_a_state_is_never_written_to(stage: Any) -> None:
    x = torch.randn(2, 9, 8)
    expected = stage(x)[:, 4:]
    _, state = stage.forward_with_state(x[:, :4], None)
    for _ in range(3):
        _, later = stage.forward_with_state(torch.randn(2, 70, 8), state)
        stage.forward_with_state(torch.randn(2, 1, 8), later)
        y, _ = stage.forward_with_state(x[:, 4:], state)
        torch.testing.assert_close(y, expected, **CLOSE)


@built_in
@torch.inference_mode()
def test_states_at_different_positions_are_one_and_parted_again(stage: Any) -> None:
    rows = [torch.randn(1, length, 8) for length in (3, 9, 5)]
    more = torch.randn(3, 4, 8)
    states = [stage.forward_with_state(row, None)[1] for row in rows]
    for _ in range(2):  # a second time with the parts of what was stacked
        y, stacked = stage.forward_with_state(more, stage.stack_states(states))
        for index, row in enumerate(rows):
            expected = stage(torch.cat((row, more[index : index + 1]), dim=1))[:, -4:]
            torch.testing.assert_close(y[index : index + 1], expected, **CLOSE)
        states = stage.split_state(stacked)
        rows = [torch.cat((row, more[i : i + 1]), dim=1) for i, row in enumerate(rows)]


@built_in
@torch.inference_mode()
def test_a_state_comes_back_from_its_named_tensors(stage: Any) -> None:
    x = torch.randn(1, 9, 8)
    _, state = stage.forward_with_state(x[:, :5], None)
    tensors = stage.state_tensors(state)
    again = stage.state_of(tensors, 5)
    got, want = (stage.forward_with_state(x[:, 5:], s)[0] for s in (again, state))
    assert torch.equal(got, want)
    for name, tensor in tensors.items():
        for wrong in (tensor[..., :-1], tensor[None], tensor.long(), None):
            with pytest.raises(ValueError, match=name):
                stage.state_of({**tensors, name: wrong}, 5)


@built_in
def test_a_layer_that_is_checkpointed_continues_the_state_it_was_given(stage: Any) -> None:
    """Activation checkpointing computes a layer again, after its first call has given a state."""
    x = torch.randn(2, 9, 8)

    def gradients() -> tuple[torch.Tensor, ...]:
        _, state = stage.forward_with_state(x[:, :5], None)
        y, _ = stage.forward_with_state(x[:, 5:], state)
        return torch.autograd.grad(y.square().sum(), list(stage.parameters()))

    expected = gradients()
    for index, layer in enumerate(stage.layers):
        if isinstance(layer, nn.ModuleList):  # a Transformer's attention and feed-forward
            stage.layers[index] = nn.ModuleList(map(checkpoint_wrapper, layer))
        else:
            stage.layers[index] = checkpoint_wrapper(layer)
    torch.testing.assert_close(gradients(), expected, **CLOSE)
