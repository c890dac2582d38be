"""shift_rms_norm: against plain PyTorch, its gradients, its native kernel, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mblm.ops.shift_rms_norm as module
from mblm.ops.shift_rms_norm import shift_rms_norm, shift_rms_norm_reference
from tests.ops.threads import assert_same_bits_for_any_threads

OPERATOR = torch.ops.mblm.shift_rms_norm
IMPLEMENTATIONS = pytest.mark.parametrize(
    "implementation", [OPERATOR, shift_rms_norm_reference], ids=["operator", "reference"]
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def plain(x, weight, previous=None, shift=True, eps=1e-8):
    """The composition of PyTorch's own functions that the operator replaces."""
    if shift:
        kept, delayed = x[..., : x.shape[-1] - x.shape[-1] // 2], x[..., -(x.shape[-1] // 2) :]
        if x.shape[-1] == 1:
            delayed = x[..., :0]
        first = torch.zeros_like(delayed[..., :1, :])
        delayed = torch.cat((first, delayed[..., :-1, :]), dim=-2)
        if previous is not None:
            delayed = torch.cat((previous.unsqueeze(-2), delayed[..., 1:, :]), dim=-2)
        x = torch.cat((kept, delayed), dim=-1)
    norm = torch.norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
    return x / norm.clamp(min=eps) * weight


def sample(*shape, previous=True, dtype=torch.float32, weight_dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    x, weight = normal(*shape).to(dtype), normal(shape[-1]).to(weight_dtype or dtype)
    return x, weight, normal(*shape[:-2], shape[-1] // 2).to(dtype) if previous else None


def gradients(function, *tensors):
    """Gradients of a fixed weighting of the function's result."""
    tensors = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    out = function(*tensors)
    weighting = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)
    out.backward(weighting)
    return [t.grad for t in tensors if t is not None]


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 3, 5), (4, 8), (2, 3, 4, 6), (3, 9, 512)], ids=str
)
@pytest.mark.parametrize("previous", [False, True], ids=["zeros", "previous"])
def test_equals_plain_torch(shape, previous):
    inputs = sample(*shape, previous=previous)
    torch.testing.assert_close(shift_rms_norm(*inputs), plain(*inputs), rtol=2e-6, atol=2e-6)
    for ours, theirs in zip(
        gradients(shift_rms_norm, *inputs), gradients(plain, *inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_without_shift_is_rms_norm():
    x, weight, _ = sample(2, 3, 7)
    expected = nn.functional.rms_norm(x, (7,), weight, eps=0.0)
    torch.testing.assert_close(shift_rms_norm(x, weight, shift=False), expected)


def test_delays_the_last_half_by_one_position():
    x = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    first, second = shift_rms_norm(x, torch.ones(5))
    assert first[3:].tolist() == [0, 0], "zeros enter at the first position"
    assert torch.allclose(second[:3] / second[3:].mean(), torch.tensor(2.0)), "three channels stay"


@pytest.mark.parametrize("width", [1, 4, 5])
def test_one_position_at_a_time_equals_all_at_once(width):
    x, weight, previous = sample(2, 6, width)
    expected = shift_rms_norm(x, weight, previous)
    for t in range(6):
        step = shift_rms_norm(x[:, t : t + 1], weight, previous)
        assert torch.equal(step, expected[:, t : t + 1])
        previous = x[:, t, width - width // 2 :]


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 0, 5), (0, 4)], ids=str)
@pytest.mark.parametrize("previous", [False, True], ids=["zeros", "previous"])
def test_nothing_gives_nothing(shape, previous):
    inputs = sample(*shape, previous=previous)
    assert shift_rms_norm(*inputs).shape == shape
    grads = gradients(shift_rms_norm, *inputs)
    assert grads[0].shape == shape
    assert all(not grad.any() for grad in grads[1:])


