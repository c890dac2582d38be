"""The causal convolution: against torch's own, its window, gradients, native kernel."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mblm.ops.causal_conv import causal_conv, causal_conv_reference
from tests.ops.samples import reference_of

OPERATOR = torch.ops.mblm.causal_conv
IMPLEMENTATIONS = pytest.mark.parametrize(
    "implementation", [OPERATOR, causal_conv_reference], ids=["operator", "reference"]
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def make_arguments(
    rows: int,
    length: int,
    channels: int,
    taps: int,
    *,
    dtype: torch.dtype = torch.float64,
    weight_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and window."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight_dtype = weight_dtype or dtype
    return (
        draw(rows, length, channels).to(dtype),
        draw(channels, 1, taps).to(weight_dtype),
        draw(channels).to(weight_dtype),
        draw(rows, taps - 1, channels).to(dtype),
    )


@IMPLEMENTATIONS
@pytest.mark.parametrize("length", [1, 2, 3, 9, 40])
@pytest.mark.parametrize("taps", [1, 2, 4])
def test_equals_a_padded_depthwise_convolution(
    implementation: Callable[..., tuple[Tensor, Tensor]], length: int, taps: int
) -> None:
    x, weight, bias, _ = make_arguments(2, length, 5, taps)

    y, _ = implementation(x, weight, bias, None)

    padded = F.pad(x.transpose(1, 2), (taps - 1, 0))
    expected = F.silu(F.conv1d(padded, weight, bias, groups=5))
    torch.testing.assert_close(y, expected.transpose(1, 2))


@pytest.mark.parametrize("cuts", [[0, 7], [1] * 7, [2, 5], [6, 1], [3, 0, 4]])
@pytest.mark.parametrize("taps", [1, 4])
def test_pieces_equal_the_whole(cuts: list[int], taps: int) -> None:
    x, weight, bias, _ = make_arguments(2, 7, 5, taps, dtype=torch.float32)
    whole, last_window = causal_conv(x, weight, bias)

    window, pieces = None, []
    for piece in x.split(cuts, dim=1):
        y, window = causal_conv(piece, weight, bias, window)
        pieces.append(y)

    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    torch.testing.assert_close(window, last_window, rtol=0, atol=0)


def test_the_window_holds_no_more_than_its_own_memory() -> None:
    x, weight, bias, _ = make_arguments(1, 1000, 5, 4)
    _, window = causal_conv(x, weight, bias)
    assert window.untyped_storage().nbytes() == window.numel() * window.element_size()


def test_the_backward_pass_keeps_the_inputs_alone() -> None:
    arguments = [tensor.requires_grad_() for tensor in make_arguments(1, 50, 5, 4)]
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        causal_conv(*arguments)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in arguments}


@pytest.mark.parametrize("output", [0, 1], ids=["y alone", "next window alone"])
@pytest.mark.parametrize("length", [1, 5])
def test_gradient_of_one_output(output: int, length: int) -> None:
    arguments = [tensor.requires_grad_() for tensor in make_arguments(2, length, 3, 4)]

    def gradients(function: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        loss = function(*arguments)[output].square().sum()
        return torch.autograd.grad(loss, arguments, allow_unused=True, materialize_grads=True)

    torch.testing.assert_close(gradients(causal_conv), gradients(causal_conv_reference))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 3, 40]),
    length=st.one_of(st.integers(0, 6), st.sampled_from([31, 32, 33, 70])),
    channels=st.sampled_from([0, 1, 5, 64, 67]),
    taps=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    weight_dtype=st.sampled_from([None, torch.float32]),
    with_window=st.booleans(),
    layout=st.sampled_from(["contiguous", "sliced", "transposed"]),
)
def test_native_equals_reference(
    require_native: Callable[[str], None],
    rows: int,
    length: int,
    channels: int,
    taps: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    with_window: bool,
    layout: str,
) -> None:
    require_native("causal_conv")
    require_native("causal_conv_backward")
    x, weight, bias, window = make_arguments(
        rows, length, channels, taps, dtype=dtype, weight_dtype=weight_dtype
    )
    if layout == "sliced":
        x, weight = F.pad(x, (1, 2))[..., 1:-2], weight.repeat_interleave(2, dim=2)[..., ::2]
    elif layout == "transposed":
        x, window = x.mT.contiguous().mT, window.mT.contiguous().mT
    inputs = (x, weight, bias, window if with_window else None)
    grads = torch.randn_like(x), torch.randn_like(window) if with_window else None

    ours = (*OPERATOR(*inputs), *torch.ops.mblm.causal_conv_backward(*grads, *inputs))
    theirs = (
        *causal_conv_reference(*inputs),
        *reference_of("causal_conv_backward")(*grads, *inputs),
    )

    names = ["y", "next_window", "x", "weight", "bias", "window"]
    for name, one, other in zip(names, ours, theirs, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape, name
        assert one.is_contiguous(), name
        # Terms of a sum may cancel out: errors are relative to the largest result.
        scale = max(1.0, other.abs().max().item() if other.numel() else 0.0)
        bound = max(TOLERANCE[one.dtype], TOLERANCE[dtype] if weight_dtype is None else 2e-6)
        torch.testing.assert_close(
            one, other, rtol=bound, atol=bound * scale, msg=lambda m, name=name: f"{name}: {m}"
        )
