"""The two Mamba scans against plain loops: chunks, states, gradients, native kernels."""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mblm.ops import selective_scan as mamba1
from mblm.ops import ssd as mamba2
from mblm.ops._scans import backward_reference, reference
from tests.ops.modes import LargestTensor

Arguments = dict[str, Tensor]
Result = tuple[Tensor, ...]
F16, F32, F64 = torch.float16, torch.float32, torch.float64


def selective_loop(x, delta, A, B, C, D, initial_state):  # noqa: N803
    """Mamba-1's recurrence as the paper writes it, one position at a time."""
    state, outputs = initial_state, [x[:, :0]]
    for t in range(x.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * A)
        state = decay * state + (delta[:, t] * x[:, t])[..., None] * B[:, t, None, :]
        outputs.append((state * C[:, t, None, :]).sum(-1)[:, None] + D * x[:, t : t + 1])
    return torch.cat(outputs, dim=1), state


def ssd_loop(x, dt, A, B, C, D, initial_state):  # noqa: N803
    """Mamba-2's recurrence as the paper writes it, one position at a time."""
    state, outputs = initial_state, [x[:, :0]]
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * A)
        arriving = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, None, None, :]
        state = decay[..., None, None] * state + arriving
        y = (state * C[:, t, None, None, :]).sum(-1) + D[:, None] * x[:, t]
        outputs.append(y[:, None])
    return torch.cat(outputs, dim=1), state


class Scan(NamedTuple):
    """One of the scans; ``widths`` of a position of x, of its steps and of the rates."""

    name: str
    steps: str
    run: Callable[..., Result]
    loop: Callable[..., Result]
    chunk: Callable[..., Result]
    widths: tuple[int, ...]
    of_steps: slice
    rates_have_states: bool

    def arguments(
        self,
        rows: int,
        length: int,
        num_states: int,
        dtype: torch.dtype = F64,
        state_dtype: torch.dtype | None = None,
        widths: tuple[int, ...] | None = None,
    ) -> Arguments:
        generator = torch.Generator().manual_seed(1)
        state_dtype, widths = state_dtype or dtype, widths or self.widths
        steps = widths[self.of_steps]

        def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=F64).to(dtype)

        rates = (*steps, num_states) if self.rates_have_states else steps
        return {
            "x": draw(rows, length, *widths),
            self.steps: draw(rows, length, *steps, dtype=state_dtype).abs(),
            "A": -draw(*rates, dtype=state_dtype).abs(),
            "B": draw(rows, length, num_states),
            "C": draw(rows, length, num_states),
            "D": draw(*steps, dtype=state_dtype),
            "initial_state": draw(rows, *widths, num_states, dtype=state_dtype),
        }

    @property
    def operator(self) -> Any:
        return getattr(torch.ops.mblm, self.name)

    @property
    def backward(self) -> Any:
        return getattr(torch.ops.mblm, f"{self.name}_backward")

    @property
    def by_position(self) -> tuple[str, ...]:
        return ("x", self.steps, "B", "C")


SCANS = {
    "selective_scan": Scan(
        *("selective_scan", "delta", mamba1.selective_scan),
        *(selective_loop, mamba1._chunk, (3,), slice(0, 1), True),
    ),
    "ssd": Scan(
        *("ssd", "dt", mamba2.ssd),
        *(ssd_loop, mamba2._chunk, (3, 2), slice(0, 1), False),
    ),
}


@pytest.fixture(params=SCANS)
def scan(request: pytest.FixtureRequest) -> Scan:
    return SCANS[request.param]


def leaves(arguments: Arguments) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in arguments.values()]


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 9])
def test_equals_the_plain_loop(scan: Scan, length: int) -> None:
    arguments = scan.arguments(3, length, 2)
    torch.testing.assert_close(scan.run(**arguments, chunk_size=4), scan.loop(**arguments))


def test_no_state_per_position_is_ever_held(scan: Scan) -> None:
    arguments = scan.arguments(1, 512, 16, widths=(64, 1)[: len(scan.widths)])
    num_inputs = arguments["x"].numel()
    with LargestTensor() as largest:
        y, final_state, states = reference(scan.chunk)(*arguments.values(), 16)
        arguments.pop("initial_state")
        backward_reference(scan.chunk)(y, final_state, *arguments.values(), states, 16)
    assert largest.entries == num_inputs == states.numel()  # not 16 times as many


@pytest.mark.parametrize("length", [0, 5])
def test_arguments_are_left_as_they_are(scan: Scan, length: int) -> None:
    arguments = scan.arguments(2, length, 4)
    before = {name: tensor.clone() for name, tensor in arguments.items()}
    _, final_state = scan.run(**arguments)
    final_state.zero_()  # it is never the initial one
    torch.testing.assert_close(arguments, before, rtol=0, atol=0)


@settings(max_examples=15, deadline=None)
@given(length=st.integers(0, 40), cut=st.integers(0, 40), chunk_size=st.integers(1, 50))
def test_a_sequence_may_be_cut_anywhere(length: int, cut: int, chunk_size: int) -> None:
    for scan in SCANS.values():
        arguments = scan.arguments(2, length, 3)
        first, second = dict(arguments), dict(arguments)
        for name in scan.by_position:
            first[name], second[name] = arguments[name][:, :cut], arguments[name][:, cut:]
        y_first, second["initial_state"] = scan.run(**first, chunk_size=chunk_size)
        y_second, final_state = scan.run(**second, chunk_size=chunk_size)
        whole = torch.cat([y_first, y_second], dim=1), final_state
        torch.testing.assert_close(whole, scan.run(**arguments))


