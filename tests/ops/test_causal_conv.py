"""The causal convolution against torch's own, and its window."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from mblm.ops.causal_conv import causal_conv


@pytest.mark.parametrize("length", [1, 2, 3, 9])
@pytest.mark.parametrize("taps", [1, 2, 4])
def test_equals_a_padded_depthwise_convolution(length: int, taps: int) -> None:
    x = torch.randn(2, length, 5, dtype=torch.float64)
    weight = torch.randn(5, 1, taps, dtype=torch.float64)
    bias = torch.randn(5, dtype=torch.float64)

    y, _ = causal_conv(x, weight, bias)

    padded = F.pad(x.transpose(1, 2), (taps - 1, 0))
    torch.testing.assert_close(y, F.conv1d(padded, weight, bias, groups=5).transpose(1, 2))


@pytest.mark.parametrize("cuts", [[0, 7], [1] * 7, [2, 5], [6, 1], [3, 0, 4]])
@pytest.mark.parametrize("taps", [1, 4])
def test_pieces_equal_the_whole(cuts: list[int], taps: int) -> None:
    x = torch.randn(2, 7, 5)
    weight, bias = torch.randn(5, 1, taps), torch.randn(5)
    whole, last_window = causal_conv(x, weight, bias)

    window, pieces = None, []
    for piece in x.split(cuts, dim=1):
        y, window = causal_conv(piece, weight, bias, window)
        pieces.append(y)

    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    torch.testing.assert_close(window, last_window, rtol=0, atol=0)


def test_the_window_holds_no_more_than_its_own_memory() -> None:
    _, window = causal_conv(torch.randn(1, 1000, 5), torch.randn(5, 1, 4), torch.randn(5))
    assert window.untyped_storage().nbytes() == window.numel() * window.element_size()


def test_keeps_the_dtype_of_the_activations() -> None:
    x = torch.randn(1, 6, 5, dtype=torch.bfloat16)
    y, window = causal_conv(x, torch.randn(5, 1, 4), torch.randn(5))
    assert (y.dtype, window.dtype) == (torch.bfloat16, torch.bfloat16)


def test_a_window_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"window must have shape \(1, 3, 5\), got \(1, 2, 5\)"):
        causal_conv(
            torch.zeros(1, 6, 5), torch.zeros(5, 1, 4), torch.zeros(5), torch.zeros(1, 2, 5)
        )
