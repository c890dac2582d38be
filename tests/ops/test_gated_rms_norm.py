"""gated_rms_norm: against plain PyTorch, its gradients, its native kernel, bad input."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st

import mblm.ops.gated_rms_norm as module
from mblm.ops.gated_rms_norm import gated_rms_norm, gated_rms_norm_reference
from tests.ops.threads import assert_same_bits_for_any_threads

OPERATOR = torch.ops.mblm.gated_rms_norm
EPS = 1e-5
IMPLEMENTATIONS = pytest.mark.parametrize(
    "implementation", [OPERATOR, gated_rms_norm_reference], ids=["operator", "reference"]
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def plain(x, weight, gate=None, eps=EPS):
    """The composition of PyTorch's own functions that the operator replaces."""
    if gate is not None:
        x = x * F.silu(gate)
    return F.rms_norm(x, (x.shape[-1],), weight, eps=eps)


def sample(*shape, gate=True, dtype=torch.float32, weight_dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    x, weight = normal(*shape).to(dtype), normal(shape[-1]).to(weight_dtype or dtype)
    return x, weight, 3 * normal(*shape).to(dtype) if gate else None


def gradients(function, *tensors):
    """Gradients of a fixed weighting of the function's result."""
    tensors = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    out = function(*tensors)
    weighting = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)
    out.backward(weighting)
    return [t.grad for t in tensors if t is not None]


@pytest.mark.parametrize(
    "shape", [(1,), (9,), (1, 1, 1), (2, 3, 5), (4, 8), (2, 3, 4, 6), (3, 9, 512)], ids=str
)
@pytest.mark.parametrize("gate", [False, True], ids=["plain", "gated"])
def test_equals_plain_torch(shape, gate):
    inputs = sample(*shape, gate=gate)
    torch.testing.assert_close(gated_rms_norm(*inputs), plain(*inputs), rtol=2e-6, atol=2e-6)
    for ours, theirs in zip(
        gradients(gated_rms_norm, *inputs), gradients(plain, *inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (0, 5)], ids=str)
@pytest.mark.parametrize("gate", [False, True], ids=["plain", "gated"])
def test_nothing_gives_nothing(shape, gate):
    inputs = sample(*shape, gate=gate)
    assert gated_rms_norm(*inputs).shape == shape
    grads = gradients(gated_rms_norm, *inputs)
    assert grads[0].shape == shape
    assert not grads[1].any()


@IMPLEMENTATIONS
def test_a_vanishing_norm_and_a_shut_or_open_gate(implementation):
    x = torch.tensor([[0.0, 0.0], [3e-10, 4e-10], [1.0, 2.0], [1.0, 2.0]])
    gate = torch.tensor([[1.0, 2.0], [0.0, 0.0], [-1e4, -1e4], [1e4, 1e4]])
    weight = torch.tensor([1.0, 2.0])
    out = implementation(x, weight, gate, EPS)[0]
    torch.testing.assert_close(out, plain(x, weight, gate))
    ours, theirs = (gradients(f, x, weight, gate) for f in (gated_rms_norm, plain))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_results_have_the_weights_dtype_and_are_rounded_once(dtype, weight_dtype):
    inputs = sample(3, 5, 6, dtype=dtype, weight_dtype=weight_dtype)
    out = gated_rms_norm(*inputs)
    assert out.dtype == weight_dtype
    exact = plain(*(t.double() for t in inputs))
    torch.testing.assert_close(out.double(), exact, rtol=TOLERANCE[weight_dtype], atol=3e-6)
    for grad, tensor in zip(gradients(gated_rms_norm, *inputs), inputs, strict=True):
        assert grad.dtype == tensor.dtype


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 70),
    length=st.integers(0, 9),
    width=st.one_of(st.integers(1, 40), st.sampled_from([64, 127, 512])),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    weight_dtype=st.sampled_from([None, torch.float32]),
    layout=st.sampled_from(["contiguous", "transposed", "sliced"]),
    gate=st.booleans(),
)
def test_native_equals_reference(
    require_native, rows, length, width, dtype, weight_dtype, layout, gate
):
    require_native("gated_rms_norm")
    x, weight, gates = sample(
        rows, length, width, gate=gate, dtype=dtype, weight_dtype=weight_dtype
    )
    if layout == "transposed":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "sliced":
        gates = None if gates is None else F.pad(gates, (1, 2))[..., 1:-2]
    inputs = (x, weight, gates, EPS)
    tolerance = TOLERANCE[weight.dtype]
    out, inverse_norm = OPERATOR(*inputs)
    expected_out, expected_inverse = gated_rms_norm_reference(*inputs)
    torch.testing.assert_close(out, expected_out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(inverse_norm, expected_inverse, rtol=1e-5, atol=0)

    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(rows)).to(out.dtype)
    backward = (grad, *inputs[:3], expected_inverse, EPS)
    ours = torch.ops.mblm.gated_rms_norm_backward(*backward)
    theirs = module.gated_rms_norm_backward_reference(*backward)
    # The terms of a gradient may cancel out, so errors are relative to the terms.
    scale = max((t.abs().max().item() if t.numel() else 0.0) for t in (weight, *theirs))
    scale = max(scale, scale * expected_inverse.max().item() if out.numel() else 0.0)
    for name, one, other in zip(("x", "weight", "gate"), ours, theirs, strict=True):
        bound = max(TOLERANCE[other.dtype], tolerance) * 5
        assert one.dtype == other.dtype and one.shape == other.shape, name
        torch.testing.assert_close(one, other, rtol=bound, atol=bound * scale)


