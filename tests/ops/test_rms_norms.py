"""shift_rms_norm and gated_rms_norm: against plain PyTorch, and their native kernels."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mblm.ops.gated_rms_norm import gated_rms_norm
from mblm.ops.shift_rms_norm import shift_rms_norm
from tests.ops.samples import reference_of

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def plain_shift(
    x: Tensor, weight: Tensor, previous: Tensor | None = None, shift: bool = True, eps: float = 1e-8
) -> Tensor:
    """The composition of PyTorch's own functions that the operator replaces."""
    if shift:
        kept, delayed = x.split([x.shape[-1] - x.shape[-1] // 2, x.shape[-1] // 2], dim=-1)
        first = torch.zeros_like(delayed[..., :1, :])
        if previous is not None:
            first = previous.unsqueeze(-2).expand_as(first)
        delayed = torch.cat((first, delayed[..., :-1, :]), dim=-2)
        x = torch.cat((kept, delayed), dim=-1)
    norm = torch.norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
    return x / norm.clamp(min=eps) * weight


def plain_gated(x: Tensor, weight: Tensor, gate: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    if gate is not None:
        x = x * F.silu(gate)
    return F.rms_norm(x, (x.shape[-1],), weight, eps=eps)


class Norm(NamedTuple):
    """One of the norms, of x, a weight, and a third tensor that may be absent."""

    name: str
    run: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    settings: tuple[Any, ...]  # the operator's other arguments

    def sample(
        self,
        *shape: int,
        third: bool = True,
        dtype: torch.dtype = torch.float32,
        weight_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64)

        x, weight = normal(*shape).to(dtype), normal(shape[-1]).to(weight_dtype or dtype)
        of_third = (*shape[:-2], shape[-1] // 2) if self.name == "shift_rms_norm" else shape
        return x, weight, 3 * normal(*of_third).to(dtype) if third else None

    def result(self, x: torch.dtype, weight: torch.dtype) -> torch.dtype:
        return torch.promote_types(x, weight) if self.name == "shift_rms_norm" else weight


NORMS = {
    norm.name: norm
    for norm in (
        Norm("shift_rms_norm", shift_rms_norm, plain_shift, (True, 1e-8)),
        Norm("gated_rms_norm", gated_rms_norm, plain_gated, (1e-5,)),
    )
}


@pytest.fixture(params=NORMS)
def norm(request: pytest.FixtureRequest) -> Norm:
    return NORMS[request.param]


def gradients(function: Callable[..., Tensor], *tensors: Tensor | None) -> list[Any]:
    """Gradients of a fixed weighting of the function's result."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    out.backward(torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype))
    return [t.grad for t in leaves if t is not None]


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 3, 5), (4, 8), (2, 3, 4, 6), (3, 9, 512), (2, 0, 4)], ids=str
)
@pytest.mark.parametrize("third", [False, True])
def test_equals_plain_torch(norm: Norm, shape: Sequence[int], third: bool) -> None:
    inputs = norm.sample(*shape, third=third)
    torch.testing.assert_close(norm.run(*inputs), norm.plain(*inputs), rtol=2e-6, atol=2e-6)
    ours, theirs = gradients(norm.run, *inputs), gradients(norm.plain, *inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    "dtypes",
    [
        *[(HALF, HALF), (torch.float16, torch.float16), (HALF, SINGLE), (SINGLE, HALF)],
        *[(HALF, torch.float16), (SINGLE, DOUBLE), (DOUBLE, SINGLE)],
    ],
    ids=str,
)
def test_results_are_rounded_once(norm: Norm, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    inputs: Any = norm.sample(3, 5, 6, dtype=dtypes[0], weight_dtype=dtypes[1])
    out = norm.run(*inputs)
    assert out.dtype == norm.result(*dtypes)
    exact = norm.plain(*(t.double() for t in inputs))
    torch.testing.assert_close(out.double(), exact, rtol=TOLERANCE[out.dtype], atol=3e-6)
    for grad, tensor in zip(gradients(norm.run, *inputs), inputs, strict=True):
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
    third=st.booleans(),
)
@pytest.mark.parametrize("name", NORMS)
def test_native_equals_reference(
    require_native: Callable[[str], None],
    name: str,
    rows: int,
    length: int,
    width: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    layout: str,
    shift: bool,
    third: bool,
) -> None:
    require_native(name)
    norm, others = NORMS[name], NORMS[name].settings
    if name == "shift_rms_norm":
        third, others = third and shift, (shift, *others[1:])
    x, weight, extra = norm.sample(
        rows, length, width, third=third, dtype=dtype, weight_dtype=weight_dtype
    )
    if layout == "transposed":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "sliced":
        x, extra = (None if t is None else F.pad(t, (1, 2))[..., 1:-2] for t in (x, extra))  # type: ignore[assignment]
    inputs = (x, weight, extra, *others)
    out, inverse_norm = getattr(torch.ops.mblm, name)(*inputs)
    expected_out, expected_inverse = reference_of(name)(*inputs)
    tolerance = TOLERANCE[out.dtype]
    torch.testing.assert_close(out, expected_out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(inverse_norm, expected_inverse, rtol=1e-5, atol=0)

    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(rows)).to(out.dtype)
    backward = (grad, x, weight, extra, expected_inverse, *others)
    ours = getattr(torch.ops.mblm, f"{name}_backward")(*backward)
    theirs = reference_of(f"{name}_backward")(*backward)
    # The terms of a gradient may cancel out, so errors are relative to the terms.
    scale = max((t.abs().max().item() if t.numel() else 0.0) for t in (weight, *theirs))
    scale = max(scale, scale * expected_inverse.max().item() if out.numel() else 0.0)
    for of, one, other in zip(("x", "weight", "third"), ours, theirs, strict=True):
        bound = max(TOLERANCE[other.dtype], tolerance) * 5
        assert one.dtype == other.dtype and one.shape == other.shape, of
        torch.testing.assert_close(one, other, rtol=bound, atol=bound * scale)


def test_a_row_has_the_same_bits_wherever_it_lies(norm: Norm) -> None:
    x, weight, third = norm.sample(2, 3, 640)
    moved = torch.cat((x.new_zeros(1), x.flatten()))[1:].view_as(x)
    assert torch.equal(norm.run(moved, weight, third), norm.run(x, weight, third))


@pytest.mark.parametrize(
    "implementation", [torch.ops.mblm.gated_rms_norm, reference_of("gated_rms_norm")]
)
def test_a_vanishing_norm_and_a_shut_or_open_gate(implementation: Callable[..., Any]) -> None:
    x = torch.tensor([[0.0, 0.0], [3e-10, 4e-10], [1.0, 2.0], [1.0, 2.0]])
    gate = torch.tensor([[1.0, 2.0], [0.0, 0.0], [-1e4, -1e4], [1e4, 1e4]])
    weight = torch.tensor([1.0, 2.0])
    out = implementation(x, weight, gate, 1e-5)[0]
    torch.testing.assert_close(out, plain_gated(x, weight, gate))
    ours, theirs = (gradients(f, x, weight, gate) for f in (gated_rms_norm, plain_gated))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "implementation", [torch.ops.mblm.shift_rms_norm, reference_of("shift_rms_norm")]
)
def test_a_vanishing_norm_is_bounded(implementation: Callable[..., Any]) -> None:
    """Below eps the norm counts as eps, and no gradient goes through it."""
    x = torch.tensor([[0.0, 0.0], [3e-10, 4e-10], [1.0, 2.0]])
    weight = torch.tensor([1.0, 2.0])
    out = implementation(x, weight, None, False, 1e-8)[0]
    torch.testing.assert_close(out[:2], x[:2] * 1e8 * weight)
    ours, theirs = (
        gradients(lambda *t: f(*t, shift=False), x, weight)  # noqa: B023
        for f in (shift_rms_norm, plain_shift)
    )
    torch.testing.assert_close(ours, theirs)


def test_delays_the_last_half_by_one_position() -> None:
    x = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    first, second = shift_rms_norm(x, torch.ones(5))
    assert first[3:].tolist() == [0, 0], "zeros enter at the first position"
    assert torch.allclose(second[:3] / second[3:].mean(), torch.tensor(2.0)), "three channels stay"


@pytest.mark.parametrize("width", [1, 4, 5])
def test_one_position_at_a_time_equals_all_at_once(width: int) -> None:
    x, weight, previous = NORMS["shift_rms_norm"].sample(2, 6, width)
    expected = shift_rms_norm(x, weight, previous)
    for t in range(6):
        step = shift_rms_norm(x[:, t : t + 1], weight, previous)
        assert torch.equal(step, expected[:, t : t + 1])
        previous = x[:, t, width - width // 2 :]
