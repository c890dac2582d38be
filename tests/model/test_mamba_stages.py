"""What both Mamba stage models promise: causality, a state to continue from, precision."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mblm.model.mamba1 import Mamba1
from mblm.model.mamba2 import Mamba2

SIZES = {"model_dim": 32, "num_layers": 2, "d_state": 8, "d_conv": 4, "expand": 2}
CLOSE = {"rtol": 1e-4, "atol": 2e-5}

Model = Mamba1 | Mamba2
MAKERS: dict[str, Callable[[], Model]] = {
    "mamba1": lambda: Mamba1(**SIZES),
    "mamba2": lambda: Mamba2(**SIZES, headdim=16),
}


@pytest.fixture(params=MAKERS)
def model(request: pytest.FixtureRequest) -> Model:
    torch.manual_seed(0)
    return MAKERS[request.param]()


@settings(max_examples=10, deadline=None)
@given(pieces=st.lists(st.integers(0, 9), min_size=1, max_size=6), rows=st.integers(1, 3))
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "autograd"])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_sequence_may_be_cut_anywhere(
    kind: str, grad: bool, pieces: list[int], rows: int
) -> None:
    model = MAKERS[kind]()
    x = torch.randn(rows, sum(pieces), 32)
    with torch.set_grad_enabled(grad):
        whole = model(x)
        state, outputs = None, []
        for piece in x.split(pieces, dim=1):
            y, state = model.forward_with_state(piece, state)
            outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, **CLOSE)


def test_a_step_uses_the_weights_of_the_moment(model: Model) -> None:
    x = torch.randn(1, 2, 32)

    def last_output() -> Tensor:
        _, state = model.forward_with_state(x[:, :1], None)
        return model.forward_with_state(x[:, 1:], state)[0]

    with torch.no_grad():
        last_output()
        for parameter in model.parameters():
            parameter.data.mul_(0.5)
        torch.testing.assert_close(last_output(), model(x)[:, 1:], **CLOSE)


def test_gradients_flow_through_a_state(model: Model) -> None:
    x, weights = torch.randn(2, 9, 32), torch.randn(2, 9, 32)
    (model(x) * weights).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    y_first, state = model.forward_with_state(x[:, :4], None)
    y_second, _ = model.forward_with_state(x[:, 4:], state)
    (torch.cat([y_first, y_second], dim=1) * weights).sum().backward()

    for name, parameter in model.named_parameters():
        scale = expected[name].abs().max()
        assert (parameter.grad - expected[name]).abs().max() <= 1e-4 * scale, name


def test_a_bfloat16_model_keeps_a_float32_state(model: Model) -> None:
    x = torch.randn(2, 9, 32)
    expected = model(x)
    model.bfloat16()

    y, state = model.forward_with_state(x[:, :8].bfloat16(), None)
    y.float().sum().backward()
    with torch.no_grad():
        last, state = model.forward_with_state(x[:, 8:].bfloat16(), state)

    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.bfloat16)
    assert {layer[0].dtype for layer in state} == {torch.float32}
    torch.testing.assert_close(torch.cat([y, last], dim=1).float(), expected, rtol=0.1, atol=0.1)


def test_autocast_keeps_a_float32_state(model: Model) -> None:
    x = torch.randn(2, 9, 32)
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x).sum().backward()
        with torch.no_grad():
            y, state = model.forward_with_state(x[:, :8], None)
            last, state = model.forward_with_state(x[:, 8:], state)
    assert {layer[0].dtype for layer in state} == {torch.float32}
    torch.testing.assert_close(torch.cat([y, last], dim=1), expected, rtol=0.1, atol=0.1)


def test_a_float64_model_is_float64_throughout(model: Model) -> None:
    model.double()
    y, state = model.forward_with_state(torch.randn(2, 9, 32).double(), None)
    assert {y.dtype, *(t.dtype for layer in state for t in layer)} == {torch.float64}


def test_compiles_as_one_graph(model: Model) -> None:
    x = torch.randn(2, 9, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_inputs_that_do_not_fit_are_refused(model: Model) -> None:
    with pytest.raises(ValueError, match=r"x must be \(B, S, 32\), got shape \(2, 32\)"):
        model(torch.zeros(2, 32))
    with pytest.raises(ValueError, match="state must have 2 layers, got 0"):
        model.forward_with_state(torch.zeros(1, 1, 32), ())
    _, state = model.forward_with_state(torch.zeros(2, 3, 32), None)
    with pytest.raises(ValueError, match="window must have shape"):
        model.forward_with_state(torch.zeros(1, 1, 32), state)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu(model: Model) -> None:
    """Whichever kernels serve there: mamba_ssm's where installed."""
    x = torch.randn(2, 300, 32)
    expected, _ = model.forward_with_state(x, None)
    model.cuda()
    y, state = model.forward_with_state(x[:, :200].cuda(), None)
    rest, _ = model.forward_with_state(x[:, 200:].cuda(), state)
    torch.testing.assert_close(torch.cat([y, rest], dim=1).cpu(), expected, rtol=1e-3, atol=1e-4)