def test_long_sums_of_rates_keep_their_digits(scan: Scan) -> None:
    """A strong decay early in a chunk must not blur the weak decays after it."""
    arguments = scan.arguments(1, 64, 4, F32)
    arguments[scan.steps] = torch.full_like(arguments[scan.steps], 1e-3)
    arguments[scan.steps][:, :8] = 1e4
    arguments["A"] = -torch.ones_like(arguments["A"])
    y, _ = scan.run(**arguments)
    expected, _ = scan.loop(**{name: t.double() for name, t in arguments.items()})
    torch.testing.assert_close(y[:, 8:].double(), expected[:, 8:], rtol=1e-5, atol=1e-6 * 1e4)


def test_strong_decay_and_large_steps_stay_finite(scan: Scan) -> None:
    arguments = scan.arguments(1, 20, 2, F32)
    arguments[scan.steps] *= 1e4
    tensors = leaves(arguments)
    y, _ = scan.run(*tensors)
    gradients = torch.autograd.grad(y.sum(), tensors)
    assert all(tensor.isfinite().all() for tensor in (y, *gradients))


@pytest.mark.parametrize("output", [0, 1], ids=["y alone", "final state alone"])
def test_gradient_of_one_output(scan: Scan, output: int) -> None:
    tensors = leaves(scan.arguments(2, 5, 2))

    def gradients(function: Callable[..., Result]) -> Result:
        loss = function(*tensors)[output].square().sum()
        return torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)

    torch.testing.assert_close(gradients(scan.run), gradients(scan.loop))


DTYPES = [(F64, F64), (F32, F32), (torch.bfloat16, F32), (F16, F32), (F32, F64)]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 2, 35]),
    length=st.integers(0, 12),
    width=st.sampled_from([0, 1, 3, 16, 37]),
    head_dim=st.sampled_from([0, 1, 5, 8, 18]),
    num_states=st.sampled_from([1, 3, 8, 19]),
    chunk_size=st.integers(1, 14),
    dtypes=st.sampled_from(DTYPES),
    with_state=st.booleans(),
    layout=st.sampled_from(["contiguous", "part of a wider tensor", "channels first"]),
)
@pytest.mark.parametrize("name", SCANS)
def test_native_equals_reference(
    require_native: Callable[[str], None],
    name: str,
    rows: int,
    length: int,
    width: int,
    head_dim: int,
    num_states: int,
    chunk_size: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    with_state: bool,
    layout: str,
) -> None:
    scan = SCANS[name]
    require_native(scan.name)
    require_native(f"{scan.name}_backward")
    widths = (width,) if name == "selective_scan" else (min(width, 3), head_dim)
    arguments = scan.arguments(rows, length, num_states, *dtypes, widths=widths)
    if layout == "part of a wider tensor":  # as the convolution gives x, B and C
        parts = {of: arguments[of] for of in ("x", "B", "C")}
        wide = torch.cat([part.flatten(2) for part in parts.values()], -1)
        cut = wide.split([part.shape[2:].numel() for part in parts.values()], -1)
        for (of, part), own in zip(parts.items(), cut, strict=True):
            arguments[of] = own.unflatten(-1, part.shape[2:])
    elif layout == "channels first":
        arguments = {n: t.mT.contiguous().mT if t.ndim > 1 else t for n, t in arguments.items()}
    initial_state = arguments.pop("initial_state")
    inputs = tuple(arguments.values())
    grads = torch.randn_like(arguments["x"]), torch.randn_like(initial_state)
    run, differentiate = reference(scan.chunk), backward_reference(scan.chunk)

    forward = (*inputs, initial_state if with_state else None, chunk_size)
    theirs = run(*forward)
    backward = (*grads, *inputs, theirs[2], chunk_size)
    ours = (*scan.operator(*forward), *scan.backward(*backward))
    theirs = (*theirs, *differentiate(*backward))

    # Terms of a sum may cancel out: errors are relative to the largest sum of the terms' sizes.
    sizes = [t if t is arguments["A"] else t.abs() for t in inputs]
    of_sizes = run(*sizes, initial_state.abs() if with_state else None, chunk_size)
    gradients = (*(grad.abs() for grad in grads), *sizes, of_sizes[2], chunk_size)
    of_sizes = (*of_sizes, *differentiate(*gradients))

    names = ["y", "final_state", "chunk_states", *arguments, "initial_state"]
    for of, one, other, size in zip(names, ours, theirs, of_sizes, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape, of
        assert one.is_contiguous(), of
        scale = size.abs().max().item() if size.numel() else 0.0
        bound = {F64: 1e-11, F32: 1e-5}.get(one.dtype, 1e-2)
        if name == "ssd" and dtypes[0] == torch.bfloat16 and torch.ops.mblm.device_kind():
            bound = max(bound, 3e-5)  # a GPU's operands have 16 bits
        torch.testing.assert_close(
            one, other, rtol=bound, atol=bound * scale, msg=lambda m, of=of: f"{of}: {m}"
        )


@pytest.mark.parametrize("chunk_size", [9, 10, 2**62, sys.maxsize - 1, sys.maxsize])
@pytest.mark.parametrize("native", [False, True])
def test_a_chunk_may_be_longer_than_the_sequences(
    scan: Scan, chunk_size: int, native: bool
) -> None:
    arguments = scan.arguments(2, 9, 4)
    expected = scan.run(**arguments)
    run = scan.operator if native else reference(scan.chunk)
    y, final_state, states = run(*arguments.values(), chunk_size)
    torch.testing.assert_close((y, final_state), expected)
    arguments.pop("initial_state")
    given = (y, final_state, *arguments.values(), states)
    differentiate = scan.backward if native else backward_reference(scan.chunk)
    torch.testing.assert_close(differentiate(*given, chunk_size), scan.backward(*given, 9))