def test_results_do_not_depend_on_the_number_of_threads():
    inputs = sample(300, 9, 96)

    def compute():
        return [gated_rms_norm(*inputs), *gradients(gated_rms_norm, *inputs)]

    assert_same_bits_for_any_threads(compute)


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.tensor(1.0)}, ValueError, r"x must have shape \[\.\.\., D\].*got \[\]"),
        ({"x": torch.zeros(2, 3, 0)}, ValueError, r"D >= 1, got \[2, 3, 0\]"),
        (
            {"x": torch.zeros(2, 3, 4).long()},
            TypeError,
            "x must be float16, bfloat16, float32 or float64, got",
        ),
        (
            {"weight": torch.zeros(4).int()},
            TypeError,
            "weight must be float16, bfloat16, float32 or float64, got",
        ),
        ({"weight": torch.zeros(5)}, ValueError, r"weight must have shape \[4\], got \[5\]"),
        ({"eps": 0.0}, ValueError, "eps must be positive, got 0"),
        ({"eps": float("nan")}, ValueError, "eps must be positive, got nan"),
        (
            {"gate": torch.zeros(3, 4)},
            ValueError,
            r"gate must have shape \[2, 3, 4\], got \[3, 4\]",
        ),
        ({"gate": torch.zeros(2, 3, 4).double()}, TypeError, "gate must have the dtype of x"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused(implementation, change, error, message):
    arguments = {
        "x": torch.zeros(2, 3, 4),
        "weight": torch.zeros(4),
        "gate": torch.zeros(2, 3, 4),
        "eps": EPS,
    } | change
    with pytest.raises(error, match=message):
        implementation(*arguments.values())


@pytest.mark.parametrize(
    "implementation",
    [torch.ops.mblm.gated_rms_norm_backward, module.gated_rms_norm_backward_reference],
    ids=["operator", "reference"],
)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grad": torch.zeros(2, 2, 4)}, ValueError, r"grad must have shape \[2, 3, 4\]"),
        ({"grad": torch.zeros(2, 3, 4).double()}, TypeError, r"grad must (be|have)"),
        ({"inverse_norm": torch.zeros(2)}, ValueError, r"inverse_norm must have shape \[2, 3\]"),
        ({"inverse_norm": torch.zeros(2, 3).double()}, TypeError, "inverse_norm must be"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_to_the_gradient_is_refused(implementation, change, error, message):
    arguments = {
        "grad": torch.zeros(2, 3, 4),
        "x": torch.zeros(2, 3, 4),
        "weight": torch.zeros(4),
        "gate": None,
        "inverse_norm": torch.ones(2, 3),
        "eps": EPS,
    } | change
    with pytest.raises(error, match=message):
        implementation(*arguments.values())
