"""The selective scan against a plain loop, its gradients, its tiles and its bad input."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mblm.ops import selective_scan as module
from mblm.ops._scans import backward_reference, reference
from mblm.ops.selective_scan import selective_scan, selective_scan_step
from tests.ops.largest_tensor import LargestTensor

_reference, _backward_reference = reference(module._chunk), backward_reference(module._chunk)

Arguments = dict[str, Tensor]


def make_arguments(
    rows: int,
    length: int,
    channels: int,
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
        "x": draw(rows, length, channels),
        "delta": draw(rows, length, channels, dtype=state_dtype).abs(),
        "A": -draw(channels, num_states, dtype=state_dtype).abs(),
        "B": draw(rows, length, num_states),
        "C": draw(rows, length, num_states),
        "D": draw(channels, dtype=state_dtype),
        "initial_state": draw(rows, channels, num_states, dtype=state_dtype),
    }


def plain_loop(
    x: Tensor,
    delta: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    D: Tensor,  # noqa: N803
    initial_state: Tensor,
) -> tuple[Tensor, Tensor]:
    """The recurrence as the paper writes it, one position at a time."""
    state, outputs = initial_state, [x[:, :0]]
    for t in range(x.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * A)
        state = decay * state + (delta[:, t] * x[:, t])[..., None] * B[:, t, None, :]
        outputs.append((state * C[:, t, None, :]).sum(-1)[:, None] + D * x[:, t : t + 1])
    return torch.cat(outputs, dim=1), state


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 9])
def test_equals_the_plain_loop(length: int) -> None:
    arguments = make_arguments(3, length, 5, 2)

    y, final_state = selective_scan(**arguments, chunk_size=4)

    expected_y, expected_state = plain_loop(**arguments)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(final_state, expected_state)


def test_no_state_per_position_is_ever_held() -> None:
    arguments = make_arguments(1, 512, 64, 16)
    num_inputs = arguments["x"].numel()
    with LargestTensor() as largest:
        y, final_state, chunk_states = _reference(*arguments.values(), 16)
        arguments.pop("initial_state")
        _backward_reference(y, final_state, *arguments.values(), chunk_states, 16)
    assert largest.entries == num_inputs == chunk_states.numel()  # not 16 times as many


@pytest.mark.parametrize("shape", [(0, 3, 2, 4), (2, 3, 1, 1), (2, 3, 0, 4)])
def test_degenerate_sizes(shape: tuple[int, int, int, int]) -> None:
    arguments = make_arguments(*shape)
    torch.testing.assert_close(selective_scan(**arguments), plain_loop(**arguments))


def test_no_initial_state_means_zeros() -> None:
    arguments = make_arguments(2, 5, 3, 4)
    zeros = torch.zeros_like(arguments.pop("initial_state"))
    torch.testing.assert_close(
        selective_scan(**arguments), selective_scan(**arguments, initial_state=zeros)
    )


def test_arguments_are_left_as_they_are() -> None:
    arguments = make_arguments(2, 5, 3, 4)
    before = {name: tensor.clone() for name, tensor in arguments.items()}
    selective_scan(**arguments)
    torch.testing.assert_close(arguments, before, rtol=0, atol=0)


def test_the_final_state_never_aliases_the_initial_one() -> None:
    arguments = make_arguments(2, 0, 3, 4)
    _, final_state = selective_scan(**arguments)
    assert final_state.data_ptr() != arguments["initial_state"].data_ptr()


def test_strided_arguments() -> None:
    arguments = make_arguments(2, 5, 4, 3)
    strided = {
        name: torch.stack([tensor, tensor], dim=-1)[..., 0].transpose(0, 1).clone().transpose(0, 1)
        if tensor.ndim > 1
        else tensor
        for name, tensor in arguments.items()
    }
    torch.testing.assert_close(selective_scan(**strided), selective_scan(**arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_keeps_a_float32_state(dtype: torch.dtype) -> None:
    arguments = make_arguments(2, 70, 4, 3, dtype=dtype, state_dtype=torch.float32)
    exact = {name: tensor.double() for name, tensor in arguments.items()}

    y, final_state = selective_scan(**arguments)

    expected_y, expected_state = selective_scan(**exact)
    assert (y.dtype, final_state.dtype) == (dtype, torch.float32)
    rounding = {"rtol": torch.finfo(dtype).eps, "atol": 1e-4}
    torch.testing.assert_close(y.double(), expected_y, **rounding)
    torch.testing.assert_close(final_state.double(), expected_state, rtol=1e-4, atol=1e-4)


def test_autocast_does_not_lower_the_precision() -> None:
    arguments = make_arguments(2, 9, 4, 3, dtype=torch.float32)
    for tensor in arguments.values():
        tensor.requires_grad_()

    def loss_and_gradient() -> tuple[Tensor, Tensor]:
        y, final_state = selective_scan(**arguments)
        loss = y.square().sum() + final_state.sum()
        return loss, torch.autograd.grad(loss, arguments["B"])[0]

    expected = loss_and_gradient()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = loss_and_gradient()
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.parametrize("length", [0, 1, 5])
def test_gradients(length: int) -> None:
    arguments = [tensor.requires_grad_() for tensor in make_arguments(2, length, 3, 2).values()]
    assert torch.autograd.gradcheck(lambda *a: selective_scan(*a, chunk_size=2), arguments)


@pytest.mark.parametrize("output", [0, 1], ids=["y alone", "final state alone"])
def test_gradient_of_one_output(output: int) -> None:
    arguments = {
        name: tensor.requires_grad_() for name, tensor in make_arguments(2, 5, 3, 2).items()
    }

    def gradients(scan: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        loss = scan(**arguments)[output].square().sum()
        return torch.autograd.grad(
            loss, list(arguments.values()), allow_unused=True, materialize_grads=True
        )

    torch.testing.assert_close(gradients(selective_scan), gradients(plain_loop))


@pytest.mark.parametrize("length", [0, 5])
def test_operator_contract(length: int) -> None:
    arguments = [tensor.requires_grad_() for tensor in make_arguments(2, length, 3, 2).values()]
    torch.library.opcheck(torch.ops.mblm.selective_scan.default, (*arguments, 2))
    torch.library.opcheck(torch.ops.mblm.selective_scan.default, (*arguments[:-1], None, 2))
    y, final_state, chunk_states = (
        t.detach() for t in torch.ops.mblm.selective_scan(*arguments, 2)
    )
    plain = [t.detach() for t in arguments[:-1]]
    torch.library.opcheck(
        torch.ops.mblm.selective_scan_backward.default, (y, final_state, *plain, chunk_states, 2)
    )


@settings(max_examples=15, deadline=None)
@given(
    length=st.integers(0, 40),
    cut=st.integers(0, 40),
    chunk_size=st.integers(1, 50),
    rows=st.integers(1, 3),
)
def test_a_sequence_may_be_cut_anywhere(length: int, cut: int, chunk_size: int, rows: int) -> None:
    arguments = make_arguments(rows, length, 4, 3)
    whole = selective_scan(**arguments)
    first, second = dict(arguments), dict(arguments)
    for name in ("x", "delta", "B", "C"):
        first[name], second[name] = arguments[name][:, :cut], arguments[name][:, cut:]

    y_first, second["initial_state"] = selective_scan(**first, chunk_size=chunk_size)
    y_second, final_state = selective_scan(**second, chunk_size=chunk_size)

    torch.testing.assert_close((torch.cat([y_first, y_second], dim=1), final_state), whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_step_equals_a_scan_of_one_position(dtype: torch.dtype) -> None:
    state_dtype = torch.promote_types(dtype, torch.float32)
    arguments = make_arguments(3, 1, 5, 4, dtype=dtype, state_dtype=state_dtype)
    state = arguments["initial_state"]
    before = state.clone()
    expected_y, expected_state = selective_scan(**arguments)

    one = {name: arguments[name][:, 0] for name in ("x", "delta", "B", "C")}
    y, next_state = selective_scan_step(**one, A=arguments["A"], D=arguments["D"], state=state)

    torch.testing.assert_close(y, expected_y[:, 0])
    torch.testing.assert_close(next_state, expected_state)
    torch.testing.assert_close(state, before, rtol=0, atol=0)


def test_strong_decay_and_large_steps_stay_finite() -> None:
    arguments = make_arguments(1, 20, 3, 2, dtype=torch.float32)
    arguments["delta"] *= 1e4
    arguments = {name: tensor.requires_grad_() for name, tensor in arguments.items()}
    y, _ = selective_scan(**arguments)
    gradients = torch.autograd.grad(y.sum(), list(arguments.values()))
    assert all(tensor.isfinite().all() for tensor in (y, *gradients))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 2, 35]),
    length=st.integers(0, 12),
    channels=st.sampled_from([0, 1, 5, 16, 37]),
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
    strided=st.booleans(),
)
def test_native_equals_reference(
    require_native: Callable[[str], None],
    rows: int,
    length: int,
    channels: int,
    num_states: int,
    chunk_size: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    with_state: bool,
    strided: bool,
) -> None:
    require_native("selective_scan")
    require_native("selective_scan_backward")
    dtype, state_dtype = dtypes
    arguments = make_arguments(
        rows, length, channels, num_states, dtype=dtype, state_dtype=state_dtype
    )
    if strided:
        arguments = {
            name: torch.stack([t, t], dim=-1)[..., 0] if t.ndim < 2 else t.mT.contiguous().mT
            for name, t in arguments.items()
        }
    initial_state = arguments.pop("initial_state")
    inputs = tuple(arguments.values())
    grad_y, grad_final_state = torch.randn_like(arguments["x"]), torch.randn_like(initial_state)

    forward = (*inputs, initial_state if with_state else None, chunk_size)
    ours = torch.ops.mblm.selective_scan(*forward)
    theirs = _reference(*forward)
    backward = (grad_y, grad_final_state, *inputs, theirs[2], chunk_size)
    ours = (*ours, *torch.ops.mblm.selective_scan_backward(*backward))
    theirs = (*theirs, *_backward_reference(*backward))

    # Terms of a sum may cancel out: errors are relative to the largest sum of the terms' sizes.
    sizes = [t if t is arguments["A"] else t.abs() for t in inputs]
    of_sizes = _reference(*sizes, initial_state.abs() if with_state else None, chunk_size)
    gradients = (grad_y.abs(), grad_final_state.abs(), *sizes, of_sizes[2], chunk_size)
    of_sizes = (*of_sizes, *_backward_reference(*gradients))

    names = ["y", "final_state", "chunk_states", "x", "delta", "A", "B", "C", "D", "initial_state"]
    for name, one, other, size in zip(names, ours, theirs, of_sizes, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape, name
        assert one.is_contiguous(), name
        scale = size.abs().max().item() if size.numel() else 0.0
        bound = {torch.float64: 1e-11, torch.float32: 1e-5}.get(one.dtype, 1e-2)
        torch.testing.assert_close(
            one, other, rtol=bound, atol=bound * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    arguments = make_arguments(3, 70, 96, 16, dtype=torch.float32)
    arguments = {name: tensor.requires_grad_() for name, tensor in arguments.items()}
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs = selective_scan(**arguments)
            loss = sum(output.square().sum() for output in outputs)
            results.append((*outputs, *torch.autograd.grad(loss, list(arguments.values()))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 5)}, ValueError, r"x must be \(B, L, D\)"),
        ({"A": torch.zeros(4, 2)}, ValueError, r"A must be \(3, N\)"),
        ({"delta": torch.zeros(2, 4, 3)}, ValueError, "delta must have shape"),
        ({"B": torch.zeros(2, 5, 2).double()}, TypeError, "B must be"),
        ({"initial_state": torch.zeros(2, 3, 3)}, ValueError, "initial_state must have shape"),
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
    require_native("selective_scan")
    arguments = make_arguments(2, 5, 3, 2, dtype=torch.float32) | {"chunk_size": 4} | change
    with pytest.raises(error, match=message):
        torch.ops.mblm.selective_scan(*arguments.values())


@pytest.mark.parametrize(
    ("name", "replacement", "error", "message"),
    [
        ("x", torch.zeros(2, 5), ValueError, r"x must be \(B, L, D\), got shape \(2, 5\)"),
        ("x", torch.zeros(2, 5, 3, dtype=torch.long), TypeError, "x must be floating point"),
        ("A", torch.zeros(4, 2).double(), ValueError, r"A must be \(3, N\).*\(4, 2\)"),
        ("A", torch.zeros(3, 2).half(), TypeError, "A must be float32 or float64.*float16"),
        ("delta", torch.zeros(2, 4, 3).double(), ValueError, r"delta must have shape \(2, 5, 3\)"),
        ("delta", torch.zeros(2, 5, 3), TypeError, "delta must be torch.float64.*float32"),
        ("B", torch.zeros(2, 5, 3).double(), ValueError, r"B must have shape \(2, 5, 2\)"),
        ("C", torch.zeros(2, 5, 2), TypeError, "C must be torch.float64"),
        ("D", torch.zeros(2).double(), ValueError, r"D must have shape \(3,\)"),
        ("initial_state", torch.zeros(1, 3, 2).double(), ValueError, r"initial_state.*\(2, 3, 2\)"),
    ],
)
def test_bad_arguments_are_named(
    name: str, replacement: Tensor, error: type[Exception], message: str
) -> None:
    arguments = make_arguments(2, 5, 3, 2) | {name: replacement}
    with pytest.raises(error, match=message):
        selective_scan(**arguments)


@pytest.mark.parametrize("chunk_size", [9, 10, 2**62, sys.maxsize - 1, sys.maxsize])
@pytest.mark.parametrize("operator", [_reference, torch.ops.mblm.selective_scan.default])
def test_a_chunk_may_be_longer_than_the_sequences(
    chunk_size: int, operator: Callable[..., Any]
) -> None:
    arguments = make_arguments(2, 9, 3, 4)
    y, final_state, states = operator(*arguments.values(), chunk_size)
    gradients = torch.ops.mblm.selective_scan_backward
    arguments.pop("initial_state")
    given = (y, final_state, *arguments.values(), states)
    expected = gradients(*given, 9)
    torch.testing.assert_close(gradients(*given, chunk_size), expected)
    torch.testing.assert_close(_backward_reference(*given, chunk_size), expected)
    torch.testing.assert_close((y, final_state), selective_scan(**make_arguments(2, 9, 3, 4)))


def test_bad_chunk_size() -> None:
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        selective_scan(**make_arguments(2, 5, 3, 2), chunk_size=0)