@IMPLEMENTATIONS
def test_a_vanishing_norm_is_bounded(implementation):
    """Below eps the norm counts as eps, and no gradient goes through it."""
    x = torch.tensor([[0.0, 0.0], [3e-10, 4e-10], [1.0, 2.0]])
    weight = torch.tensor([1.0, 2.0])
    out = implementation(x, weight, None, False, 1e-8)[0]
    torch.testing.assert_close(out[:2], x[:2] * 1e8 * weight)
    ours = gradients(lambda *t: shift_rms_norm(*t, shift=False), x, weight)
    theirs = gradients(lambda *t: plain(*t, shift=False), x, weight)
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1])


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "result"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16, torch.float16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float64),
    ],
    ids=str,
)
def test_dtypes_promote_and_round_once(dtype, weight_dtype, result):
    inputs = sample(3, 5, 6, dtype=dtype, weight_dtype=weight_dtype)
    out = shift_rms_norm(*inputs)
    assert out.dtype == result
    exact = plain(*(t.double() for t in inputs))
    torch.testing.assert_close(out.double(), exact, rtol=TOLERANCE[result], atol=1e-6)
    for grad, tensor in zip(gradients(shift_rms_norm, *inputs), inputs, strict=True):
        assert grad.dtype == tensor.dtype


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 70),
    length=st.integers(0, 9),
    width=st.one_of(st.integers(1, 40), st.sampled_from([64, 127, 512])),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    weight_dtype=st.sampled_from([None, torch.float32]),
    layout=st.sampled_from(["contiguous", "transposed", "sliced"]),
    shift=st.booleans(),
    previous=st.booleans(),
)
def test_native_equals_reference(
    require_native, rows, length, width, dtype, weight_dtype, layout, shift, previous
):
    require_native("shift_rms_norm")
    x, weight, first = sample(
        rows, length, width, previous=previous and shift, dtype=dtype, weight_dtype=weight_dtype
    )
    if layout == "transposed":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "sliced":
        x = nn.functional.pad(x, (1, 2))[..., 1:-2]
    inputs = (x, weight, first, shift, 1e-8)
    tolerance = TOLERANCE[torch.result_type(x, weight)]
    out, inverse_norm = OPERATOR(*inputs)
    expected_out, expected_inverse = shift_rms_norm_reference(*inputs)
    torch.testing.assert_close(out, expected_out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(inverse_norm, expected_inverse, rtol=1e-5, atol=0)

    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(rows)).to(out.dtype)
    backward = (grad, *inputs[:3], expected_inverse, *inputs[3:])
    ours = torch.ops.mblm.shift_rms_norm_backward(*backward)
    theirs = module.shift_rms_norm_backward_reference(*backward)
    # The terms of a gradient may cancel out, so errors are relative to the terms.
    scale = max((t.abs().max().item() if t.numel() else 0.0) for t in (weight, *theirs))
    scale = max(scale, scale * expected_inverse.max().item() if out.numel() else 0.0)
    for name, one, other in zip(("x", "weight", "previous"), ours, theirs, strict=True):
        bound = max(TOLERANCE[other.dtype], tolerance) * 5
        assert one.dtype == other.dtype and one.shape == other.shape, name
        torch.testing.assert_close(one, other, rtol=bound, atol=bound * scale)


def test_results_do_not_depend_on_the_number_of_threads():
    inputs = sample(300, 9, 96)

    def compute():
        return [shift_rms_norm(*inputs), *gradients(shift_rms_norm, *inputs)]

    assert_same_bits_for_any_threads(compute)


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3)}, ValueError, r"x must have shape \[\.\.\., S, D\].*got \[3\]"),
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
        ({"weight": torch.zeros(1, 4)}, ValueError, r"weight must have shape \[4\], got \[1, 4\]"),
        ({"eps": 0.0}, ValueError, "eps must be positive, got 0"),
        ({"eps": float("nan")}, ValueError, "eps must be positive, got nan"),
        ({"shift": False}, ValueError, "previous must be None where shift is False"),
        (
            {"previous": torch.zeros(2, 3)},
            ValueError,
            r"previous must have shape \[2, 2\], got \[2, 3\]",
        ),
        (
            {"previous": torch.zeros(2, 2).double()},
            TypeError,
            "previous must have the dtype of x",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused(implementation, change, error, message):
    arguments = {
        "x": torch.zeros(2, 3, 4),
        "weight": torch.zeros(4),
        "previous": torch.zeros(2, 2),
        "shift": True,
        "eps": 1e-8,
    } | change
    with pytest.raises(error, match=message):
        implementation(*arguments.values())


@pytest.mark.parametrize(
    "implementation",
    [torch.ops.mblm.shift_rms_norm_backward, module.shift_rms_norm_backward_reference],
    ids=["operator", "reference"],
)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grad": torch.zeros(2, 2, 4)}, ValueError, r"grad must have shape \[2, 3, 4\]"),
        ({"grad": torch.zeros(2, 3, 4).double()}, TypeError, "grad must be"),
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
        "previous": None,
        "inverse_norm": torch.ones(2, 3),
        "shift": True,
        "eps": 1e-8,
    } | change
    with pytest.raises(error, match=message):
        implementation(*arguments.values())
