"""Mamba-1 against mambapy, and continuing from a state."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mambapy.mamba import Mamba, MambaConfig

from mblm.model.mamba1 import Mamba1

SIZES = {"model_dim": 32, "num_layers": 2, "d_state": 8, "d_conv": 4, "expand": 2}


def make_pair(seed: int = 0) -> tuple[Mamba1, Mamba]:
    torch.manual_seed(seed)
    ours = Mamba1(**SIZES)
    torch.manual_seed(seed)
    theirs = Mamba(MambaConfig(d_model=32, n_layers=2, d_state=8, d_conv=4, expand_factor=2))
    return ours, theirs


def test_parameters_are_those_of_mambapy() -> None:
    ours, theirs = make_pair()
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("length", [1, 2, 65])
def test_forward_and_gradients_equal_mambapy(length: int) -> None:
    ours, theirs = make_pair()
    x = torch.randn(3, length, 32)
    y, expected = ours(x), theirs(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=2e-5)

    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        scale = other.grad.abs().max()
        assert (parameter.grad - other.grad).abs().max() <= 1e-4 * scale, name


@settings(max_examples=10, deadline=None)
@given(pieces=st.lists(st.integers(0, 9), min_size=1, max_size=6), rows=st.integers(1, 3))
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "autograd"])
def test_a_sequence_may_be_cut_anywhere(grad: bool, pieces: list[int], rows: int) -> None:
    model, _ = make_pair()
    x = torch.randn(rows, sum(pieces), 32)
    with torch.set_grad_enabled(grad):
        whole = model(x)
        state, outputs = None, []
        for piece in x.split(pieces, dim=1):
            y, state = model.forward_with_state(piece, state)
            outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=1e-4, atol=2e-5)


@torch.inference_mode()
@pytest.mark.parametrize("length", [1, 5])
def test_a_given_state_is_never_written(length: int) -> None:
    model, _ = make_pair()
    _, state = model.forward_with_state(torch.randn(2, 6, 32), None)
    before = [tuple(t.clone() for t in layer) for layer in state]
    x = torch.randn(2, length, 32)

    first, _ = model.forward_with_state(x, state)
    second, _ = model.forward_with_state(x, state)

    torch.testing.assert_close(list(state), before, rtol=0, atol=0)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_step_uses_the_weights_of_the_moment() -> None:
    model, _ = make_pair()
    x = torch.randn(1, 2, 32)
    with torch.no_grad():
        _, state = model.forward_with_state(x[:, :1], None)
        model.forward_with_state(x[:, 1:], state)
        for parameter in model.parameters():
            parameter.data.mul_(0.5)
        _, state = model.forward_with_state(x[:, :1], None)
        y, _ = model.forward_with_state(x[:, 1:], state)
        torch.testing.assert_close(y, model(x)[:, 1:], rtol=1e-4, atol=2e-5)


def test_gradients_flow_through_a_state() -> None:
    model, _ = make_pair()
    x = torch.randn(2, 9, 32)
    model(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    y_first, state = model.forward_with_state(x[:, :4], None)
    y_second, _ = model.forward_with_state(x[:, 4:], state)
    torch.cat([y_first, y_second], dim=1).square().sum().backward()

    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-4)


def test_bfloat16_model_keeps_a_float32_state() -> None:
    exact, _ = make_pair()
    model, _ = make_pair()
    model.bfloat16()
    x = torch.randn(2, 9, 32)

    y, state = model.forward_with_state(x.bfloat16(), None)
    y.float().sum().backward()

    assert y.dtype == torch.bfloat16
    assert {layer[0].dtype for layer in state} == {torch.float32}
    torch.testing.assert_close(y.float(), exact(x), rtol=0.05, atol=0.05)
    with torch.no_grad():
        y, state = model.forward_with_state(x[:, :1].bfloat16(), state)
    assert (y.dtype, state[0][0].dtype) == (torch.bfloat16, torch.float32)


def test_autocast_keeps_a_float32_state() -> None:
    model, _ = make_pair()
    x = torch.randn(2, 9, 32)
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        y, state = model.forward_with_state(x[:, :8], None)
        last, state = model.forward_with_state(x[:, 8:], state)
    assert {layer[0].dtype for layer in state} == {torch.float32}
    torch.testing.assert_close(torch.cat([y, last], dim=1), expected, rtol=0.05, atol=0.05)


def test_compiles_as_one_graph() -> None:
    model, _ = make_pair()
    x = torch.randn(2, 9, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("name", SIZES)
def test_sizes_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Mamba1(**(SIZES | {name: 0}))


def test_inputs_that_do_not_fit_are_refused() -> None:
    model, _ = make_pair()
    with pytest.raises(ValueError, match=r"x must be \(B, S, 32\), got shape \(2, 32\)"):
        model(torch.zeros(2, 32))
    with pytest.raises(ValueError, match="state must have 2 layers, got 0"):
        model.forward_with_state(torch.zeros(1, 1, 32), ())
