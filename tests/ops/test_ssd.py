"""Mamba-2's state-space product against a plain loop, its gradients, chunks and bad input."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mblm.ops import ssd as module
from mblm.ops._scans import backward_reference, reference
from mblm.ops.ssd import ssd, ssd_step
from tests.ops.largest_tensor import LargestTensor

_reference, _backward_reference = reference(module._chunk), backward_reference(module._chunk)

Arguments = dict[str, Tensor]


def make_arguments(
    rows: int,
    length: int,
    heads: int,
    head_dim: int,
    num_states: int,
    *,
    dtype: torch.dtype = torch.float64,
    state_dtype: torch.dtype | None = None,
) -> Arguments:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    state_dtype = state_dtype or dtype
    return {
        "x": draw(rows, length, heads, head_dim),
        "dt": draw(rows, length, heads, dtype=state_dtype).abs(),
        "A": -draw(heads, dtype=state_dtype).abs(),
        "B": draw(rows, length, num_states),
        "C": draw(rows, length, num_states),
        "D": draw(heads, dtype=state_dtype),
        "initial_state": draw(rows, heads, head_dim, num_states, dtype=state_dtype),
    }


def plain_loop(
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    D: Tensor,  # noqa: N803
    initial_state: Tensor,
) -> tuple[Tensor, Tensor]:
    """The recurrence as the paper writes it, one position at a time."""
    state, outputs = initial_state, [x[:, :0]]
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * A)
        arriving = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, None, None, :]
        state = decay[..., None, None] * state + arriving
        y = (state * C[:, t, None, None, :]).sum(-1) + D[:, None] * x[:, t]
        outputs.append(y[:, None])
    return torch.cat(outputs, dim=1), state


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 9])
def test_equals_the_plain_loop(length: int) -> None:
    arguments = make_arguments(3, length, 5, 2, 4)
    torch.testing.assert_close(ssd(**arguments, chunk_size=4), plain_loop(**arguments))


def test_no_state_per_position_is_ever_held() -> None:
    arguments = make_arguments(1, 512, 4, 16, 16)
    num_inputs = arguments["x"].numel()
    with LargestTensor() as largest:
        y, final_state, chunk_states = _reference(*arguments.values(), 16)
        arguments.pop("initial_state")
        _backward_reference(y, final_state, *arguments.values(), chunk_states, 16)
    assert largest.entries == num_inputs == chunk_states.numel()  # not 16 times as many


@pytest.mark.parametrize("shape", [(0, 3, 2, 4, 3), (2, 3, 1, 1, 1), (2, 3, 0, 4, 3)])
def test_degenerate_sizes(shape: tuple[int, int, int, int, int]) -> None:
    arguments = make_arguments(*shape)
    torch.testing.assert_close(ssd(**arguments), plain_loop(**arguments))


def test_no_initial_state_means_zeros() -> None:
    arguments = make_arguments(2, 5, 3, 2, 4)
    zeros = torch.zeros_like(arguments.pop("initial_state"))
    torch.testing.assert_close(ssd(**arguments), ssd(**arguments, initial_state=zeros))


@pytest.mark.parametrize("length", [0, 5])
def test_arguments_are_left_as_they_are(length: int) -> None:
    arguments = make_arguments(2, length, 3, 2, 4)
    before = {name: tensor.clone() for name, tensor in arguments.items()}
    _, final_state = ssd(**arguments)
    final_state.zero_()
    torch.testing.assert_close(arguments, before, rtol=0, atol=0)


def test_strided_arguments() -> None:
    arguments = make_arguments(2, 5, 4, 3, 2)
    strided = {
        name: tensor.transpose(0, 1).clone().transpose(0, 1) if tensor.ndim > 1 else tensor
        for name, tensor in arguments.items()
    }
    torch.testing.assert_close(ssd(**strided), ssd(**arguments))


@settings(max_examples=15, deadline=None)
@given(length=st.integers(1, 40), chunk_size=st.integers(1, 50))
def test_chunk_size_changes_rounding_alone(length: int, chunk_size: int) -> None:
    arguments = make_arguments(2, length, 3, 2, 4, dtype=torch.float32)
    torch.testing.assert_close(ssd(**arguments, chunk_size=chunk_size), ssd(**arguments))


@settings(max_examples=15, deadline=None)
@given(length=st.integers(0, 40), cut=st.integers(0, 40), chunk_size=st.integers(1, 50))
def test_a_sequence_may_be_cut_anywhere(length: int, cut: int, chunk_size: int) -> None:
    arguments = make_arguments(2, length, 3, 2, 4)
    whole = ssd(**arguments)
    first, second = dict(arguments), dict(arguments)
    for name in ("x", "dt", "B", "C"):
        first[name], second[name] = arguments[name][:, :cut], arguments[name][:, cut:]

    y_first, second["initial_state"] = ssd(**first, chunk_size=chunk_size)
    y_second, final_state = ssd(**second, chunk_size=chunk_size)

    torch.testing.assert_close((torch.cat([y_first, y_second], dim=1), final_state), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_keeps_a_float32_state(dtype: torch.dtype) -> None:
    arguments = make_arguments(2, 70, 3, 2, 4, dtype=dtype, state_dtype=torch.float32)

    y, final_state = ssd(**arguments)

    expected_y, expected_state = ssd(**{name: t.double() for name, t in arguments.items()})
    assert (y.dtype, final_state.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(y.double(), expected_y, rtol=torch.finfo(dtype).eps, atol=1e-4)
    torch.testing.assert_close(final_state.double(), expected_state, rtol=1e-4, atol=1e-4)


def test_long_sums_of_rates_keep_their_digits() -> None:
    """A strong decay early in a chunk must not blur the weak decays after it."""
    arguments = make_arguments(1, 64, 1, 2, 4, dtype=torch.float32)
    arguments["dt"] = torch.full_like(arguments["dt"], 1e-3)
    arguments["dt"][:, :8] = 1e4
    arguments["A"] = -torch.ones(1)
    y, _ = ssd(**arguments)
    expected, _ = plain_loop(**{name: t.double() for name, t in arguments.items()})
    torch.testing.assert_close(y[:, 8:].double(), expected[:, 8:], rtol=1e-5, atol=1e-6 * 1e4)


def test_autocast_does_not_lower_the_precision() -> None:
    arguments = make_arguments(2, 9, 3, 2, 4, dtype=torch.float32)
    for tensor in arguments.values():
        tensor.requires_grad_()

    def loss_and_gradient() -> tuple[Tensor, Tensor]:
        y, final_state = ssd(**arguments)
        loss = y.square().sum() + final_state.sum()
        return loss, torch.autograd.grad(loss, arguments["B"])[0]

    expected = loss_and_gradient()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = loss_and_gradient()
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.parametrize("length", [0, 1, 5])
def test_gradients(length: int) -> None:
    arguments = [tensor.requires_grad_() for tensor in make_arguments(2, length, 3, 2, 2).values()]
    assert torch.autograd.gradcheck(lambda *a: ssd(*a, chunk_size=2), arguments)


def test_float32_gradients_over_many_positions() -> None:
    exact = {name: t.requires_grad_() for name, t in make_arguments(1, 150, 2, 3, 4).items()}
    rounded = {name: t.detach().float().requires_grad_() for name, t in exact.items()}
    for arguments in (exact, rounded):
        ssd(**arguments)[0].sum().backward()
    for name, tensor in rounded.items():
        error = (tensor.grad.double() - exact[name].grad).abs().max()
        assert error <= 1e-5 * exact[name].grad.abs().max(), name


@pytest.mark.parametrize("output", [0, 1], ids=["y alone", "final state alone"])
def test_gradient_of_one_output(output: int) -> None:
    arguments = {
        name: tensor.requires_grad_() for name, tensor in make_arguments(2, 5, 3, 2, 2).items()
    }

    def gradients(scan: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        loss = scan(**arguments)[output].square().sum()
        return torch.autograd.grad(
            loss, list(arguments.values()), allow_unused=True, materialize_grads=True
        )

    torch.testing.assert_close(gradients(ssd), gradients(plain_loop))


@pytest.mark.parametrize("length", [0, 5])
def test_operator_contract(length: int) -> None:
    arguments = [tensor.requires_grad_() for tensor in make_arguments(2, length, 3, 2, 4).values()]
    torch.library.opcheck(torch.ops.mblm.ssd.default, (*arguments, 2))
    torch.library.opcheck(torch.ops.mblm.ssd.default, (*arguments[:-1], None, 2))
    y, final_state, chunk_states = (t.detach() for t in torch.ops.mblm.ssd(*arguments, 2))
    plain = [t.detach() for t in arguments[:-1]]
    torch.library.opcheck(
        torch.ops.mblm.ssd_backward.default, (y, final_state, *plain, chunk_states, 2)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_step_equals_a_product_of_one_position(dtype: torch.dtype) -> None:
    state_dtype = torch.promote_types(dtype, torch.float32)
    arguments = make_arguments(3, 1, 5, 2, 4, dtype=dtype, state_dtype=state_dtype)
    state = arguments["initial_state"]
    before = state.clone()
    expected_y, expected_state = ssd(**arguments)

    one = {name: arguments[name][:, 0] for name in ("x", "dt", "B", "C")}
    y, next_state = ssd_step(**one, A=arguments["A"], D=arguments["D"], state=state)

    torch.testing.assert_close(y, expected_y[:, 0])
    torch.testing.assert_close(next_state, expected_state)
    torch.testing.assert_close(state, before, rtol=0, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 2, 35]),
    length=st.integers(0, 12),
    heads=st.sampled_from([0, 1, 3]),
    head_dim=st.sampled_from([1, 5, 8, 18]),
    num_states=st.sampled_from([1, 3, 8, 19]),
    chunk_size=st.integers(1, 14),
    dtypes=st.sampled_from(
        [
            (torch.float64, torch.float64),
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.float32),
            (torch.float32, torch.float64),
        ]
    ),
    with_state=st.booleans(),
    layout=st.sampled_from(["contiguous", "part of a wider tensor", "channels first"]),
)
def test_native_equals_reference(
    require_native: Callable[[str], None],
    rows: int,
    length: int,
    heads: int,
    head_dim: int,
    num_states: int,
    chunk_size: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    with_state: bool,
    layout: str,
) -> None:
    require_native("ssd")
    require_native("ssd_backward")
    dtype, state_dtype = dtypes
    arguments = make_arguments(
        rows, length, heads, head_dim, num_states, dtype=dtype, state_dtype=state_dtype
    )
    if layout == "part of a wider tensor":  # as the convolution gives x, B and C
        x, B, C = (arguments[name] for name in ("x", "B", "C"))  # noqa: N806
        wide = torch.cat([x.flatten(2), B, C], dim=-1)
        inner, arguments["B"], arguments["C"] = wide.split(
            [heads * head_dim, num_states, num_states], dim=-1
        )
        arguments["x"] = inner.unflatten(-1, (heads, head_dim))
    elif layout == "channels first":
        arguments = {
            name: t.mT.contiguous().mT if t.ndim > 1 else t for name, t in arguments.items()
        }
    initial_state = arguments.pop("initial_state")
    inputs = tuple(arguments.values())
    grad_y, grad_final_state = torch.randn_like(arguments["x"]), torch.randn_like(initial_state)

    forward = (*inputs, initial_state if with_state else None, chunk_size)
    ours = torch.ops.mblm.ssd(*forward)
    theirs = _reference(*forward)
    backward = (grad_y, grad_final_state, *inputs, theirs[2], chunk_size)
    ours = (*ours, *torch.ops.mblm.ssd_backward(*backward))
    theirs = (*theirs, *_backward_reference(*backward))

    # Terms of a sum may cancel out: errors are relative to the largest sum of the terms' sizes.
    sizes = [t if t is arguments["A"] else t.abs() for t in inputs]
    of_sizes = _reference(*sizes, initial_state.abs() if with_state else None, chunk_size)
    gradients = (grad_y.abs(), grad_final_state.abs(), *sizes, of_sizes[2], chunk_size)
    of_sizes = (*of_sizes, *_backward_reference(*gradients))

    names = ["y", "final_state", "chunk_states", "x", "dt", "A", "B", "C", "D", "initial_state"]
    for name, one, other, size in zip(names, ours, theirs, of_sizes, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape, name
        assert one.is_contiguous(), name
        scale = size.abs().max().item() if size.numel() else 0.0
        bound = {torch.float64: 1e-11, torch.float32: 1e-5}.get(one.dtype, 1e-2)
        if dtype == torch.bfloat16 and torch.ops.mblm.device_kind():
            bound = max(bound, 3e-5)  # a GPU's operands have 16 bits
        torch.testing.assert_close(
            one, other, rtol=bound, atol=bound * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    arguments = make_arguments(3, 70, 8, 16, 16, dtype=torch.float32)
    arguments = {name: tensor.requires_grad_() for name, tensor in arguments.items()}
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs = ssd(**arguments)
            loss = sum(output.square().sum() for output in outputs)
            results.append((*outputs, *torch.autograd.grad(loss, list(arguments.values()))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 5)}, ValueError, r"x must be \(B, L, H, P\)"),
        ({"A": torch.zeros(4)}, ValueError, "A must have shape"),
        ({"dt": torch.zeros(2, 4, 3)}, ValueError, "dt must have shape"),
        ({"B": torch.zeros(2, 5)}, ValueError, r"B must be \(2, 5, N\)"),
        ({"C": torch.zeros(2, 5, 4).double()}, TypeError, "C must be"),
        ({"initial_state": torch.zeros(2, 3, 2, 3)}, ValueError, "initial_state must have shape"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_native_operator_refuses_bad_arguments_itself(
    require_native: Callable[[str], None],
    change: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    require_native("ssd")
    arguments = make_arguments(2, 5, 3, 2, 4, dtype=torch.float32) | {"chunk_size": 4} | change
    with pytest.raises(error, match=message):
        torch.ops.mblm.ssd(*arguments.values())


@pytest.mark.parametrize(
    ("name", "replacement", "error", "message"),
    [
        ("x", torch.zeros(2, 5, 3), ValueError, r"x must be \(B, L, H, P\), got.*\(2, 5, 3\)"),
        ("x", torch.zeros(2, 5, 3, 2, dtype=torch.long), TypeError, "x must be floating point"),
        ("A", torch.zeros(4).double(), ValueError, r"A must have shape \(3,\), got \(4,\)"),
        ("A", torch.zeros(3).half(), TypeError, "A must be float32 or float64.*float16"),
        ("dt", torch.zeros(2, 5, 2).double(), ValueError, r"dt must have shape \(2, 5, 3\)"),
        ("dt", torch.zeros(2, 5, 3), TypeError, "dt must be torch.float64.*float32"),
        ("B", torch.zeros(2, 5).double(), ValueError, r"B must be \(2, 5, N\)"),
        ("B", torch.zeros(2, 4, 4).double(), ValueError, r"B must have shape \(2, 5, 4\)"),
        ("C", torch.zeros(2, 5, 4), TypeError, "C must be torch.float64"),
        ("D", torch.zeros(2).double(), ValueError, r"D must have shape \(3,\)"),
        ("initial_state", torch.zeros(1, 3, 2, 4).double(), ValueError, r"\(2, 3, 2, 4\)"),
    ],
)
def test_bad_arguments_are_named(
    name: str, replacement: Tensor, error: type[Exception], message: str
) -> None:
    arguments = make_arguments(2, 5, 3, 2, 4) | {name: replacement}
    with pytest.raises(error, match=message):
        ssd(**arguments)


@pytest.mark.parametrize("chunk_size", [9, 10, 2**62, sys.maxsize - 1, sys.maxsize])
@pytest.mark.parametrize("operator", [_reference, torch.ops.mblm.ssd.default])
def test_a_chunk_may_be_longer_than_the_sequences(
    chunk_size: int, operator: Callable[..., Any]
) -> None:
    arguments = make_arguments(2, 9, 3, 2, 4)
    y, final_state, states = operator(*arguments.values(), chunk_size)
    gradients = torch.ops.mblm.ssd_backward
    arguments.pop("initial_state")
    given = (y, final_state, *arguments.values(), states)
    expected = gradients(*given, 9)
    torch.testing.assert_close(gradients(*given, chunk_size), expected)
    torch.testing.assert_close(_backward_reference(*given, chunk_size), expected)
    torch.testing.assert_close((y, final_state), ssd(**make_arguments(2, 9, 3, 2, 4)))


def test_bad_chunk_size() -> None:
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        ssd(**make_arguments(2, 5, 3, 2, 4), chunk_size=0)
